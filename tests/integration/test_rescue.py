"""The rescuer on both databases: due deliveries are requeued, the leases of lost workers expire,
and the deliveries of these workers become uncertain."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from relay.dsn.generator import DsnGenerator
from relay.queue.model import Claim
from relay.queue.outcome import Outcome
from relay.queue.states import State
from relay.spool.store import Spool
from tests.integration.harness import QueueHarness, opened


def deferred(queue: QueueHarness, count: int) -> list[str]:
    """So many deferred deliveries, each due a minute after the one before it, the last in half a
    minute."""
    ids = [queue.accept() for _ in range(count)]
    for claim in queue.claim(*ids):
        queue.complete(claim, Outcome.DEFERRED, deferrals=2)
    for n, queue_id in enumerate(ids):
        queue.pass_time(60 * (count - n - 1), only=[queue_id])
    return ids


def lose_worker(queue: QueueHarness, worker: str = "") -> int | None:
    """Let a worker's lease run out, and expire it."""
    queue.pass_time(queue.settings.lease + 1)
    return queue.expire_worker(worker or queue.worker)


def test_deliveries_are_requeued_in_due_order(queue: QueueHarness) -> None:
    ids = deferred(queue, 5)
    assert set(queue.rescuer.requeue_due(2)["default"]) == set(ids[:2])
    assert queue.states_of(ids) == ["queued"] * 2 + ["deferred"] * 3
    assert set(queue.rescuer.requeue_due(10)["default"]) == set(ids[2:4]), "the last is not due yet"
    assert queue.rescuer.requeue_due(10) == {}
    row = queue.delivery(ids[0])
    assert row["due_in"] == pytest.approx(queue.settings.grace, abs=4), (
        "its hint has GRACE to arrive"
    )
    assert row["deferrals"] == 2


def test_deliveries_of_one_message_are_hinted_by_route(queue: QueueHarness) -> None:
    queue_id = queue.accept("x@example.org", "bulk:y@example.org")
    for claim in queue.claim(queue_id, capacity={"default": 1, "bulk": 1}):
        queue.complete(claim, Outcome.DEFERRED)
    queue.pass_time(60)
    assert queue.rescuer.requeue_due(10) == {"default": [queue_id], "bulk": [queue_id]}
    assert {queue.state(queue_id, 1), queue.state(queue_id, 2)} == {"queued"}


def test_two_sweepers_share_due_deliveries(queue: QueueHarness) -> None:
    ids = deferred(queue, 40)
    barrier = threading.Barrier(2)

    def sweep() -> list[str]:
        barrier.wait(10)
        woken: list[str] = []
        while queue.rows("SELECT 1 FROM deliveries WHERE state = 'deferred' AND due_at <= @now"):
            woken += queue.rescuer.requeue_due(3).get("default", [])
        return woken

    with ThreadPoolExecutor(2) as pool:
        sweepers = [pool.submit(sweep) for _ in range(2)]
        woken = [queue_id for sweeper in sweepers for queue_id in sweeper.result(30)]
    assert sorted(woken) == sorted(ids[:-1]), "each by one of them"


def test_a_living_worker_is_not_expired(queue: QueueHarness) -> None:
    (claim,) = queue.claim(queue.accept())
    assert queue.rescuer.expired_leases() == []
    queue.pass_time(61)
    ((worker, lease),) = queue.rescuer.expired_leases()
    assert worker == queue.worker
    queue.renew()
    assert queue.rescuer.expire_worker(worker, lease) is None, "it renewed since it was seen"
    assert queue.rescuer.expire_worker(worker, "never") is None
    assert queue.state(claim.queue_id) == "sending"


def test_deliveries_of_an_expired_worker_are_uncertain(queue: QueueHarness) -> None:
    kept = queue.register_worker()
    (theirs,) = queue.claim(queue.accept(), worker=kept)
    (claim,) = queue.claim(queue.accept())
    waiting = queue.accept()
    queue.pass_time(61)
    lease = dict(queue.rescuer.expired_leases())[queue.worker]
    queue.renew(kept)
    assert queue.rescuer.expire_worker(queue.worker, lease) == 1
    assert queue.rescuer.expire_worker(queue.worker, lease) is None, "once"
    row = queue.delivery(claim.queue_id)
    assert (row["state"], row["worker"], row["crash_count"], row["last_outcome"]) == (
        "deferred",
        None,
        1,
        "uncertain",
    )
    assert (
        queue.settings.uncertain_delay - 10 < row["due_in"] <= 1.5 * queue.settings.uncertain_delay
    )
    assert "expired" in row["last_reply"]
    assert queue.numbered_attempts(claim.queue_id) == [(1, 0, "uncertain")]
    assert queue.state(theirs.queue_id) == "sending"
    assert queue.state(waiting) == "queued"
    endings = {
        str(row["id"]).replace("-", ""): row["end_reason"]
        for row in queue.rows("SELECT id, end_reason FROM workers")
    }
    assert endings == {queue.worker: "expired", kept: None}


