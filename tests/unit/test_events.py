"""docs/events.md lists every event that the code logs, and no other."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}
# Events that are no literal where they are logged: states and outcomes of deliveries.
SPOKEN = {
    "requeued",
    "uncertain",
    "malformed",
    "delivered",
    "deferred",
    "bounced",
    "expired",
    "held",
    "split",
    "dropped",
    "queued",
}


ROWS = re.findall(
    r"^\| `([^`]+)` \| (\w+) \|", (ROOT / "docs" / "events.md").read_text(), re.MULTILINE
)


def logged() -> dict[str, set[str]]:
    """Events with the levels that they are logged at."""
    found: dict[str, set[str]] = {}
    for package in (
        "relay",
        "reception",
        "plugins",
        "smtpd",
        "qmqpd",
        "worker",
        "commands",
        "migrations",
    ):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                match node:
                    case ast.Call(
                        func=ast.Attribute(value=ast.Name(id="log"), attr=level),
                        args=[ast.Constant(value=str(event)), *_],
                    ) if level in LEVELS:
                        found.setdefault(event, set()).add(
                            "error" if level == "exception" else level
                        )
    return found


def test_events_of_the_list_and_of_the_code_are_the_same():
    listed = {event for event, _ in ROWS}
    code = set(logged()) | SPOKEN
    assert listed - code == set(), "listed, but never logged"
    assert code - listed == set(), "logged, but not listed"


def test_levels_of_the_list_and_of_the_code_are_the_same():
    listed, code = dict(ROWS), logged()
    assert {event: {listed[event]} for event in code if event in listed} == {
        e: code[e] for e in code if e in listed
    }
