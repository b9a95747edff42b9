"""docs/events.md lists every event that the code logs, and no other."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}
# Events that are no literal where they are logged: states and outcomes of deliveries, and warnings about settings.
SPOKEN = {
    "no QMQP server configured (RELAY_QMQP_SERVERS)", "ignoring RELAY_...", "handed back", "uncertain", "malformed",
    "delivered", "deferred", "bounced", "expired", "held", "split", "dropped", "queued",
}  # fmt: skip


def logged() -> set[str]:
    found = set()
    for package in ("relay", "smtpd", "worker", "commands", "migrations/versions"):
        for file in (ROOT / package).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                match node:
                    case ast.Call(
                        func=ast.Attribute(value=ast.Name(id="log"), attr=level),
                        args=[ast.Constant(value=str(event)), *_],
                    ) if level in LEVELS:
                        found.add(event)
    return found


def test_the_list_is_the_code():
    listed = set(re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "events.md").read_text(), re.MULTILINE))
    code = logged() | SPOKEN
    assert listed - code == set(), "listed, but never logged"
    assert code - listed == set(), "logged, but not listed"
