"""Sweeping, on both databases: what is due wakes up, who is gone is found out, and what was in
flight is told of."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from relay.db.schema import Outcome, State
from relay.dsn.generator import DsnGenerator
from relay.queue.model import Claim
from relay.spool.store import Spool
from tests.integration.office import Office, opened


def deferred(office: Office, count: int) -> list[str]:
    """So many deferred deliveries, each due a minute after the one before it, the last in half a
    minute."""
    ids = [office.accept() for _ in range(count)]
    for claim in office.claim(*ids):
        office.record(claim, Outcome.DEFERRED, backoff_step=2)
    for n, queue_id in enumerate(ids):
        office.pass_time(60 * (count - n - 1), only=[queue_id])
    return ids


def vanish(office: Office, worker: str = "") -> int | None:
    """Let a worker's lease run out, and expire it."""
    office.pass_time(office.settings.lease + 1)
    return office.expire_worker(worker or office.worker)


def test_what_is_due_wakes_up_the_longest_due_first(office: Office) -> None:
    ids = deferred(office, 5)
    assert set(office.sweeps.requeue_due(2)) == set(ids[:2])
    assert office.states(ids) == ["queued"] * 2 + ["deferred"] * 3
    assert set(office.sweeps.requeue_due(10)) == set(ids[2:4]), "the last is not due yet"
    assert office.sweeps.requeue_due(10) == []
    row = office.delivery(ids[0])
    assert row["due_in"] == pytest.approx(office.settings.grace, abs=4), (
        "its hint has GRACE to arrive"
    )
    assert row["backoff_step"] == 2


def test_deliveries_of_one_message_are_hinted_once(office: Office) -> None:
    queue_id = office.accept("x@example.org", "bulk:y@example.org")
    for claim in office.claim(queue_id, room={"default": 1, "bulk": 1}):
        office.record(claim, Outcome.DEFERRED)
    office.pass_time(60)
    assert office.sweeps.requeue_due(10) == [queue_id]
    assert {office.state(queue_id, 1), office.state(queue_id, 2)} == {"queued"}


def test_two_sweepers_share_what_is_due(office: Office) -> None:
    ids = deferred(office, 40)
    barrier = threading.Barrier(2)

    def sweep() -> list[str]:
        barrier.wait(10)
        woken: list[str] = []
        while office.rows("SELECT 1 FROM deliveries WHERE state = 'deferred' AND due_at <= @now"):
            woken += office.sweeps.requeue_due(3)
        return woken

    with ThreadPoolExecutor(2) as pool:
        sweepers = [pool.submit(sweep) for _ in range(2)]
        woken = [queue_id for sweeper in sweepers for queue_id in sweeper.result(30)]
    assert sorted(woken) == sorted(ids[:-1]), "each by one of them"


def test_a_worker_that_is_alive_is_not_buried(office: Office) -> None:
    (claim,) = office.claim(office.accept())
    assert office.sweeps.expired_leases() == []
    office.pass_time(61)
    ((worker, lease),) = office.sweeps.expired_leases()
    assert worker == office.worker
    office.renew()
    assert office.sweeps.expire_worker(worker, lease) is None, "it renewed since it was seen"
    assert office.sweeps.expire_worker(worker, "never") is None
    assert office.state(claim.queue_id) == "sending"


def test_what_a_lost_worker_was_sending_is_uncertain(office: Office) -> None:
    kept = office.hire()
    (theirs,) = office.claim(office.accept(), worker=kept)
    (claim,) = office.claim(office.accept())
    waiting = office.accept()
    office.pass_time(61)
    lease = dict(office.sweeps.expired_leases())[office.worker]
    office.renew(kept)
    assert office.sweeps.expire_worker(office.worker, lease) == 1
    assert office.sweeps.expire_worker(office.worker, lease) is None, "once"
    row = office.delivery(claim.queue_id)
    assert (row["state"], row["worker"], row["crash_count"], row["last_outcome"]) == (
        "deferred",
        None,
        1,
        "uncertain",
    )
    assert (
        office.settings.uncertain_delay - 10
        < row["due_in"]
        <= 1.5 * office.settings.uncertain_delay
    )
    assert "vanished" in row["last_reply"]
    assert office.attempts(claim.queue_id) == [(1, 0, "uncertain")]
    assert office.state(theirs.queue_id) == "sending"
    assert office.state(waiting) == "queued"
    endings = {
        str(row["id"]).replace("-", ""): row["end_reason"]
        for row in office.rows("SELECT id, end_reason FROM workers")
    }
    assert endings == {office.worker: "vanished", kept: None}


