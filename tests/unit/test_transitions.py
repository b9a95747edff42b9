"""The table of transitions: what it says of itself, and that the code's own lists agree with it."""

from migrations.tables import deliveries
from relay.db.schema import FINAL, NEEDS_BODY, TRANSITIONS, UNFINISHED, Outcome, State, words
from relay.queue.operations import OPERATIONS


def test_every_state_is_in_the_table() -> None:
    assert set(TRANSITIONS) == set(State)
    assert set().union(*TRANSITIONS.values()) <= set(State)
    assert all(state not in TRANSITIONS[state] for state in State)
    assert set(UNFINISHED) | set(FINAL) | {State.SPLIT} == set(State)


def test_only_queued_becomes_sending() -> None:
    assert [state for state in State if State.SENDING in TRANSITIONS[state]] == [State.QUEUED]


def test_only_sending_is_delivered() -> None:
    assert [state for state in State if State.DELIVERED in TRANSITIONS[state]] == [State.SENDING]


def test_what_is_final_stays_but_for_a_bounce_that_an_operator_takes_back() -> None:
    assert {state: TRANSITIONS[state] for state in (*FINAL, State.SPLIT) if TRANSITIONS[state]} == {
        State.BOUNCED: frozenset({State.DEFERRED})
    }


def test_everything_unfinished_leads_to_an_end() -> None:
    reached = set(FINAL)
    while more := {state for state in State if TRANSITIONS[state] & reached} - reached:
        reached |= more
    assert set(UNFINISHED) <= reached


def test_operators_verbs_are_transitions() -> None:
    for verb in OPERATIONS.values():
        for state in verb.takes:
            assert verb.state in TRANSITIONS[state], f"{verb.name} from {state}"
        if verb.wanted:
            assert verb.state in TRANSITIONS[State.SENDING]


def test_what_the_words_of_the_design_are() -> None:
    assert [str(outcome) for outcome in Outcome] == [outcome.name.lower() for outcome in Outcome]
    assert [str(state) for state in State] == [state.name.lower() for state in State]
    assert words(("a", "b")) == "'a', 'b'"
    for state in State:
        assert (f"'{state}'" in NEEDS_BODY) == (state in UNFINISHED)


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
