"""The table of transitions, the statements that change a state, and the diagram made from it."""

import ast
import re
from pathlib import Path

import pytest

from migrations.tables import deliveries
from relay.db.schema import literals
from relay.queue.operations import OPERATIONS
from relay.queue.outcome import Outcome
from relay.queue.states import (
    FINAL,
    LATE_K,
    OUTCOME_POLICY,
    PENDING_STATES,
    TRANSITIONS,
    UNFINISHED,
    State,
    successors,
)

ROOT = Path(__file__).parents[2]
ROOMS = ("relay", "worker", "reception", "smtpd", "qmqpd", "commands", "migrations")
# An assignment of a state, or the CASE that computes it, up to the next column.
_ASSIGNS = re.compile(
    r"SET state = |\bstate = '(?:held|deferred)', due_at|INSERT INTO deliveries|END AS final"
)
_EVENT = re.compile(r"-- event: (.*)")


def test_every_state_is_in_the_table() -> None:
    assert {row.after for row in TRANSITIONS} == set(State)
    assert all(row.before is not row.after for row in TRANSITIONS)
    assert len(set(TRANSITIONS)) == len(TRANSITIONS)
    assert set(UNFINISHED) | set(FINAL) | {State.SPLIT} == set(State)


def test_only_queued_becomes_sending() -> None:
    assert [state for state in State if State.SENDING in successors(state)] == [State.QUEUED]


def test_only_sending_becomes_delivered() -> None:
    assert [state for state in State if State.DELIVERED in successors(state)] == [State.SENDING]


def test_final_states_stay_unless_a_bounce_is_reclassified_or_its_dsn_is_uncertain() -> None:
    assert {state: successors(state) for state in FINAL if successors(state)} == {
        State.BOUNCED: {State.DEFERRED, State.HELD},
        State.EXPIRED: {State.HELD},
    }
    assert successors(State.SPLIT) == {State.BOUNCED}, "in the transaction that could not split it"


def test_every_unfinished_state_leads_to_a_final_one() -> None:
    reached = set(FINAL)
    while more := {state for state in State if successors(state) & reached} - reached:
        reached |= more
    assert set(UNFINISHED) <= reached


def test_operations_on_a_delivery_in_flight_lead_from_sending() -> None:
    pending = {row.after for row in TRANSITIONS if row.event == "pending operation"}
    assert {operation.state for operation in OPERATIONS.values() if operation.pending} == pending


@pytest.mark.parametrize("where", ["claim", "rescue"])
@pytest.mark.parametrize("database", ["postgresql", "sqlite"])
def test_a_pending_operation_leads_to_the_state_that_the_table_names(
    where: str, database: str
) -> None:
    text = (ROOT / f"relay/queue/{where}.{database}.sql").read_text()
    named = dict(re.findall(r"pending_operation = '(\w+)' THEN '(\w+)'", text))
    (named["retry"],) = re.findall(r"pending_operation IS NOT NULL THEN '(\w+)'", text)
    assert named == PENDING_STATES


def test_every_outcome_has_a_next_state_that_the_table_names() -> None:
    assert set(OUTCOME_POLICY) == set(Outcome)
    assert {state for state, _ in OUTCOME_POLICY.values()} <= successors(State.SENDING)


def test_values_are_their_names_in_lower_case() -> None:
    assert [str(outcome) for outcome in Outcome] == [outcome.name.lower() for outcome in Outcome]
    assert [str(state) for state in State] == [state.name.lower() for state in State]
    assert literals(("a", "b")) == "'a', 'b'"


def test_sql_files_name_states_that_exist() -> None:
    """SQL has the states as text."""
    texts = [file.read_text() for room in ROOMS for file in (ROOT / room).rglob("*.sql")]
    compared = [
        set(re.findall(r"'(\w+)'", values))
        for text in texts
        for values in re.findall(r"\bstate (?:NOT )?(?:IN|=|<>) (\([^)]*\)|'\w+')", text)
    ]
    assert len(compared) > 30
    assert set().union(*compared) <= set(State)


