"""Claims and completions on both databases: one owner at a time, a K beats every state, and a stale
completion changes nothing."""

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
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
from relay.queue.outcome import Outcome
from relay.queue.states import State, successors
from tests.integration.harness import OUTCOME_POLICY, PLENTY, QueueHarness, opened
from tests.waiting import until

NOT_K = [outcome for outcome in Outcome if outcome is not Outcome.DELIVERED]
FINISHED = ("delivered", "bounced", "expired", "dropped")


def at_once[T](work: Callable[[int], T], count: int = 4) -> list[T]:
    """The results of `work` in so many threads that begin together."""
    barrier = threading.Barrier(count)

    def begin(n: int) -> T:
        barrier.wait(10)
        return work(n)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


# --- claiming
# ---------------------------------------------------------------------------------------------


def test_a_claim_brings_the_envelope_and_belongs_to_one_worker(queue: QueueHarness) -> None:
    recipients = [f"{name}@example.org" for name in ("zoe", "adam", "mia", "bob", "lea")]
    queue_id = queue.accept(*recipients, sender="sender@example.com")
    (claim,) = queue.claim(queue_id)
    assert (claim.queue_id, claim.number, claim.claim, claim.route) == (queue_id, 1, 1, "default")
    assert (claim.sender, claim.size, claim.crash_count, claim.deferrals) == (
        "sender@example.com",
        100,
        0,
        0,
    )
    assert claim.recipients == tuple(recipients), "in the order of RCPT"
    assert 0 <= claim.received_ago < 60
    row = queue.delivery(queue_id)
    assert (row["state"], str(row["worker"]).replace("-", ""), row["claim_count"]) == (
        "sending",
        queue.worker,
        1,
    )
    far = 2 * (queue.settings.session_timeout + queue.settings.lease)
    assert row["due_in"] == pytest.approx(far, abs=30), (
        "only a stuck transfer is read while it is being sent"
    )
    assert queue.claim(queue_id) == [] == queue.claim(queue_id, worker=queue.register_worker())


def test_the_null_sender_and_unknown_or_finished_ids(queue: QueueHarness) -> None:
    bounce, done = queue.accept(sender=""), queue.accept()
    (claim,) = queue.claim(done)
    queue.complete(claim, Outcome.DELIVERED)
    assert [c.sender for c in queue.claim(bounce, done, "0" * 32, bounce)] == [""]


def test_claims_are_numbered(queue: QueueHarness) -> None:
    queue_id = queue.accept()
    for number in (1, 2, 3):
        (claim,) = queue.claim(queue_id)
        assert claim.claim == number
        assert queue.complete(claim, Outcome.INTERRUPTED, state=State.QUEUED).state is State.QUEUED
    assert [claim for claim, _, _ in queue.numbered_attempts(queue_id)] == [1, 2, 3]


def test_capacity_is_per_route(queue: QueueHarness) -> None:
    ids = [
        queue.accept("bulk:x@example.org", "y@example.org", "bulk:z@example.org") for _ in range(5)
    ]
    claims = queue.claim(*ids, capacity={"bulk": 3, "default": 2, "full": 0, "other": 9})
    assert Counter(claim.route for claim in claims) == {"bulk": 3, "default": 2}
    assert {claim.recipients for claim in claims} == {
        ("x@example.org", "z@example.org"),
        ("y@example.org",),
    }
    assert queue.claim(*ids, capacity={}) == []
    assert len(queue.claim(*ids, capacity={"bulk": 99, "default": 99})) == 5


def test_overdue_means_a_lost_hint_and_the_longest_due_come_first(queue: QueueHarness) -> None:
    ids = [queue.accept() for _ in range(4)]
    assert queue.claim() == [], "their hints may still come"
    for n, queue_id in enumerate(ids):
        queue.pass_time(10 + n, only=[queue_id])
    assert {claim.queue_id for claim in queue.claim(capacity={"default": 2})} == {ids[3], ids[2]}
    assert {claim.queue_id for claim in queue.claim()} == {ids[1], ids[0]}


