"""Claiming and recording, on both databases: one owner at a time, a K above all, and nothing moved
that must stay."""

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Connection, event
from sqlalchemy.exc import OperationalError

from relay.dsn.message import BY_OPERATOR
from relay.ids import dashed
from relay.queue.claim import WorkerQueue
from relay.queue.model import (
    Claim,
    ClaimRequest,
    Command,
    CommandResult,
    Completion,
    CompletionResult,
    Renewal,
)
from relay.queue.states import Outcome, State, successors
from tests.integration.office import OUTCOME_POLICY, PLENTY, Office, opened
from tests.waiting import until

NOT_K = [outcome for outcome in Outcome if outcome is not Outcome.DELIVERED]
FINISHED = ("delivered", "bounced", "expired", "dropped")


def at_once[T](work: Callable[[int], T], count: int = 4) -> list[T]:
    """What `work` gives in so many threads that begin together."""
    barrier = threading.Barrier(count)

    def begin(n: int) -> T:
        barrier.wait(10)
        return work(n)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


# --- claiming
# ---------------------------------------------------------------------------------------------


def test_a_claim_brings_the_envelope_and_belongs_to_one_worker(office: Office) -> None:
    recipients = [f"{name}@example.org" for name in ("zoe", "adam", "mia", "bob", "lea")]
    queue_id = office.accept(*recipients, sender="sender@example.com")
    (claim,) = office.claim(queue_id)
    assert (claim.queue_id, claim.number, claim.claim, claim.route) == (queue_id, 1, 1, "default")
    assert (claim.sender, claim.size, claim.crash_count, claim.backoff_step) == (
        "sender@example.com",
        100,
        0,
        0,
    )
    assert claim.recipients == tuple(recipients), "in the order of RCPT"
    assert 0 <= claim.received_ago < 60
    row = office.delivery(queue_id)
    assert (row["state"], str(row["worker"]).replace("-", ""), row["claim_count"]) == (
        "sending",
        office.worker,
        1,
    )
    far = 2 * (office.settings.session_timeout + office.settings.lease)
    assert row["due_in"] == pytest.approx(far, abs=30), (
        "only a stuck transfer is looked at while it is being sent"
    )
    assert office.claim(queue_id) == [] == office.claim(queue_id, worker=office.hire())


def test_the_null_sender_and_unknown_or_finished_ids(office: Office) -> None:
    bounce, done = office.accept(sender=""), office.accept()
    (claim,) = office.claim(done)
    office.record(claim, Outcome.DELIVERED)
    assert [c.sender for c in office.claim(bounce, done, "0" * 32, bounce)] == [""]


def test_claims_are_numbered(office: Office) -> None:
    queue_id = office.accept()
    for number in (1, 2, 3):
        (claim,) = office.claim(queue_id)
        assert claim.claim == number
        assert office.record(claim, Outcome.INTERRUPTED, state=State.QUEUED).state is State.QUEUED
    assert [claim for claim, _, _ in office.attempts(queue_id)] == [1, 2, 3]


def test_room_is_per_route(office: Office) -> None:
    ids = [
        office.accept("bulk:x@example.org", "y@example.org", "bulk:z@example.org") for _ in range(5)
    ]
    claims = office.claim(*ids, room={"bulk": 3, "default": 2, "full": 0, "other": 9})
    assert Counter(claim.route for claim in claims) == {"bulk": 3, "default": 2}
    assert {claim.recipients for claim in claims} == {
        ("x@example.org", "z@example.org"),
        ("y@example.org",),
    }
    assert office.claim(*ids, room={}) == []
    assert len(office.claim(*ids, room={"bulk": 99, "default": 99})) == 5


def test_overdue_means_a_lost_hint_and_the_longest_due_come_first(office: Office) -> None:
    ids = [office.accept() for _ in range(4)]
    assert office.claim() == [], "their hints may still come"
    for n, queue_id in enumerate(ids):
        office.pass_time(10 + n, only=[queue_id])
    assert {claim.queue_id for claim in office.claim(room={"default": 2})} == {ids[3], ids[2]}
    assert {claim.queue_id for claim in office.claim()} == {ids[1], ids[0]}