def _statements() -> dict[str, str]:
    """Every statement of the program that writes a state, by file and line or name: of SQL files,
    and strings in Python, where `{}` stands for a value that is put in."""
    found = {}
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.sql"):
            _, *parts = re.split(r"^-- name: (\w+)$", file.read_text(), flags=re.M)
            for name, text in zip(parts[::2], parts[1::2], strict=True):
                if _ASSIGNS.search(text):
                    found[f"{file.relative_to(ROOT)}:{name}"] = text
        for file in (ROOT / room).rglob("*.py"):
            tree = ast.parse(file.read_text())
            inner = {
                part
                for node in ast.walk(tree)
                if isinstance(node, ast.JoinedStr)
                for part in node.values
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    text = "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "{}"
                        for part in node.values
                    )
                elif isinstance(node, ast.Constant) and node not in inner:
                    text = str(node.value)
                else:
                    continue
                if _ASSIGNS.search(text):
                    found[f"{file.relative_to(ROOT)}:{node.lineno}"] = text
    return found


STATEMENTS = _statements()


def test_there_are_statements_that_write_a_state() -> None:
    assert len(STATEMENTS) >= 14
    named = {name for text in STATEMENTS.values() for name in _events(text)}
    assert named | set(OPERATIONS) | {"reroute"} == {row.event for row in TRANSITIONS} | {LATE_K}


@pytest.mark.parametrize("where", STATEMENTS)
def test_a_statement_writes_only_states_that_its_events_lead_to(where: str) -> None:
    text = STATEMENTS[where]
    events = _events(text)
    assert events, "an `-- event:` comment names the event"
    after = {row.after for row in TRANSITIONS if row.event in events}
    if LATE_K in events:
        after.add(State.DELIVERED)
    assert _written(text) <= after


def _events(text: str) -> set[str]:
    return {name for line in _EVENT.findall(text) for name in line.split(", ")}


def _written(text: str) -> set[str]:
    """The states that stand as literals where a statement assigns `state`."""
    cases = re.findall(r"-- event: [^\n]*\n\s*CASE (.*?) END AS final", text, re.DOTALL)
    cases += re.findall(r"SET state = CASE (.*?) END", text, re.DOTALL)
    written = {state for case in cases for state in re.findall(r"(?:THEN|ELSE) '(\w+)'", case)}
    for chosen in re.findall(r"INSERT INTO deliveries.*?SELECT(.*?)FROM", text, re.DOTALL):
        written |= set(re.findall(r"'(\w+)'", chosen)) - {"default", "operator"}
    for assignments in re.findall(r"\bSET (.*?)(?:\bWHERE\b|\bFROM\b|$)", text, re.DOTALL):
        written |= set(re.findall(r"^state = '(\w+)'", assignments))
    return written


def test_a_statement_names_the_same_events_for_both_databases() -> None:
    events: dict[str, list[set[str]]] = {}
    for where, text in STATEMENTS.items():
        if where.partition(":")[0].endswith(".sql"):
            events.setdefault(re.sub(r"\.\w+\.sql", "", where), []).append(_events(text))
    assert events
    assert [name for name, both in events.items() if len(both) != 2 or both[0] != both[1]] == []


def _diagram() -> str:
    """The table as mermaid has it: an arrow for each pair of states, with all events."""
    events: dict[tuple[str, str], list[str]] = {}
    for event, before, after in TRANSITIONS:
        events.setdefault((before or "[*]", after), []).append(event)
    arrows = [f"    {a} --> {b}: {', '.join(names)}" for (a, b), names in events.items()]
    ends = [f"    {state} --> [*]" for state in FINAL]
    return "\n".join(["```mermaid", "stateDiagram-v2", *arrows, *ends, "```"])


def test_the_diagram_in_the_docs_is_the_table() -> None:
    assert _diagram() in (ROOT / "docs/design.md").read_text()


def test_a_delivery_stands_in_one_index_by_due_at_for_each_state() -> None:
    indexes = [index for index in deliveries.indexes if "due_at" in index.columns]
    where = {
        str(index.name): str(index.dialect_options["postgresql"]["where"]) for index in indexes
    }
    # Mail that waits for a route stands in one more. No other write of a state may cost two
    # entries.
    assert where.pop("deliveries_waiting") == "state = 'deferred' AND waiting_for IS NOT NULL"
    found = [state for condition in where.values() for state in State if f"'{state}'" in condition]
    assert sorted(found) == sorted(set(found))
    assert set(UNFINISHED) - {State.HELD} <= set(found)