def test_everything_is_claimed_once_by_concurrent_workers(queue: QueueHarness) -> None:
    ids = [queue.accept("x@example.org", "bulk:y@example.org") for _ in range(40)]
    queue.pass_time(10, only=ids[::2])
    capacity = {"default": 7, "bulk": 3}

    def work(_: int) -> list[Claim]:
        worker_queue, worker = queue.another_worker_queue(), queue.register_worker()
        claims: list[Claim] = []
        while True:
            round_: list[CommandResult] = worker_queue.commit(
                [ClaimRequest(worker, ids, capacity), ClaimRequest(worker, None, capacity)]
            )
            new = [claim for result in round_ if isinstance(result, list) for claim in result]
            if not new and not queue.rows("SELECT 1 FROM deliveries WHERE state = 'queued'"):
                return claims
            claims += new

    claimed = [(c.queue_id, c.number, c.claim) for claims in at_once(work) for c in claims]
    assert sorted(claimed) == sorted((queue_id, number, 1) for queue_id in ids for number in (1, 2))


# --- recording
# --------------------------------------------------------------------------------------------


def test_every_outcome_is_recorded(queue: QueueHarness) -> None:
    for outcome in Outcome:
        queue_id, state = queue.accept(), OUTCOME_POLICY[outcome]
        recorded = queue.complete(queue.claim(queue_id)[0], outcome, deferrals=3)
        assert recorded == CompletionResult(state, body_deletable=state is State.DELIVERED)
        row = queue.delivery(queue_id)
        assert (row["state"], row["worker"], row["pending_operation"], row["deferrals"]) == (
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
        (attempt,) = queue.rows(sql, id=queue_id)
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


def test_a_dsn_is_pending_for_a_real_sender_only(clean_url: str) -> None:
    for bounces, sender, owed in (
        ("dsn", "a@example.com", True),
        ("dsn", "", False),
        ("dsn", "#@[]", False),
        ("off", "a@example.com", False),
    ):
        with opened(clean_url, bounces=bounces) as queue:
            queue_id = queue.accept(sender=sender)
            recorded = queue.complete(queue.claim(queue_id)[0], Outcome.REJECTED)
            assert recorded == CompletionResult(State.BOUNCED, body_deletable=not owed), (
                "a DSN returns the header"
            )
            assert (queue.delivery(queue_id)["due_in"] is not None) == owed


def test_expiry_is_decided_only_when_a_try_has_failed(queue: QueueHarness) -> None:
    waiting, failed, taken, stopped, split = (queue.accept() for _ in range(5))
    queue.pass_time(2000)
    assert queue.state(waiting) == "queued", "a host that was off for days still tries"
    claims = {claim.queue_id: claim for claim in queue.claim()}
    assert len(claims) == 5
    assert queue.complete(claims[failed], Outcome.DEFERRED).state is State.EXPIRED
    assert queue.delivery(failed)["due_in"] is not None, "a DSN is pending"
    assert queue.complete(claims[taken], Outcome.DELIVERED).state is State.DELIVERED
    assert (
        queue.complete(claims[stopped], Outcome.INTERRUPTED, state=State.QUEUED).state
        is State.QUEUED
    )
    assert queue.complete(claims[split], Outcome.UNSENDABLE).state is State.HELD


def test_every_outcome_but_k_applies_a_pending_operation(queue: QueueHarness) -> None:
    verbs = {
        "hold": State.HELD,
        "drop": State.DROPPED,
        "bounce": State.BOUNCED,
        "retry": State.QUEUED,
    }
    for (wanted, state), outcome in itertools.product(verbs.items(), Outcome):
        queue_id = queue.accept()
        (claim,) = queue.claim(queue_id)
        queue.request_operation(queue_id, wanted)
        expected = State.DELIVERED if outcome is Outcome.DELIVERED else state
        assert queue.complete(claim, outcome).state is expected
        row = queue.delivery(queue_id)
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


def test_no_message_is_read_for_a_delivery_without_a_dsn(queue: QueueHarness) -> None:
    """A completion reads the row of the message only for the sender of a DSN."""
    (one,), (two,) = (
        queue.claim(queue.accept()),
        queue.claim(queue.accept(), worker=(lost := queue.register_worker())),
    )
    queue.change("DELETE FROM messages")
    assert queue.complete(one, Outcome.DELIVERED).state is State.DELIVERED
    queue.pass_time(400)
    assert queue.expire_worker(lost) == 1
    assert queue.state(two.queue_id) == "deferred"


def test_a_pending_operation_ends_with_its_claim(queue: QueueHarness) -> None:
    queue_id = queue.accept()
    queue.request_operation(queue_id, "drop")
    assert queue.complete(queue.claim(queue_id)[0], Outcome.DEFERRED).state is State.DEFERRED


def test_a_late_k_beats_every_state(queue: QueueHarness) -> None:
    another = dashed(queue.register_worker())
    for state in set(State) - {State.DELIVERED}:
        queue_id = queue.accept()
        (claim,) = queue.claim(queue_id)
        due = state in (State.QUEUED, State.SENDING, State.DEFERRED, State.BOUNCED, State.EXPIRED)
        queue.change(
            f"""UPDATE deliveries SET state = :state, worker = @id(:worker), claim_count = 2,
            due_at = {"@now" if due else "NULL"} WHERE queue_id = @id(:id)""",
            state=state,
            worker=another if state is State.SENDING else None,
            id=queue_id,
        )
        assert queue.complete(claim, Outcome.DELIVERED) == CompletionResult(
            State.DELIVERED, body_deletable=True
        )
        row = queue.delivery(queue_id)
        assert (row["state"], row["due_at"], row["worker"]) == ("delivered", None, None)
        assert row["finished_at"] is not None
        assert queue.numbered_attempts(queue_id) == [(1, 1, "delivered")]


def test_a_k_is_never_undone(queue: QueueHarness) -> None:
    queue_id = queue.accept()
    (first,) = queue.claim(queue_id)
    queue.pass_time(100)
    assert queue.expire_worker(queue.worker) == 1
    queue.pass_time(100)
    queue.rescuer.requeue_due(10)
    other = queue.register_worker()
    (second,) = queue.claim(queue_id, worker=other)
    assert second.claim == 2
    assert queue.complete(first, Outcome.DELIVERED).state is State.DELIVERED
    for outcome in NOT_K:
        assert queue.complete(second, outcome, worker=other) == CompletionResult(
            State.DELIVERED, body_deletable=True
        )
        assert queue.state(queue_id) == "delivered"
    assert queue.claim(queue_id) == []
    assert queue.numbered_attempts(queue_id)[0] == (1, 0, "uncertain")


def test_a_late_k_of_a_split_delivery_counts_for_all_its_recipients(
    queue: QueueHarness,
) -> None:
    queue_id, other = (
        queue.accept("x@example.org", "y@example.org", "z@example.org"),
        queue.register_worker(),
    )
    (first,) = queue.claim(queue_id)
    queue.change("UPDATE deliveries SET state = 'queued', worker = NULL")
    (second,) = queue.claim(queue_id, worker=other)
    assert (
        queue.complete(second, Outcome.REJECTED, worker=other, state=State.SPLIT).state
        is State.SPLIT
    )
    (half,) = (claim for claim in queue.claim(queue_id, worker=other) if len(claim.recipients) == 2)
    assert (
        queue.complete(half, Outcome.REJECTED, worker=other, state=State.SPLIT).state is State.SPLIT
    )
    (kept,) = queue.claim(queue_id, capacity={"default": 1})
    assert queue.complete(first, Outcome.DELIVERED).state is State.DELIVERED
    assert sorted(row["state"] for row in queue.rows("SELECT state FROM deliveries")) == [
        "delivered"
    ] * 4 + ["split"]
    assert queue.claim(queue_id) == [], "never after a K"
    assert queue.complete(kept, Outcome.REJECTED).state is State.DELIVERED


def test_a_completion_without_the_claim_changes_nothing(queue: QueueHarness) -> None:
    other = queue.register_worker()
    for outcome in NOT_K:
        queue_id = queue.accept()
        (old,) = queue.claim(queue_id)
        queue.complete(old, Outcome.INTERRUPTED, state=State.QUEUED, attempts=[])
        (new,) = queue.claim(queue_id, worker=other)
        (before,) = queue.rows("SELECT * FROM deliveries WHERE queue_id = @id(:id)", id=queue_id)
        assert queue.complete(old, outcome) == CompletionResult(None, body_deletable=False), (
            "fenced by the claim"
        )
        assert queue.complete(new, outcome) == CompletionResult(
            State.SENDING, body_deletable=False
        ), "fenced by the worker"
        assert queue.rows("SELECT * FROM deliveries WHERE queue_id = @id(:id)", id=queue_id) == [
            before
        ]
        assert [attempt[2] for attempt in queue.numbered_attempts(queue_id)] == [
            outcome,
            outcome,
        ], "what happened is kept"


def test_a_completion_that_is_committed_twice_counts_once(queue: QueueHarness) -> None:
    queue_id = queue.accept()
    note = queue.completion(queue.claim(queue_id)[0], Outcome.DEFERRED)
    (first,) = queue.worker_queue.commit([note])
    row = dict(queue.delivery(queue_id))
    (again,) = queue.worker_queue.commit([note])
    assert first == again == CompletionResult(State.DEFERRED, body_deletable=False)
    assert dict(queue.delivery(queue_id))["due_at"] == row["due_at"]
    assert queue.numbered_attempts(queue_id) == [(1, 1, "deferred")]


def test_the_body_is_deletable_when_the_last_delivery_ends(queue: QueueHarness) -> None:
    queue_id = queue.accept("x@example.org", "bulk:y@example.org", "slow:z@example.org")
    capacity = {"default": 9, "bulk": 9, "slow": 9}
    first, second, third = sorted(
        queue.claim(queue_id, capacity=capacity), key=lambda claim: claim.number
    )
    assert not queue.complete(first, Outcome.DELIVERED).body_deletable
    assert not queue.complete(second, Outcome.REJECTED).body_deletable
    assert not queue.complete(third, Outcome.DEFERRED).body_deletable
    queue.pass_time(60)
    queue.rescuer.requeue_due(10)
    (again,) = queue.claim(queue_id, capacity=capacity)
    assert not queue.complete(again, Outcome.DELIVERED).body_deletable, (
        "a DSN is pending for the second"
    )
    queue.change("UPDATE deliveries SET due_at = NULL WHERE number = 2")
    assert queue.complete(again, Outcome.DELIVERED).body_deletable


def test_the_body_is_deletable_when_one_commit_records_its_last_deliveries(
    queue: QueueHarness,
) -> None:
    queue_id = queue.accept("x@example.org", "bulk:y@example.org")
    claims = queue.claim(queue_id, capacity={"default": 9, "bulk": 9})
    results = queue.worker_queue.commit(
        [queue.completion(claim, Outcome.DELIVERED) for claim in claims]
    )
    assert results == [CompletionResult(State.DELIVERED, body_deletable=True)] * 2


def test_no_record_makes_a_state_that_sending_does_not_lead_to(queue: QueueHarness) -> None:
    queue_id = queue.accept()
    (claim,) = queue.claim(queue_id)
    for state in set(State) - successors(State.SENDING):
        with pytest.raises(ValueError, match="sending"):
            queue.complete(claim, Outcome.DEFERRED, state=state)
    with pytest.raises(ValueError, match="delivered"):
        queue.complete(claim, Outcome.DEFERRED, state=State.DELIVERED)
    assert queue.state(queue_id) == "sending"


def test_only_queued_is_claimed_and_only_deferred_wakes_up(queue: QueueHarness) -> None:
    for state in State:
        queue_id = queue.accept()
        worker = "(SELECT id FROM workers)" if state is State.SENDING else "NULL"
        queue.change(
            f"UPDATE deliveries SET state = :state, due_at = @ago(1), worker = {worker} WHERE"
            " queue_id = @id(:id)",
            state=state,
            id=queue_id,
        )
        due = {"default": [queue_id]} if state is State.DEFERRED else {}
        assert queue.rescuer.requeue_due(10) == due
        queue.pass_time(10)
        assert len(queue.claim() + queue.claim(queue_id)) == (
            state in (State.QUEUED, State.DEFERRED)
        )


# --- leases
# -----------------------------------------------------------------------------------------------


def test_a_lease_is_renewed_while_its_worker_is_not_declared_dead(queue: QueueHarness) -> None:
    queue.pass_time(100)
    assert [worker for worker, _ in queue.rescuer.expired_leases()] == [queue.worker]
    assert queue.renew(), "late, but no sweeper has expired it"
    assert queue.rescuer.expired_leases() == []
    queue.pass_time(100)
    queue.expire_worker(queue.worker)
    assert not queue.renew()
    assert not queue.renew("0" * 32)


def test_a_worker_with_open_transfers_is_not_retired(queue: QueueHarness) -> None:
    (claim,) = queue.claim(queue.accept())
    queue.worker_queue.retire(queue.worker)
    assert queue.renew()
    queue.complete(claim, Outcome.DELIVERED)
    queue.worker_queue.retire(queue.worker)
    assert not queue.renew()
    assert queue.rows("SELECT end_reason FROM workers") == [{"end_reason": "stopped"}]


def test_a_worker_may_be_registered_twice(queue: QueueHarness) -> None:
    queue.worker_queue.register(queue.worker, "host", 1)
    assert len(queue.rows("SELECT id FROM workers")) == 1


def test_an_expiry_and_a_renewal_with_outcomes_do_not_deadlock(
    postgres_queue: QueueHarness,
) -> None:
    """Both lock the worker's row and its deliveries. The second one waits, and then sees the
    changes of the first."""
    queue = postgres_queue
    claims = queue.claim(*(queue.accept() for _ in range(3)))
    queue.pass_time(100)
    lease = dict(queue.rescuer.expired_leases())[queue.worker]
    reached, go_on = threading.Event(), threading.Event()

    def pause(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "UPDATE workers SET lease_expires_at" in statement and not reached.is_set():
            reached.set()
            assert go_on.wait(20)

    def expire_worker() -> int | None:
        try:
            return queue.rescuer.expire_worker(queue.worker, lease)
        finally:
            go_on.set()

    def someone_waits() -> bool:
        return go_on.is_set() or bool(
            queue.rows("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        )

    event.listen(queue.database, "before_cursor_execute", pause)
    notes = [queue.completion(claim, Outcome.DEFERRED) for claim in claims]
    with ThreadPoolExecutor(2) as pool:
        outcome = pool.submit(queue.worker_queue.commit, [*notes, Renewal(queue.worker)])
        assert reached.wait(20)
        expiry = pool.submit(expire_worker)
        until(someone_waits)
        go_on.set()
        assert outcome.result(20)[-1] is False
        assert expiry.result(20) == 3
    assert {queue.delivery(c.queue_id)["last_outcome"] for c in claims} == {"uncertain"}


# --- COMMIT in doubt
# --------------------------------------------------------------------------------------


class Lost(Exception):
    """Stands for a connection that broke when COMMIT had been sent."""


@contextmanager
def lost_commit(worker_queue: WorkerQueue, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The next commit of this queue is done, and its worker never learns that."""
    from relay.db.engine import writing
    from relay.db.single import SingleTransactions
    from relay.queue import claim as claims

    @contextmanager
    def doubtful(transaction: Any, of: Any) -> Iterator[Any]:
        with transaction(of) as connection:
            yield connection
        raise OperationalError("COMMIT", {}, Lost())

    run = SingleTransactions.run

    def doubtful_run(*arguments: Any) -> Any:
        run(*arguments)
        raise OperationalError("COMMIT", {}, Lost())

    with monkeypatch.context() as patch:
        patch.setattr(claims, "writing", partial(doubtful, writing))
        patch.setattr(SingleTransactions, "run", doubtful_run)
        with pytest.raises(OperationalError):
            yield


def test_claims_without_a_reply_are_requeued(
    queue: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [queue.accept() for _ in range(6)]
    (known,) = queue.claim(ids[0])
    theirs = queue.another_worker_queue()
    other = queue.register_worker()
    (foreign,) = queue.claim(ids[1], worker=other, worker_queue=theirs)
    with lost_commit(queue.worker_queue, monkeypatch):
        queue.claim(*ids[2:4])
    assert queue.states_of(ids) == ["sending"] * 4 + ["queued"] * 2
    queue.renew()
    assert queue.states_of(ids) == ["sending"] * 2 + ["queued"] * 4, (
        "what it knows of, and what is others', stays"
    )
    assert queue.delivery(ids[2])["due_in"] <= 0, "anybody may take it at once"
    assert {claim.queue_id for claim in queue.claim(*ids)} == set(ids[2:])
    assert queue.complete(known, Outcome.DELIVERED).state is State.DELIVERED
    assert (
        queue.complete(foreign, Outcome.DELIVERED, worker=other, worker_queue=theirs).state
        is State.DELIVERED
    )


def test_an_unknown_commit_that_requeued_and_claimed_a_delivery(
    queue: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_id = queue.accept()
    (claim,) = queue.claim(queue_id)
    round_: Sequence[Command] = [
        queue.completion(claim, Outcome.INTERRUPTED, state=State.QUEUED),
        ClaimRequest(queue.worker, [queue_id], PLENTY),
    ]
    with lost_commit(queue.worker_queue, monkeypatch):
        queue.worker_queue.commit(round_)
    recorded, claims = queue.worker_queue.commit(round_)
    assert recorded == CompletionResult(None, body_deletable=False), "a later claim has had it"
    assert isinstance(claims, list)
    assert [c.claim for c in claims] == [3], "the second claim was handed back, not forgotten"
    assert queue.complete(claims[0], Outcome.DELIVERED).state is State.DELIVERED


def test_completions_of_an_unknown_commit_are_recorded_once(
    queue: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = queue.claim(*(queue.accept() for _ in range(3)))
    notes: list[Command] = [
        queue.completion(claim, o) for claim, o in zip(claims, NOT_K, strict=False)
    ]
    with lost_commit(queue.worker_queue, monkeypatch):
        queue.worker_queue.commit(notes)
    results = queue.worker_queue.commit(notes)
    assert [r.state for r in results if isinstance(r, CompletionResult)] == [
        OUTCOME_POLICY[o] for o in NOT_K[:3]
    ]
    assert queue.rows("SELECT count(*) AS n FROM attempts") == [{"n": 3}]


# --- many at once
# ------------------------------------------------------------------------------------


def test_three_hundred_commits_from_four_threads_never_deadlock(
    postgres_queue: QueueHarness,
) -> None:
    """Claims, outcomes, late outcomes of others, sweeps and burials over the same few rows."""
    queue = postgres_queue
    ids = [queue.accept("x@example.org", "bulk:y@example.org") for _ in range(12)]
    capacity = {"default": 6, "bulk": 6}

    def work(n: int) -> int:
        worker_queue, worker = queue.another_worker_queue(), queue.register_worker()
        mine: list[Claim] = []
        for turn in range(75):
            hints = ids[turn % 7 :: 1 + n % 2][:: -1 if n % 2 else 1]
            notes: list[Completion] = [
                queue.completion(
                    claim, Outcome.INTERRUPTED, worker=worker, state=State.QUEUED, delay=0.0
                )
                for claim in (reversed(mine) if turn % 2 else mine)
            ]
            results = worker_queue.commit(
                [
                    *notes,
                    ClaimRequest(worker, hints, capacity),
                    Renewal(worker),
                    ClaimRequest(worker, None, capacity),
                ]
            )
            mine = [claim for result in results if isinstance(result, list) for claim in result]
            if turn % 5 == 0:
                queue.change(
                    "UPDATE deliveries SET state = 'deferred', due_at = @now WHERE state = 'queued'"
                    " AND queue_id = @id(:id)",
                    id=ids[turn % len(ids)],
                )
                queue.rescuer.requeue_due(3)
                queue.rescuer.expire_stuck_transfers()
                queue.rescuer.rescue_unowned()
        return len(mine)

    at_once(work)
    (found,) = queue.rows(
        "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )
    assert found["deadlocks"] == 0


def test_body_is_deletable_when_the_last_two_deliveries_finish_at_once(
    postgres_queue: QueueHarness,
) -> None:
    queue, other = postgres_queue, postgres_queue.another_worker_queue()
    queue_id = queue.accept("x@example.org", "bulk:y@example.org")
    first, second = sorted(
        queue.claim(queue_id, capacity={"default": 1, "bulk": 1}), key=lambda claim: claim.number
    )
    met: list[CompletionResult] = []

    def meanwhile(_: Connection) -> None:
        if not met:
            met.append(CompletionResult(None, body_deletable=False))
            met[0] = queue.complete(second, Outcome.DELIVERED, worker_queue=other)

    event.listen(queue.database, "commit", meanwhile)  # just before the COMMIT of the first
    assert queue.complete(first, Outcome.DELIVERED) == CompletionResult(
        State.DELIVERED, body_deletable=True
    )
    assert met == [CompletionResult(State.DELIVERED, body_deletable=False)]


def test_a_delivery_whose_recipients_are_gone_harms_no_other(queue: QueueHarness) -> None:
    broken, sound = queue.accept(), queue.accept()
    queue.change("DELETE FROM recipients WHERE queue_id = @id(:id)", id=broken)
    found = {claim.queue_id: claim.recipients for claim in queue.claim(broken, sound)}
    assert found == {broken: (), sound: ("b@example.org",)}


@pytest.mark.parametrize("late_first", [True, False])
def test_a_late_K_beats_the_next_claim_in_the_same_batch(
    queue: QueueHarness, late_first: bool
) -> None:
    queue_id = queue.accept()
    (lost,) = queue.claim(queue_id)
    queue.change("UPDATE deliveries SET due_at = @ago(1)")
    assert queue.rescuer.expire_stuck_transfers() == 1
    queue.pass_time(100)
    queue.rescuer.requeue_due(10)
    (again,) = queue.claim(queue_id)
    records = [queue.completion(lost, Outcome.DELIVERED), queue.completion(again, Outcome.REJECTED)]
    results = queue.worker_queue.commit(records if late_first else records[::-1])
    assert queue.state(queue_id) == "delivered"
    assert {
        (result.state, result.body_deletable)
        for result in results
        if isinstance(result, CompletionResult)
    } == {(State.DELIVERED, True)}
    assert [row[0] for row in queue.numbered_attempts(queue_id)] == [1, 1, 2]