def test_everything_is_claimed_once_by_workers_in_a_hurry(office: Office) -> None:
    ids = [office.accept("x@example.org", "bulk:y@example.org") for _ in range(40)]
    office.pass_time(10, only=ids[::2])
    room = {"default": 7, "bulk": 3}

    def work(_: int) -> list[Claim]:
        ledger, worker = office.another_ledger(), office.hire()
        claims: list[Claim] = []
        while True:
            round_: list[CommandResult] = ledger.commit(
                [ClaimRequest(worker, ids, room), ClaimRequest(worker, None, room)]
            )
            new = [claim for result in round_ if isinstance(result, list) for claim in result]
            if not new and not office.rows("SELECT 1 FROM deliveries WHERE state = 'queued'"):
                return claims
            claims += new

    claimed = [(c.queue_id, c.number, c.claim) for claims in at_once(work) for c in claims]
    assert sorted(claimed) == sorted((queue_id, number, 1) for queue_id in ids for number in (1, 2))


# --- recording
# --------------------------------------------------------------------------------------------


def test_every_outcome_is_recorded(office: Office) -> None:
    for outcome in Outcome:
        queue_id, state = office.accept(), OUTCOME_POLICY[outcome]
        recorded = office.record(office.claim(queue_id)[0], outcome, backoff_step=3)
        assert recorded == CompletionResult(state, body_deletable=state is State.DELIVERED)
        row = office.delivery(queue_id)
        assert (row["state"], row["worker"], row["pending_operation"], row["backoff_step"]) == (
            state,
            None,
            None,
            3,
        )
        said = (row["last_outcome"], row["last_reply"], row["last_server"])
        assert said == (outcome, "its words", "qmqp.example.net:628")
        assert (row["finished_at"] is not None) == (state in FINISHED)
        due = {State.DEFERRED: 30, State.BOUNCED: 0}.get(state)
        assert (
            (row["due_in"] is None)
            if due is None
            else (row["due_in"] == pytest.approx(due, abs=20))
        )
        sql = "SELECT a.*, @since(started_at) AS ago FROM attempts a WHERE queue_id = @id(:id)"
        (attempt,) = office.rows(sql, id=queue_id)
        assert (
            attempt["claim"],
            attempt["attempt_index"],
            attempt["outcome"],
            attempt["bytes_sent"],
        ) == (
            1,
            1,
            outcome,
            90,
        )
        assert attempt["ago"] == pytest.approx(0.5, abs=20)
        assert attempt["started_at"] < attempt["finished_at"]


def test_a_notice_is_owed_to_a_real_sender_only(clean_url: str) -> None:
    for bounces, sender, owed in (
        ("dsn", "a@example.com", True), ("dsn", "", False), ("dsn", "#@[]", False), ("off", "a@example.com", False)
    ):  # fmt: skip
        with opened(clean_url, bounces=bounces) as office:
            queue_id = office.accept(sender=sender)
            recorded = office.record(office.claim(queue_id)[0], Outcome.REJECTED)
            assert recorded == CompletionResult(State.BOUNCED, body_deletable=not owed), (
                "a notice returns the header"
            )
            assert (office.delivery(queue_id)["due_in"] is not None) == owed


def test_expiry_is_decided_only_when_a_try_has_failed(office: Office) -> None:
    waiting, failed, taken, stopped, split = (office.accept() for _ in range(5))
    office.pass_time(2000)
    assert office.state(waiting) == "queued", "a host that was off for days still tries"
    claims = {claim.queue_id: claim for claim in office.claim()}
    assert len(claims) == 5
    assert office.record(claims[failed], Outcome.DEFERRED).state is State.EXPIRED
    assert office.delivery(failed)["due_in"] is not None, "the sender is told"
    assert office.record(claims[taken], Outcome.DELIVERED).state is State.DELIVERED
    assert (
        office.record(claims[stopped], Outcome.INTERRUPTED, state=State.QUEUED).state
        is State.QUEUED
    )
    assert office.record(claims[split], Outcome.UNSENDABLE).state is State.HELD


def test_every_outcome_but_k_honours_what_an_operator_wanted(office: Office) -> None:
    verbs = {
        "hold": State.HELD,
        "drop": State.DROPPED,
        "bounce": State.BOUNCED,
        "retry": State.QUEUED,
    }
    for (wanted, state), outcome in itertools.product(verbs.items(), Outcome):
        queue_id = office.accept()
        (claim,) = office.claim(queue_id)
        office.ask(queue_id, wanted)
        expected = State.DELIVERED if outcome is Outcome.DELIVERED else state
        assert office.record(claim, outcome).state is expected
        row = office.delivery(queue_id)
        assert (row["state"], row["pending_operation"]) == (expected, None)
        if wanted != "retry" and expected is not State.DELIVERED:
            assert row["last_reply"] == f"{state} by an operator", "not the server's reply"
            assert row["reason_source"] == "operator"
        else:
            replied = outcome in (Outcome.DELIVERED, Outcome.DEFERRED, Outcome.REJECTED)
            assert row["reason_source"] == ("server" if replied else "relay")
        if expected is State.BOUNCED:
            assert row["last_reply"] == BY_OPERATOR
        assert (row["finished_at"] is not None) == (expected in FINISHED)