def test_deliveries_of_an_expired_worker_do_not_become_due_at_once(queue: QueueHarness) -> None:
    claims = queue.claim(*[queue.accept() for _ in range(20)])
    lose_worker(queue)
    assert len({queue.delivery(claim.queue_id)["due_at"] for claim in claims}) > 10


def test_no_connection_is_no_proof_that_a_message_is_harmless(queue: QueueHarness) -> None:
    queue_id = queue.accept()
    queue.claim(queue_id)
    lose_worker(queue)
    queue.pass_time(100)
    queue.rescuer.requeue_due(10)
    (claim,) = queue.claim(queue_id, worker=(worker := queue.register_worker()))
    queue.complete(claim, Outcome.UNREACHABLE, worker=worker, attempts=[], server=None)
    assert queue.delivery(queue_id)["crash_count"] == 1


def test_a_poison_message_is_held(clean_url: str) -> None:
    with opened(clean_url, poison_limit=3) as queue:
        queue_id = queue.accept()
        for lost in (1, 2, 3):
            worker = queue.register_worker()
            (claim,) = queue.claim(queue_id, worker=worker)
            assert (claim.crash_count, claim.claim) == (lost - 1, lost)
            lose_worker(queue, worker)
            row = queue.delivery(queue_id)
            assert (row["crash_count"], row["state"]) == (lost, "held" if lost == 3 else "deferred")
            queue.pass_time(100)
            queue.rescuer.requeue_due(10)
        assert queue.delivery(queue_id)["due_at"] is None


def test_an_outcome_resets_the_count_of_crashes(queue: QueueHarness) -> None:
    queue_id = queue.accept()
    queue.claim(queue_id)
    lose_worker(queue)
    queue.pass_time(100)
    queue.rescuer.requeue_due(10)
    worker = queue.register_worker()
    queue.complete(queue.claim(queue_id, worker=worker)[0], Outcome.DEFERRED, worker=worker)
    assert queue.delivery(queue_id)["crash_count"] == 0


def test_uncertain_deliveries_are_held_if_the_setting_says_so(clean_url: str) -> None:
    with opened(clean_url, uncertain="hold") as queue:
        queue_id = queue.accept()
        queue.claim(queue_id)
        assert lose_worker(queue) == 1
        row = queue.delivery(queue_id)
        assert (row["state"], row["due_at"], row["last_outcome"]) == ("held", None, "uncertain")


def test_pending_operations_come_first_and_lateness_counts(queue: QueueHarness) -> None:
    dropped, bounced, null, late = (
        queue.accept(),
        queue.accept(),
        queue.accept(sender=""),
        queue.accept(),
    )
    queue.claim(dropped, bounced, null, late)
    for queue_id, verb in ((dropped, "drop"), (bounced, "bounce"), (null, "bounce")):
        queue.request_operation(queue_id, verb)
    queue.pass_time(2000, only=[late])
    queue.change("UPDATE deliveries SET due_at = @later(100) WHERE queue_id = @id(:id)", id=late)
    assert lose_worker(queue) == 4
    assert queue.states_of([dropped, bounced, null, late]) == [
        "dropped",
        "bounced",
        "bounced",
        "expired",
    ]
    assert [queue.delivery(i)["due_at"] is None for i in (dropped, bounced, null, late)] == [
        True,
        False,
        True,
        False,
    ]
    assert all(queue.delivery(i)["finished_at"] is not None for i in (dropped, bounced, null, late))


@pytest.mark.parametrize("outcome", [Outcome.DELIVERED, Outcome.DEFERRED])
def test_a_worker_that_wakes_up_late(queue: QueueHarness, outcome: Outcome) -> None:
    (claim,) = queue.claim(queue.accept())
    lose_worker(queue)
    state = State.DELIVERED if outcome is Outcome.DELIVERED else State.DEFERRED
    assert queue.complete(claim, outcome).state is state
    row = queue.delivery(claim.queue_id)
    assert (row["state"], row["last_outcome"]) == (
        state,
        "delivered" if state == "delivered" else "uncertain",
    )
    assert queue.numbered_attempts(claim.queue_id) == [(1, 0, "uncertain"), (1, 1, outcome)]
    assert not queue.renew()


@pytest.mark.parametrize("hinted", [True, False], ids=["hinted", "overdue"])
def test_an_expired_worker_claims_nothing(queue: QueueHarness, hinted: bool) -> None:
    """It was stopped with a claim request before the database. The next sweep would find its claim,
    and the message, of which nothing was sent, would be uncertain."""
    queue_id, expired = queue.accept(), queue.worker
    lose_worker(queue)
    queue.pass_time(10)
    ids = [queue_id] if hinted else []
    assert queue.claim(*ids, worker=expired) == []
    assert queue.rescuer.rescue_unowned() == 0
    assert len(queue.claim(*ids, worker=queue.register_worker())) == 1


def test_stuck_transfers_are_given_up(queue: QueueHarness) -> None:
    (claim,) = queue.claim(queue.accept())
    fresh = queue.accept()
    assert queue.rescuer.expire_stuck_transfers() == 0
    queue.pass_time(3 * queue.settings.session_timeout)
    queue.claim(fresh)
    assert queue.rescuer.expire_stuck_transfers() == 1
    row = queue.delivery(claim.queue_id)
    assert (row["state"], row["last_outcome"]) == ("expired", "uncertain")
    assert queue.state(fresh) == "sending"