def test_what_a_vanished_worker_had_does_not_come_back_at_once(office: Office) -> None:
    claims = office.claim(*[office.accept() for _ in range(20)])
    vanish(office)
    assert len({office.delivery(claim.queue_id)["due_at"] for claim in claims}) > 10


def test_no_connection_is_no_proof_that_a_message_is_harmless(office: Office) -> None:
    queue_id = office.accept()
    office.claim(queue_id)
    vanish(office)
    office.pass_time(100)
    office.sweeps.requeue_due(10)
    (claim,) = office.claim(queue_id, worker=(worker := office.hire()))
    office.record(claim, Outcome.UNREACHABLE, worker=worker, tries=[], server=None)
    assert office.delivery(queue_id)["crash_count"] == 1


def test_a_poison_message_is_held(clean_url: str) -> None:
    with opened(clean_url, poison_limit=3) as office:
        queue_id = office.accept()
        for lost in (1, 2, 3):
            worker = office.hire()
            (claim,) = office.claim(queue_id, worker=worker)
            assert (claim.crash_count, claim.claim) == (lost - 1, lost)
            vanish(office, worker)
            row = office.delivery(queue_id)
            assert (row["crash_count"], row["state"]) == (lost, "held" if lost == 3 else "deferred")
            office.pass_time(100)
            office.sweeps.requeue_due(10)
        assert office.delivery(queue_id)["due_at"] is None


def test_an_outcome_ends_the_count_of_lost_workers(office: Office) -> None:
    queue_id = office.accept()
    office.claim(queue_id)
    vanish(office)
    office.pass_time(100)
    office.sweeps.requeue_due(10)
    worker = office.hire()
    office.record(office.claim(queue_id, worker=worker)[0], Outcome.DEFERRED, worker=worker)
    assert office.delivery(queue_id)["crash_count"] == 0


def test_uncertain_is_held_where_the_operator_wants_to_look(clean_url: str) -> None:
    with opened(clean_url, uncertain="hold") as office:
        queue_id = office.accept()
        office.claim(queue_id)
        assert vanish(office) == 1
        row = office.delivery(queue_id)
        assert (row["state"], row["due_at"], row["last_outcome"]) == ("held", None, "uncertain")


def test_what_an_operator_wanted_comes_first_and_lateness_counts(office: Office) -> None:
    dropped, bounced, null, late = (
        office.accept(),
        office.accept(),
        office.accept(sender=""),
        office.accept(),
    )
    office.claim(dropped, bounced, null, late)
    for queue_id, verb in ((dropped, "drop"), (bounced, "bounce"), (null, "bounce")):
        office.ask(queue_id, verb)
    office.pass_time(2000, only=[late])
    office.change("UPDATE deliveries SET due_at = @later(100) WHERE queue_id = @id(:id)", id=late)
    assert vanish(office) == 4
    assert office.states([dropped, bounced, null, late]) == [
        "dropped",
        "bounced",
        "bounced",
        "expired",
    ]
    assert [office.delivery(i)["due_at"] is None for i in (dropped, bounced, null, late)] == [
        True,
        False,
        True,
        False,
    ]
    assert all(
        office.delivery(i)["finished_at"] is not None for i in (dropped, bounced, null, late)
    )


@pytest.mark.parametrize("outcome", [Outcome.DELIVERED, Outcome.DEFERRED])
def test_a_worker_that_wakes_up_late(office: Office, outcome: Outcome) -> None:
    (claim,) = office.claim(office.accept())
    vanish(office)
    state = State.DELIVERED if outcome is Outcome.DELIVERED else State.DEFERRED
    assert office.record(claim, outcome).state is state
    row = office.delivery(claim.queue_id)
    assert (row["state"], row["last_outcome"]) == (
        state,
        "delivered" if state == "delivered" else "uncertain",
    )
    assert office.attempts(claim.queue_id) == [(1, 0, "uncertain"), (1, 1, outcome)]
    assert not office.renew()


def test_stuck_transfers_are_given_up(office: Office) -> None:
    (claim,) = office.claim(office.accept())
    fresh = office.accept()
    assert office.sweeps.expire_stuck_transfers() == 0
    office.pass_time(3 * office.settings.session_timeout)
    office.claim(fresh)
    assert office.sweeps.expire_stuck_transfers() == 1
    row = office.delivery(claim.queue_id)
    assert (row["state"], row["last_outcome"]) == ("expired", "uncertain")
    assert office.state(fresh) == "sending"