def test_no_message_is_looked_up_for_what_owes_no_notice(office: Office) -> None:
    """Its row says to whom a notice would go, and nothing else that a record needs."""
    (one,), (two,) = (
        office.claim(office.accept()),
        office.claim(office.accept(), worker=(lost := office.hire())),
    )
    office.change("DELETE FROM messages")
    assert office.record(one, Outcome.DELIVERED).state is State.DELIVERED
    office.pass_time(400)
    assert office.expire_worker(lost) == 1
    assert office.state(two.queue_id) == "deferred"


def test_what_was_wanted_of_an_earlier_claim_is_forgotten(office: Office) -> None:
    queue_id = office.accept()
    office.ask(queue_id, "drop")
    assert office.record(office.claim(queue_id)[0], Outcome.DEFERRED).state is State.DEFERRED


def test_a_late_k_beats_every_state(office: Office) -> None:
    another = dashed(office.hire())
    for state in set(State) - {State.DELIVERED}:
        queue_id = office.accept()
        (claim,) = office.claim(queue_id)
        due = state in (State.QUEUED, State.SENDING, State.DEFERRED, State.BOUNCED, State.EXPIRED)
        office.change(
            f"""UPDATE deliveries SET state = :state, worker = @id(:worker), claim_count = 2,
            due_at = {"@now" if due else "NULL"} WHERE queue_id = @id(:id)""",
            state=state, worker=another if state is State.SENDING else None, id=queue_id,
        )  # fmt: skip
        assert office.record(claim, Outcome.DELIVERED) == CompletionResult(
            State.DELIVERED, body_deletable=True
        )
        row = office.delivery(queue_id)
        assert (row["state"], row["due_at"], row["worker"]) == ("delivered", None, None)
        assert row["finished_at"] is not None
        assert office.attempts(queue_id) == [(1, 1, "delivered")]


def test_a_k_is_never_undone(office: Office) -> None:
    queue_id = office.accept()
    (first,) = office.claim(queue_id)
    office.pass_time(100)
    assert office.expire_worker(office.worker) == 1
    office.pass_time(100)
    office.sweeps.requeue_due(10)
    other = office.hire()
    (second,) = office.claim(queue_id, worker=other)
    assert second.claim == 2
    assert office.record(first, Outcome.DELIVERED).state is State.DELIVERED
    for outcome in NOT_K:
        assert office.record(second, outcome, worker=other) == CompletionResult(
            State.DELIVERED, body_deletable=True
        )
        assert office.state(queue_id) == "delivered"
    assert office.claim(queue_id) == []
    assert office.attempts(queue_id)[0] == (1, 0, "uncertain")


def test_a_late_k_for_what_was_split_since_holds_for_all_its_recipients(office: Office) -> None:
    queue_id, other = (
        office.accept("x@example.org", "y@example.org", "z@example.org"),
        office.hire(),
    )
    (first,) = office.claim(queue_id)
    office.change("UPDATE deliveries SET state = 'queued', worker = NULL")
    (second,) = office.claim(queue_id, worker=other)
    assert (
        office.record(second, Outcome.REJECTED, worker=other, state=State.SPLIT).state
        is State.SPLIT
    )
    (half,) = (
        claim for claim in office.claim(queue_id, worker=other) if len(claim.recipients) == 2
    )
    assert (
        office.record(half, Outcome.REJECTED, worker=other, state=State.SPLIT).state is State.SPLIT
    )
    (kept,) = office.claim(queue_id, room={"default": 1})
    assert office.record(first, Outcome.DELIVERED).state is State.DELIVERED
    assert sorted(row["state"] for row in office.rows("SELECT state FROM deliveries")) == [
        "delivered"
    ] * 4 + ["split"]
    assert office.claim(queue_id) == [], "never after a K"
    assert office.record(kept, Outcome.REJECTED).state is State.DELIVERED