def test_deliveries_of_an_ended_worker_are_rescued(queue: QueueHarness) -> None:
    (claim,) = queue.claim(queue.accept())
    assert queue.rescuer.rescue_unowned() == 0
    queue.change("UPDATE workers SET ended_at = @now, end_reason = 'stopped'")
    assert queue.rescuer.rescue_unowned() == 1
    assert queue.state(claim.queue_id) == "deferred"
    assert queue.numbered_attempts(claim.queue_id) == [(1, 0, "uncertain")]
    assert queue.rescuer.rescue_unowned() == 0


def test_an_expiry_and_a_late_k_at_the_same_time(queue: QueueHarness) -> None:
    """In either order there is one truth: delivered."""
    claims: list[Claim] = queue.claim(*(queue.accept() for _ in range(20)))
    queue.pass_time(61)
    lease = dict(queue.rescuer.expired_leases())[queue.worker]
    barrier = threading.Barrier(2)

    def expire_worker() -> int | None:
        barrier.wait(10)
        return queue.rescuer.expire_worker(queue.worker, lease)

    def finish() -> None:
        barrier.wait(10)
        for claim in reversed(claims):
            queue.complete(claim, Outcome.DELIVERED)

    with ThreadPoolExecutor(2) as pool:
        expiry, finished = pool.submit(expire_worker), pool.submit(finish)
        assert expiry.result(30) is not None
        finished.result(30)
    assert set(queue.states_of(claim.queue_id for claim in claims)) == {"delivered"}


# --- the database's clock is set back
# ---------------------------------------------------------------------

LONGEST = 3600.0
BACK = 7200.0


def test_a_delivery_deferred_beyond_the_longest_wait_is_due(queue: QueueHarness) -> None:
    ids = deferred(queue, 3)
    queue.pass_time(-BACK, only=ids[1:])
    assert queue.rescuer.bring_near(10, LONGEST, ["default"]) == 2
    assert set(queue.rescuer.requeue_due(10)["default"]) == set(ids)


def test_a_short_wait_is_not_changed(queue: QueueHarness) -> None:
    (queue_id,) = deferred(queue, 1)
    queue.pass_time(60 - LONGEST, only=[queue_id])
    queued, (sending,) = queue.accept(), queue.claim(queue.accept())
    before = [queue.delivery(i)["due_at"] for i in (queue_id, queued, sending.queue_id)]
    assert queue.rescuer.bring_near(10, LONGEST, ["default"]) == 0
    assert [queue.delivery(i)["due_at"] for i in (queue_id, queued, sending.queue_id)] == before


def test_queued_mail_without_a_hint_is_claimed(queue: QueueHarness) -> None:
    near, far = queue.accept("x@example.org"), queue.accept("bulk:y@example.org")
    queue.pass_time(-BACK, only=[near, far])
    capacity = {"default": 5, "bulk": 5}
    assert queue.claim(capacity=capacity) == []
    assert queue.rescuer.bring_near(10, LONGEST, ["default", "bulk"]) == 2
    assert {claim.queue_id for claim in queue.claim(capacity=capacity)} == {near, far}


def test_a_transfer_under_way_keeps_its_claim_and_gets_the_time_of_a_new_one(
    queue: QueueHarness,
) -> None:
    (claim,) = queue.claim(queue.accept())
    far = queue.delivery(claim.queue_id)["due_in"]
    queue.pass_time(-BACK, only=[claim.queue_id])
    assert queue.rescuer.bring_near(10, LONGEST, ["default"]) == 1
    assert queue.delivery(claim.queue_id)["due_in"] == pytest.approx(far, abs=4)
    assert queue.rescuer.expire_stuck_transfers() == 0
    assert queue.complete(claim, Outcome.DELIVERED).state is State.DELIVERED


def test_it_is_done_a_batch_at_a_time(queue: QueueHarness) -> None:
    ids = [queue.accept() for _ in range(5)]
    queue.pass_time(-BACK, only=ids)
    assert [queue.rescuer.bring_near(2, LONGEST, ["default"]) for _ in range(4)] == [2, 2, 1, 0]


def test_a_lease_that_ends_later_than_any_has_run_out(queue: QueueHarness) -> None:
    queue.pass_time(-BACK)
    assert [worker for worker, _ in queue.rescuer.expired_leases()] == [queue.worker]
    assert queue.renew()
    assert queue.rescuer.expired_leases() == [], "a living worker renews it"


def test_a_dsn_is_pending_at_once(queue: QueueHarness, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.prepare(queue.database, unsafe=True)
    (claim,) = queue.claim(queue.accept())
    queue.complete(claim, Outcome.REJECTED)
    queue.pass_time(-BACK, only=[claim.queue_id])
    generator = DsnGenerator(queue.database, spool, queue.settings, lambda _: "default")
    assert len(generator.generate(10)) == 1