def test_what_a_worker_that_ended_still_held_is_found(office: Office) -> None:
    (claim,) = office.claim(office.accept())
    assert office.sweeps.rescue_unowned() == 0
    office.change("UPDATE workers SET ended_at = @now, end_reason = 'stopped'")
    assert office.sweeps.rescue_unowned() == 1
    assert office.state(claim.queue_id) == "deferred"
    assert office.attempts(claim.queue_id) == [(1, 0, "uncertain")]
    assert office.sweeps.rescue_unowned() == 0


def test_a_burial_and_a_late_k_at_the_same_time(office: Office) -> None:
    """In either order there is one truth: delivered."""
    claims: list[Claim] = office.claim(*(office.accept() for _ in range(20)))
    office.pass_time(61)
    lease = dict(office.sweeps.expired_leases())[office.worker]
    barrier = threading.Barrier(2)

    def expire_worker() -> int | None:
        barrier.wait(10)
        return office.sweeps.expire_worker(office.worker, lease)

    def finish() -> None:
        barrier.wait(10)
        for claim in reversed(claims):
            office.record(claim, Outcome.DELIVERED)

    with ThreadPoolExecutor(2) as pool:
        expiry, finished = pool.submit(expire_worker), pool.submit(finish)
        assert expiry.result(30) is not None
        finished.result(30)
    assert set(office.states(claim.queue_id for claim in claims)) == {"delivered"}


# --- the database's clock is set back
# ---------------------------------------------------------------------

LONGEST = 3600.0
BACK = 7200.0


def test_what_is_deferred_beyond_the_longest_wait_is_due(office: Office) -> None:
    ids = deferred(office, 3)
    office.pass_time(-BACK, only=ids[1:])
    assert office.sweeps.bring_near(10, LONGEST, ["default"]) == 2
    assert set(office.sweeps.requeue_due(10)) == set(ids)


def test_a_wait_that_may_be_is_kept(office: Office) -> None:
    (queue_id,) = deferred(office, 1)
    office.pass_time(60 - LONGEST, only=[queue_id])
    queued, (sending,) = office.accept(), office.claim(office.accept())
    before = [office.delivery(i)["due_at"] for i in (queue_id, queued, sending.queue_id)]
    assert office.sweeps.bring_near(10, LONGEST, ["default"]) == 0
    assert [office.delivery(i)["due_at"] for i in (queue_id, queued, sending.queue_id)] == before


def test_queued_mail_whose_hint_was_lost_is_found_again(office: Office) -> None:
    near, far = office.accept("x@example.org"), office.accept("bulk:y@example.org")
    office.pass_time(-BACK, only=[near, far])
    room = {"default": 5, "bulk": 5}
    assert office.claim(room=room) == []
    assert office.sweeps.bring_near(10, LONGEST, ["default", "bulk"]) == 2
    assert {claim.queue_id for claim in office.claim(room=room)} == {near, far}


def test_a_transfer_under_way_keeps_its_claim_and_gets_the_time_of_a_new_one(
    office: Office,
) -> None:
    (claim,) = office.claim(office.accept())
    far = office.delivery(claim.queue_id)["due_in"]
    office.pass_time(-BACK, only=[claim.queue_id])
    assert office.sweeps.bring_near(10, LONGEST, ["default"]) == 1
    assert office.delivery(claim.queue_id)["due_in"] == pytest.approx(far, abs=4)
    assert office.sweeps.expire_stuck_transfers() == 0
    assert office.record(claim, Outcome.DELIVERED).state is State.DELIVERED


def test_it_is_done_a_batch_at_a_time(office: Office) -> None:
    ids = [office.accept() for _ in range(5)]
    office.pass_time(-BACK, only=ids)
    assert [office.sweeps.bring_near(2, LONGEST, ["default"]) for _ in range(4)] == [2, 2, 1, 0]


def test_a_lease_that_ends_later_than_any_has_run_out(office: Office) -> None:
    office.pass_time(-BACK)
    assert [worker for worker, _ in office.sweeps.expired_leases()] == [office.worker]
    assert office.renew()
    assert office.sweeps.expired_leases() == [], "a living worker renews it"


def test_a_notice_is_owed_at_once_all_the_same(office: Office, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.prepare(office.engine, unsafe=True)
    (claim,) = office.claim(office.accept())
    office.record(claim, Outcome.REJECTED)
    office.pass_time(-BACK, only=[claim.queue_id])
    generator = DsnGenerator(office.engine, spool, office.settings, lambda _: "default")
    assert len(generator.generate(10)) == 1