def test_who_lost_the_claim_changes_nothing(office: Office) -> None:
    other = office.hire()
    for outcome in NOT_K:
        queue_id = office.accept()
        (old,) = office.claim(queue_id)
        office.record(old, Outcome.INTERRUPTED, state=State.QUEUED, tries=[])
        (new,) = office.claim(queue_id, worker=other)
        (before,) = office.rows("SELECT * FROM deliveries WHERE queue_id = @id(:id)", id=queue_id)
        assert office.record(old, outcome) == CompletionResult(None, body_deletable=False), (
            "fenced by the claim"
        )
        assert office.record(new, outcome) == CompletionResult(
            State.SENDING, body_deletable=False
        ), "fenced by the worker"
        assert office.rows("SELECT * FROM deliveries WHERE queue_id = @id(:id)", id=queue_id) == [
            before
        ]
        assert [attempt[2] for attempt in office.attempts(queue_id)] == [outcome, outcome], (
            "what happened is kept"
        )


def test_one_record_says_it_all_and_twice_is_once(office: Office) -> None:
    queue_id = office.accept()
    note = office.note(office.claim(queue_id)[0], Outcome.DEFERRED)
    (first,) = office.ledger.commit([note])
    row = dict(office.delivery(queue_id))
    (again,) = office.ledger.commit([note])
    assert first == again == CompletionResult(State.DEFERRED, body_deletable=False)
    assert dict(office.delivery(queue_id))["due_at"] == row["due_at"]
    assert office.attempts(queue_id) == [(1, 1, "deferred")]


def test_the_body_is_free_when_the_last_delivery_is_done(office: Office) -> None:
    queue_id = office.accept("x@example.org", "bulk:y@example.org", "slow:z@example.org")
    room = {"default": 9, "bulk": 9, "slow": 9}
    first, second, third = sorted(office.claim(queue_id, room=room), key=lambda claim: claim.number)
    assert not office.record(first, Outcome.DELIVERED).body_deletable
    assert not office.record(second, Outcome.REJECTED).body_deletable
    assert not office.record(third, Outcome.DEFERRED).body_deletable
    office.pass_time(60)
    office.sweeps.requeue_due(10)
    (again,) = office.claim(queue_id, room=room)
    assert not office.record(again, Outcome.DELIVERED).body_deletable, (
        "a notice is owed for the second"
    )
    office.change("UPDATE deliveries SET due_at = NULL WHERE number = 2")
    assert office.record(again, Outcome.DELIVERED).body_deletable


def test_last_deliveries_recorded_in_one_round_free_the_body(office: Office) -> None:
    queue_id = office.accept("x@example.org", "bulk:y@example.org")
    claims = office.claim(queue_id, room={"default": 9, "bulk": 9})
    results = office.ledger.commit([office.note(claim, Outcome.DELIVERED) for claim in claims])
    assert results == [CompletionResult(State.DELIVERED, body_deletable=True)] * 2


def test_no_record_makes_a_state_that_sending_does_not_lead_to(office: Office) -> None:
    queue_id = office.accept()
    (claim,) = office.claim(queue_id)
    for state in set(State) - successors(State.SENDING):
        with pytest.raises(ValueError, match="sending"):
            office.record(claim, Outcome.DEFERRED, state=state)
    with pytest.raises(ValueError, match="delivered"):
        office.record(claim, Outcome.DEFERRED, state=State.DELIVERED)
    assert office.state(queue_id) == "sending"


def test_only_queued_is_claimed_and_only_deferred_wakes_up(office: Office) -> None:
    for state in State:
        queue_id = office.accept()
        worker = "(SELECT id FROM workers)" if state is State.SENDING else "NULL"
        office.change(
            f"UPDATE deliveries SET state = :state, due_at = @ago(1), worker = {worker} WHERE queue_id = @id(:id)",
            state=state, id=queue_id,
        )  # fmt: skip
        assert office.sweeps.requeue_due(10) == [queue_id] * (state is State.DEFERRED)
        office.pass_time(10)
        assert len(office.claim() + office.claim(queue_id)) == (
            state in (State.QUEUED, State.DEFERRED)
        )


# --- leases
# -----------------------------------------------------------------------------------------------


def test_a_lease_is_renewed_while_its_worker_is_not_declared_dead(office: Office) -> None:
    office.pass_time(100)
    assert [worker for worker, _ in office.sweeps.expired_leases()] == [office.worker]
    assert office.renew(), "late, but no sweeper has expired it"
    assert office.sweeps.expired_leases() == []
    office.pass_time(100)
    office.expire_worker(office.worker)
    assert not office.renew()
    assert not office.renew("0" * 32)


def test_a_worker_with_something_in_flight_is_not_signed_off(office: Office) -> None:
    (claim,) = office.claim(office.accept())
    office.ledger.retire(office.worker)
    assert office.renew()
    office.record(claim, Outcome.DELIVERED)
    office.ledger.retire(office.worker)
    assert not office.renew()
    assert office.rows("SELECT end_reason FROM workers") == [{"end_reason": "stopped"}]


def test_a_worker_may_be_registered_twice(office: Office) -> None:
    office.ledger.register(office.worker, "host", 1)
    assert len(office.rows("SELECT id FROM workers")) == 1


def test_a_burial_and_a_renewal_with_outcomes_do_not_deadlock(postgres_office: Office) -> None:
    """Both want the worker's row and its deliveries; the second waits, and is told what
    it lost."""
    office = postgres_office
    claims = office.claim(*(office.accept() for _ in range(3)))
    office.pass_time(100)
    lease = dict(office.sweeps.expired_leases())[office.worker]
    reached, go_on = threading.Event(), threading.Event()

    def pause(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE workers SET lease_expires_at") and not reached.is_set():
            reached.set()
            assert go_on.wait(20)

    def expire_worker() -> int | None:
        try:
            return office.sweeps.expire_worker(office.worker, lease)
        finally:
            go_on.set()

    def someone_waits() -> bool:
        return go_on.is_set() or bool(
            office.rows("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        )

    event.listen(office.engine, "before_cursor_execute", pause)
    notes = [office.note(claim, Outcome.DEFERRED) for claim in claims]
    with ThreadPoolExecutor(2) as pool:
        outcome = pool.submit(office.ledger.commit, [*notes, Renewal(office.worker)])
        assert reached.wait(20)
        expiry = pool.submit(expire_worker)
        until(someone_waits)
        go_on.set()
        assert outcome.result(20)[-1] is False
        assert expiry.result(20) == 3
    assert {office.delivery(c.queue_id)["last_outcome"] for c in claims} == {"uncertain"}


# --- COMMIT in doubt
# --------------------------------------------------------------------------------------


class Lost(Exception):
    """Stands for a connection that broke when COMMIT had been sent."""


@contextmanager
def lost_commit(ledger: WorkerQueue, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The next commit of this ledger is done, and its worker never learns that."""
    from relay.db.engine import writing
    from relay.queue import claim as claims

    @contextmanager
    def doubtful(engine: Any) -> Iterator[Any]:
        with writing(engine) as connection:
            yield connection
        raise OperationalError("COMMIT", {}, Lost())

    with monkeypatch.context() as patch:
        patch.setattr(claims, "writing", doubtful)
        with pytest.raises(OperationalError):
            yield


def test_claims_that_nobody_heard_of_are_handed_back(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [office.accept() for _ in range(6)]
    (known,) = office.claim(ids[0])
    theirs = office.another_ledger()
    other = office.hire()
    (foreign,) = office.claim(ids[1], worker=other, ledger=theirs)
    with lost_commit(office.ledger, monkeypatch):
        office.claim(*ids[2:4])
    assert office.states(ids) == ["sending"] * 4 + ["queued"] * 2
    office.renew()
    assert office.states(ids) == ["sending"] * 2 + ["queued"] * 4, (
        "what it knows of, and what is others', stays"
    )
    assert office.delivery(ids[2])["due_in"] <= 0, "anybody may take it at once"
    assert {claim.queue_id for claim in office.claim(*ids)} == set(ids[2:])
    assert office.record(known, Outcome.DELIVERED).state is State.DELIVERED
    assert (
        office.record(foreign, Outcome.DELIVERED, worker=other, ledger=theirs).state
        is State.DELIVERED
    )


def test_a_round_in_doubt_that_let_go_of_a_delivery_and_took_it_again(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_id = office.accept()
    (claim,) = office.claim(queue_id)
    round_: Sequence[Command] = [
        office.note(claim, Outcome.INTERRUPTED, state=State.QUEUED),
        ClaimRequest(office.worker, [queue_id], PLENTY),
    ]
    with lost_commit(office.ledger, monkeypatch):
        office.ledger.commit(round_)
    recorded, claims = office.ledger.commit(round_)
    assert recorded == CompletionResult(None, body_deletable=False), "a later claim has had it"
    assert isinstance(claims, list)
    assert [c.claim for c in claims] == [3], "the second claim was handed back, not forgotten"
    assert office.record(claims[0], Outcome.DELIVERED).state is State.DELIVERED


def test_outcomes_in_doubt_are_recorded_once(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = office.claim(*(office.accept() for _ in range(3)))
    notes: list[Command] = [office.note(claim, o) for claim, o in zip(claims, NOT_K, strict=False)]
    with lost_commit(office.ledger, monkeypatch):
        office.ledger.commit(notes)
    results = office.ledger.commit(notes)
    assert [r.state for r in results if isinstance(r, CompletionResult)] == [
        OUTCOME_POLICY[o] for o in NOT_K[:3]
    ]
    assert office.rows("SELECT count(*) AS n FROM attempts") == [{"n": 3}]


# --- everybody at once
# ------------------------------------------------------------------------------------


def test_three_hundred_rounds_from_four_threads_never_deadlock(postgres_office: Office) -> None:
    """Claims, outcomes, late outcomes of others, sweeps and burials over the same few rows."""
    office = postgres_office
    ids = [office.accept("x@example.org", "bulk:y@example.org") for _ in range(12)]
    room = {"default": 6, "bulk": 6}

    def work(n: int) -> int:
        ledger, worker = office.another_ledger(), office.hire()
        mine: list[Claim] = []
        for turn in range(75):
            hints = ids[turn % 7 :: 1 + n % 2][:: -1 if n % 2 else 1]
            notes: list[Completion] = [
                office.note(
                    claim, Outcome.INTERRUPTED, worker=worker, state=State.QUEUED, delay=0.0
                )
                for claim in (reversed(mine) if turn % 2 else mine)
            ]
            results = ledger.commit(
                [
                    *notes,
                    ClaimRequest(worker, hints, room),
                    Renewal(worker),
                    ClaimRequest(worker, None, room),
                ]
            )
            mine = [claim for result in results if isinstance(result, list) for claim in result]
            if turn % 5 == 0:
                office.change("UPDATE deliveries SET state = 'deferred', due_at = @now WHERE state = 'queued'"
                              " AND queue_id = @id(:id)", id=ids[turn % len(ids)])  # fmt: skip
                office.sweeps.requeue_due(3)
                office.sweeps.expire_stuck_transfers()
                office.sweeps.rescue_unowned()
        return len(mine)

    at_once(work)
    (found,) = office.rows(
        "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )
    assert found["deadlocks"] == 0


def test_who_ends_the_last_two_deliveries_at_the_same_moment_sees_that_nobody_needs_the_body(
    postgres_office: Office,
) -> None:
    office, other = postgres_office, postgres_office.another_ledger()
    queue_id = office.accept("x@example.org", "bulk:y@example.org")
    first, second = sorted(
        office.claim(queue_id, room={"default": 1, "bulk": 1}), key=lambda claim: claim.number
    )
    met: list[CompletionResult] = []

    def meanwhile(_: Connection) -> None:
        if not met:
            met.append(CompletionResult(None, body_deletable=False))
            met[0] = office.record(second, Outcome.DELIVERED, ledger=other)

    event.listen(office.engine, "commit", meanwhile)  # just before the COMMIT of the first
    assert office.record(first, Outcome.DELIVERED) == CompletionResult(
        State.DELIVERED, body_deletable=True
    )
    assert met == [CompletionResult(State.DELIVERED, body_deletable=False)]


def test_a_delivery_whose_recipients_are_gone_harms_no_other(office: Office) -> None:
    broken, sound = office.accept(), office.accept()
    office.change("DELETE FROM recipients WHERE queue_id = @id(:id)", id=broken)
    found = {claim.queue_id: claim.recipients for claim in office.claim(broken, sound)}
    assert found == {broken: (), sound: ("b@example.org",)}


@pytest.mark.parametrize("late_first", [True, False])
def test_a_late_K_beats_what_the_next_claim_came_to_in_the_same_round(
    office: Office, late_first: bool
) -> None:
    queue_id = office.accept()
    (lost,) = office.claim(queue_id)
    office.change("UPDATE deliveries SET due_at = @ago(1)")
    assert office.sweeps.expire_stuck_transfers() == 1
    office.pass_time(100)
    office.sweeps.requeue_due(10)
    (again,) = office.claim(queue_id)
    records = [office.note(lost, Outcome.DELIVERED), office.note(again, Outcome.REJECTED)]
    results = office.ledger.commit(records if late_first else records[::-1])
    assert office.state(queue_id) == "delivered"
    assert {
        (result.state, result.body_deletable)
        for result in results
        if isinstance(result, CompletionResult)
    } == {(State.DELIVERED, True)}
    assert [row[0] for row in office.attempts(queue_id)] == [1, 1, 2]
