"""The DSN generator, on both databases: every pending DSN is generated exactly once, wherever a
worker is killed, and no other."""

import errno
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any, cast

import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import OperationalError

from qmqp.body import BodyFile
from relay.dsn.generator import GATHER, LONGEST_RETURNED, PUT_OFF, DsnGenerator
from relay.dsn.message import compose
from relay.ids import new_id
from relay.queue.accept import NewMessage, NewRecipient
from relay.queue.model import Attempt, Claim, CompletionResult
from relay.queue.operations import OPERATIONS, QueueOperations
from relay.queue.outcome import Outcome
from relay.queue.states import State
from relay.report.filters import Filter
from relay.spool.store import Spool
from tests.bodies import body_in
from tests.integration.harness import QueueHarness, opened
from tests.waiting import until
from worker.cleaner import Cleaner

BODY = b"Received: by relay\nSubject: original\n\n" + b"x" * 61 + b"\n"
HOUR = 3600.0
ROOM = {"default": 100, "bulk": 100, "other": 100}


def break_reads(body: BodyFile) -> None:
    """Each read of the open file fails with EIO."""
    os.dup2(unreadable := os.open("/proc/self/mem", os.O_RDONLY), body.fd)
    os.close(unreadable)


class DsnHarness:
    """A queue with bodies, and a DSN generator."""

    def __init__(self, queue: QueueHarness, spool: Spool) -> None:
        self.queue, self.spool = queue, spool
        self.generator = self.another()

    def another(self) -> DsnGenerator:
        """The generator of another process."""
        return DsnGenerator(
            self.queue.database, self.spool, self.queue.settings, lambda address: "default"
        )

    def accept(self, *addresses: str, body: bytes = BODY, **given: Any) -> str:
        """A message with its body; `route:address` gives the route."""
        queue_id = new_id()
        self.spool.store(queue_id, [body])
        ways = [address.rpartition(":") for address in addresses or ("b@example.org",)]
        dsn = {key: given.pop(key) for key in ("notify", "orcpt") if key in given}
        recipients = [
            NewRecipient(address, route=route or "default", **dsn) for route, _, address in ways
        ]
        sender = given.pop("sender", "a@example.com")
        message = NewMessage(
            queue_id, sender, len(body), recipients, "192.0.2.1", "client", "ESMTP", **given
        )
        self.queue.insert([message])
        return queue_id

    def fail(self, queue_id: str, outcome: Outcome = Outcome.REJECTED, **more: Any) -> list[Claim]:
        """Every queued delivery of it ends with this outcome."""
        claims = self.queue.claim(queue_id, capacity=ROOM)
        for claim in claims:
            self.queue.complete(claim, outcome, **more)
        return claims

    def dsns(self, queue_id: str | None = None) -> list[str]:
        """The queue ids of the DSNs, about one message or all."""
        rows = self.queue.rows(
            "SELECT @hex(id) AS id, @hex(dsn_of) AS about FROM messages ORDER BY id"
        )
        return [
            row["id"]
            for row in rows
            if row["about"] is not None and queue_id in (None, row["about"])
        ]

    def text(self, dsn: str) -> EmailMessage:
        return message_from_bytes(body_in(self.spool.path(dsn)), policy=policy.default)

    def reported(self, dsn: str) -> list[tuple[str, str]]:
        """Recipient and action of each group of a DSN."""
        status = cast(list[Any], self.text(dsn).get_payload())[1]
        groups = [dict(group.items()) for group in status.get_payload()][1:]
        return [(g["Final-Recipient"].removeprefix("rfc822; "), g["Action"]) for g in groups if g]

    def pending(self, queue_id: str) -> bool:
        sql = (
            "SELECT due_at FROM deliveries WHERE queue_id = @id(:id) AND state IN ('bounced',"
            " 'expired')"
        )
        return any(row["due_at"] is not None for row in self.queue.rows(sql, id=queue_id))

    def age(self, queue_id: str, seconds: float = 5 * HOUR) -> None:
        """Moves the arrival of a message so many seconds back, and the times that depend on it."""
        aged = "UPDATE messages SET received_at = @ago(:s) WHERE id = @id(:id)"
        self.queue.change(aged, s=seconds, id=queue_id)
        if self.queue.settings.delay_warning is not None:
            warn = """UPDATE deliveries SET warn_at = @later(:s)
                WHERE queue_id = @id(:id) AND warn_at IS NOT NULL"""
            self.queue.change(warn, s=self.queue.settings.delay_warning - seconds, id=queue_id)

    def whole(self, dsn: str) -> bool:
        """Whether a DSN's file has the size of its row."""
        (row,) = self.queue.rows("SELECT size FROM messages WHERE id = @id(:id)", id=dsn)
        return len(body_in(self.spool.path(dsn))) == int(row["size"])

    def files(self) -> set[str]:
        return {name for name, _ in self.spool.ids()}

    def has_body(self, queue_id: str) -> bool:
        return self.spool.path(queue_id).exists()


@pytest.fixture
def harness(queue: QueueHarness, spool: Spool) -> DsnHarness:
    return DsnHarness(queue, spool)


@pytest.fixture
def with_settings(clean_url: str, spool: Spool) -> Iterator[Any]:
    opened_ones: list[Any] = []

    def make(**given: Any) -> DsnHarness:
        context = opened(clean_url, **given)
        opened_ones.append(context)
        return DsnHarness(context.__enter__(), spool)

    yield make
    for context in opened_ones:
        context.__exit__(None, None, None)


def test_dsn_is_generated_once_and_is_a_message_like_any_other(harness: DsnHarness) -> None:
    queue_id = harness.accept(header_message_id="<1@client>")
    harness.fail(queue_id)
    assert harness.pending(queue_id)
    (dsn,) = harness.generator.generate(10)
    assert harness.generator.generate(10) == [] == harness.another().generate(10)
    assert harness.dsns() == [dsn]
    assert not harness.pending(queue_id)
    (row,) = harness.queue.rows("SELECT * FROM messages WHERE id = @id(:id)", id=dsn)
    assert (row["sender"], row["protocol"], row["size"]) == (
        "",
        "DSN",
        len(body_in(harness.spool.path(dsn))),
    )
    (claim,) = harness.queue.claim(dsn)
    assert (claim.sender, claim.recipients, claim.size) == ("", ("a@example.com",), row["size"])
    assert harness.text(dsn)["To"] == "a@example.com"
    assert harness.reported(dsn) == [("b@example.org", "failed")]


def test_expired_message_is_reported(harness: DsnHarness) -> None:
    queue_id = harness.accept()
    claims = harness.queue.claim(queue_id)
    harness.queue.pass_time(2000)
    harness.queue.complete(claims[0], Outcome.DEFERRED)
    assert harness.queue.state(queue_id) == "expired"
    (dsn,) = harness.generator.generate(10)
    assert "5.4.7" in body_in(harness.spool.path(dsn)).decode()


@pytest.mark.parametrize(
    ("outcome", "sent", "doubt"),
    [
        (Outcome.UNCERTAIN, 0, True),
        (Outcome.MALFORMED, 2 * len(BODY), True),
        (Outcome.MALFORMED, 3, False),
        (Outcome.DEFERRED, 2 * len(BODY), False),
    ],
)
def test_expired_delivery_may_have_been_delivered_after_an_uncertain_attempt(
    harness: DsnHarness, outcome: Outcome, sent: int, doubt: bool
) -> None:
    queue_id = harness.accept()
    (claim,) = harness.queue.claim(queue_id)
    harness.queue.pass_time(2000)
    tried = Attempt(1, "mx.example.net:628", outcome, "words", sent, 0.5, 0.1)
    harness.queue.complete(claim, outcome, reply="words", attempts=[tried])
    assert harness.queue.state(queue_id) == "expired"
    (dsn,) = harness.generator.generate(10)
    report = " ".join(body_in(harness.spool.path(dsn)).decode().split())
    assert ("It may have been delivered all the same" in report) == doubt
    assert ("It could not be delivered in time" in report) == (not doubt)
    assert ("Diagnostic-Code: x-qmqp; words" in report) == (outcome is Outcome.DEFERRED)


def test_parts_of_an_uncertain_delivery_may_have_been_delivered(harness: DsnHarness) -> None:
    queue_id = harness.accept("x@example.org", "y@example.org", "bulk:z@example.org")
    for outcome, state in ((Outcome.UNCERTAIN, State.DEFERRED), (Outcome.REJECTED, State.SPLIT)):
        for claim in harness.queue.claim(queue_id, capacity=ROOM):
            mine = claim.route == "default"
            harness.queue.complete(
                claim,
                outcome if mine else Outcome.DEFERRED,
                state=state if mine else State.DEFERRED,
            )
        harness.queue.pass_time(500)
        harness.queue.rescuer.requeue_due(10)
    harness.queue.pass_time(2000)
    for _ in range(2):  # the halves, and what waits for another route
        harness.fail(queue_id, Outcome.DEFERRED)
    (dsn,) = harness.generator.generate(10)
    assert len(harness.reported(dsn)) == 3
    report = " ".join(body_in(harness.spool.path(dsn)).decode().split())
    assert report.count("It may have been delivered all the same") == 2


def test_original_stays_until_its_dsn_is_generated(harness: DsnHarness) -> None:
    queue_id = harness.accept()
    harness.fail(queue_id)
    needed = """SELECT 1 FROM deliveries WHERE queue_id = @id(:id)
        AND (state IN ('queued', 'sending', 'deferred', 'held') OR due_at IS NOT NULL)"""
    assert harness.queue.rows(needed, id=queue_id)
    assert harness.has_body(queue_id)
    (dsn,) = harness.generator.generate(10)
    assert BODY in body_in(harness.spool.path(dsn))
    assert not harness.has_body(queue_id)
    assert not harness.queue.rows(needed, id=queue_id)


def test_original_stays_while_another_delivery_needs_it(harness: DsnHarness) -> None:
    queue_id = harness.accept("x@example.org", "bulk:y@example.org")
    first, second = sorted(
        harness.queue.claim(queue_id, capacity=ROOM), key=lambda claim: claim.number
    )
    harness.queue.complete(first, Outcome.REJECTED)
    harness.queue.complete(second, Outcome.DEFERRED, delay=1e6)
    assert len(harness.generator.generate(10)) == 1
    assert harness.has_body(queue_id)


def test_original_is_removed_when_its_last_deliveries_end_together(
    clean_postgres_url: str, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(clean_postgres_url) as queue:
        harness = DsnHarness(queue, spool)
        queue_id = harness.accept("x@example.org", "bulk:y@example.org")
        first, second = sorted(queue.claim(queue_id, capacity=ROOM), key=lambda claim: claim.number)
        queue.complete(first, Outcome.REJECTED)
        queue.pass_time(GATHER + 5)
        met: list[CompletionResult] = []
        stored: list[str] = []
        store = spool.store

        def note_it(dsn: str, parts: Any, envelope: bytes) -> int:
            stored.append(dsn)
            return store(dsn, parts, envelope)

        def deliver(_: Connection) -> None:
            if not met and stored:
                met.append(CompletionResult(None, body_deletable=False))
                met[0] = queue.complete(second, Outcome.DELIVERED)

        monkeypatch.setattr(spool, "store", note_it)
        event.listen(queue.database, "commit", deliver)  # just before the COMMIT that clears due_at
        assert len(harness.generator.generate(10)) == 1
        assert met == [CompletionResult(State.DELIVERED, body_deletable=False)], (
            "it does not see due_at being cleared"
        )
        assert not harness.has_body(queue_id)


class GeneratorKilled(BaseException):
    """Stands for kill -9: nothing is caught, nothing is cleaned up, the database rolls back."""


@pytest.mark.parametrize("half", [True, False])
def test_kill_before_commit_leaves_an_orphan_and_the_next_worker_generates_the_dsn(
    harness: DsnHarness, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    queue_id = harness.accept()
    harness.fail(queue_id)
    store = harness.spool.store

    def killed(dsn: str, parts: Any, _envelope: bytes) -> int:
        store(dsn, [b"half"] if half else parts)
        raise GeneratorKilled

    with monkeypatch.context() as patch:
        patch.setattr(harness.spool, "store", killed)
        with pytest.raises(GeneratorKilled):
            harness.generator.generate(10)
    assert harness.pending(queue_id)
    assert harness.has_body(queue_id)
    assert harness.dsns() == []
    (left,) = harness.files() - {queue_id}
    (dsn,) = harness.another().generate(10)
    assert harness.reported(dsn) == [("b@example.org", "failed")]
    assert harness.whole(dsn)
    os.utime(harness.spool.path(left), (time.time() - 40 * HOUR,) * 2)
    assert Cleaner(harness.queue.settings, harness.queue.database, harness.spool).clean_spool() == (
        0,
        1,
    )
    assert harness.files() == {dsn}


# Where a sweeper may stand still for so long that PostgreSQL ends its session.
STALLS = ("open", "before store", "store", "commit")


@pytest.mark.parametrize("at", STALLS)
def test_stalled_generator_does_not_change_the_dsn_of_the_next_one(
    clean_postgres_url: str, spool: Spool, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    with opened(clean_postgres_url) as queue, opened(clean_postgres_url) as theirs:
        harness, other = DsnHarness(queue, spool), DsnHarness(theirs, Spool(spool.directory))
        queue_id = harness.accept()
        harness.fail(queue_id)
        made: list[str] = []

        def stall(*_: Any) -> None:
            if not made and len(harness.files()) > (at in ("commit", "store")):
                ended = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                    WHERE pid <> pg_backend_pid()
                    AND datname = current_database() AND state = 'idle in transaction'"""
                assert theirs.rows(ended), "its session ends, and its locks"
                made.extend(until(lambda: other.generator.generate(10)))
                assert not other.has_body(queue_id)

        def stalling(call: Any, *, first: bool) -> Any:
            def stalls(*given: Any) -> Any:
                if first:
                    stall()
                found = call(*given)
                stall()
                return found

            return stalls

        if at == "commit":
            event.listen(queue.database, "commit", stall)
        else:
            name = at.rpartition(" ")[2]
            monkeypatch.setattr(spool, name, stalling(getattr(spool, name), first=at != "store"))
        with pytest.raises(OperationalError):
            harness.generator.generate(10)
        assert harness.dsns() == made
        assert harness.whole(made[0])
        assert not harness.pending(queue_id)
        left = harness.files() - set(made)
        assert len(left) == (at == "commit"), "only where it cannot know whether it has committed"


def test_uncertain_commit_leaves_the_file(
    harness: DsnHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_id = harness.accept()
    harness.fail(queue_id)

    def breaks(_: Connection) -> None:
        if len(harness.files()) > 1:
            raise RuntimeError("stands for a connection that breaks in the COMMIT")

    event.listen(harness.queue.database, "commit", breaks)
    assert harness.generator.generate(10) == []
    event.remove(harness.queue.database, "commit", breaks)
    assert len(harness.files() - {queue_id}) == 1
    (dsn,) = harness.another().generate(10)
    assert harness.whole(dsn)
    assert harness.dsns() == [dsn]


def test_kill_after_commit_leaves_one_dsn_and_the_original_body(
    harness: DsnHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_id = harness.accept()
    harness.fail(queue_id)
    monkeypatch.setattr(harness.spool, "remove", lambda queue_id: False)
    (dsn,) = harness.generator.generate(10)
    assert harness.another().generate(10) == []
    assert harness.dsns() == [dsn]
    assert harness.has_body(queue_id)


def test_two_generators_generate_each_dsn_once(harness: DsnHarness) -> None:
    ids = [harness.accept("x@example.org", "bulk:y@example.org") for _ in range(15)]
    for queue_id in ids:
        harness.fail(queue_id)
    barrier = threading.Barrier(2)

    def generate(generator: DsnGenerator) -> list[str]:
        barrier.wait(10)
        return [dsn for _ in range(3) for dsn in generator.generate(10)]

    with ThreadPoolExecutor(2) as pool:
        made = [
            dsn
            for part in pool.map(generate, (harness.generator, harness.another()))
            for dsn in part
        ]
    made += harness.generator.generate(50)
    assert sorted(made) == harness.dsns()
    for queue_id in ids:
        reported = [
            address for dsn in harness.dsns(queue_id) for address, _ in harness.reported(dsn)
        ]
        assert sorted(reported) == ["x@example.org", "y@example.org"], (
            "each recipient in exactly one dsn"
        )


def test_second_generator_skips_locked_messages(
    clean_postgres_url: str, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(clean_postgres_url) as queue:
        harness = DsnHarness(queue, spool)
        queue_id = harness.accept()
        harness.fail(queue_id)
        meanwhile: list[list[str]] = []

        def other() -> None:
            if not meanwhile:
                meanwhile.append([])
                meanwhile[0] = harness.another().generate(10)

        store = spool.store

        def store_after_other(dsn: str, parts: Any, envelope: bytes) -> int:
            other()
            return store(dsn, parts, envelope)

        monkeypatch.setattr(spool, "store", store_after_other)
        (dsn,) = harness.generator.generate(10)
        assert meanwhile == [[]], "it did not wait, and had nothing to do"
        assert harness.dsns() == [dsn]


def test_two_generators_warn_once_and_report_locked_deliveries(
    clean_postgres_url: str, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(clean_postgres_url, delay_warning=4 * HOUR) as queue:
        harness = DsnHarness(queue, spool)
        queue_id = harness.accept("x@example.org", "bulk:y@example.org")
        harness.age(queue_id)
        busy = queue.database.connect()  # a worker that records something of the first
        busy.execute(text("SELECT 1 FROM deliveries WHERE number = 1 FOR UPDATE"))
        meanwhile: list[list[str]] = []
        store = spool.store

        def store_after_other(dsn: str, parts: Any, envelope: bytes) -> int:
            busy.close()
            if not meanwhile:
                meanwhile.append([])
                meanwhile[0] = harness.another().warn(10)
            return store(dsn, parts, envelope)

        monkeypatch.setattr(spool, "store", store_after_other)
        (warning,) = harness.generator.warn(10)
        assert meanwhile == [[]]
        assert harness.reported(warning) == [
            ("x@example.org", "delayed"),
            ("y@example.org", "delayed"),
        ]
        assert harness.another().warn(10) == []
        assert harness.dsns(queue_id) == [warning]


def test_message_that_is_locked_is_warned_of_in_the_next_call(
    clean_postgres_url: str, spool: Spool
) -> None:
    with opened(clean_postgres_url, delay_warning=4 * HOUR) as queue:
        harness = DsnHarness(queue, spool)
        queue_id = harness.accept()
        harness.age(queue_id)
        with queue.database.connect() as busy:
            busy.execute(text("SELECT 1 FROM deliveries FOR UPDATE"))
            assert harness.generator.warn(10) == []
        assert len(harness.generator.warn(10)) == 1


def test_deliveries_of_one_message_share_a_dsn(harness: DsnHarness) -> None:
    queue_id = harness.accept("x@example.org", "bulk:y@example.org", "other:z@example.org")
    one, two, three = sorted(
        harness.queue.claim(queue_id, capacity=ROOM), key=lambda claim: claim.number
    )
    harness.queue.complete(one, Outcome.REJECTED)
    assert harness.generator.generate(10) == [], "the others are about to be decided"
    harness.queue.complete(two, Outcome.DELIVERED)
    harness.queue.complete(three, Outcome.REJECTED)
    (dsn,) = harness.generator.generate(10)
    assert harness.reported(dsn) == [("x@example.org", "failed"), ("z@example.org", "failed")]


def test_dsn_waits_for_other_deliveries_only_for_a_moment(harness: DsnHarness) -> None:
    queue_id = harness.accept("x@example.org", "bulk:y@example.org")
    first, second = sorted(
        harness.queue.claim(queue_id, capacity=ROOM), key=lambda claim: claim.number
    )
    harness.queue.complete(first, Outcome.REJECTED)
    harness.queue.pass_time(GATHER + 5)
    (early,) = harness.generator.generate(10)
    assert harness.reported(early) == [("x@example.org", "failed")]
    assert harness.has_body(queue_id)
    harness.queue.complete(second, Outcome.REJECTED)
    (late,) = harness.generator.generate(10)
    assert late != early
    assert harness.reported(late) == [("y@example.org", "failed")]


@pytest.mark.parametrize("sender", ["", "#@[]"])
def test_null_sender_gets_no_dsn(harness: DsnHarness, sender: str) -> None:
    queue_id = harness.accept(sender=sender)
    harness.fail(queue_id)
    assert not harness.pending(queue_id)
    assert harness.generator.generate(10) == []
    # ... not even if due_at is set in the database for some reason.
    harness.queue.change("UPDATE deliveries SET due_at = @ago(100)")
    assert harness.generator.generate(10) == []
    assert not harness.pending(queue_id)
    assert harness.dsns() == []


def test_the_sender_of_a_qmail_list_gets_no_dsn(harness: DsnHarness) -> None:
    queue_id = harness.accept(sender="list-return-1-@lists.example-@[]")
    harness.fail(queue_id)
    assert harness.generator.generate(10) == []
    assert not harness.pending(queue_id)
    (row,) = harness.queue.rows("SELECT dsn_withheld FROM deliveries")
    assert row["dsn_withheld"] == "address"


# --- a DSN that is refused
# --------------------------------------------------------------------------------


def enclosed(harness: DsnHarness, dsn: str) -> tuple[str, str | None]:
    """`dsn_content` of a DSN, and the type of its third part."""
    (row,) = harness.queue.rows("SELECT dsn_content FROM messages WHERE id = @id(:id)", id=dsn)
    parts = list(harness.text(dsn).iter_parts())
    return row["dsn_content"], parts[2].get_content_type() if len(parts) > 2 else None


def test_refused_dsn_is_built_again_with_less_of_the_original(
    harness: DsnHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    original = harness.accept("x@example.org", header_message_id="<1@client>", envid="an-id")
    harness.fail(original, reply="5.1.1 unknown")
    (full,) = harness.generator.generate(10)
    assert not harness.has_body(original), "what is made again comes from the dsn itself"
    chain = [full]
    for content in (("header", "text/rfc822-headers"), ("none", None)):
        refused = chain[-1]
        harness.fail(refused, reply="550 5.7.1 your message has a virus")
        assert harness.has_body(refused)
        assert harness.pending(refused)
        (dsn,) = harness.generator.generate(10)
        chain.append(dsn)
        assert harness.generator.generate(10) == [] == harness.another().generate(10)
        assert not harness.has_body(refused)
        assert not harness.pending(refused)
        assert harness.dsns(original) == chain
        assert enclosed(harness, dsn) == content
        (row,) = harness.queue.rows(
            "SELECT m.*, r.address, r.notify FROM messages m JOIN recipients r ON"
            " r.queue_id = m.id WHERE m.id = @id(:id)",
            id=dsn,
        )
        assert (row["sender"], row["address"], row["notify"]) == ("", "a@example.com", "NEVER")
        assert harness.whole(dsn)
        named = f"<{dsn}@{harness.queue.settings.hostname}>"
        assert harness.text(dsn)["Message-ID"] == row["header_message_id"] == named
        assert harness.text(dsn)["References"] == "<1@client>"
        assert harness.reported(dsn) == [("x@example.org", "failed")]
        wire = body_in(harness.spool.path(dsn))
        assert b"Original-Envelope-Id: an-id" in wire
        assert b"Diagnostic-Code: x-qmqp; 5.1.1 unknown" in wire
        assert b"x" * 61 not in wire
        assert refused.encode() not in wire
        assert (b"Subject: original" in wire) == (content[1] is not None)
        assert b"a mail server rejected this report with" in b" ".join(wire.split())
    harness.fail(chain[-1], reply="550 not this one either")
    assert harness.pending(chain[-1]), "so that the log reports it"
    assert harness.generator.generate(10) == []
    assert not harness.pending(chain[-1])
    assert not harness.has_body(chain[-1])
    assert len(harness.dsns()) == 3
    assert capsys.readouterr().out.count("dsn given up") == 1


def test_refused_warning_is_built_again_without_the_header(late: DsnHarness) -> None:
    queue_id = late.accept()
    late.age(queue_id)
    (warning,) = late.generator.warn(10)
    late.fail(warning)
    (again,) = late.generator.generate(10)
    assert enclosed(late, again) == ("none", None)
    assert late.reported(again) == [("b@example.org", "delayed")]
    assert late.generator.warn(10) == []


def test_rebuilt_dsn_without_8_bit_content_is_7_bit(harness: DsnHarness) -> None:
    harness.fail(harness.accept(body=BODY + b"\xff\n"))
    (full,) = harness.generator.generate(10)
    harness.fail(full)
    (header,) = harness.generator.generate(10)
    (row,) = harness.queue.rows("SELECT body_type FROM messages WHERE id = @id(:id)", id=header)
    assert row["body_type"] == "7BIT"
    assert harness.text(header)["Content-Transfer-Encoding"] is None


@pytest.mark.parametrize("how", ["expired", "by an operator", "about us", "of an older version"])
def test_dsn_that_failed_for_another_reason_is_not_built_again(
    harness: DsnHarness, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    harness.fail(harness.accept())
    (dsn,) = harness.generator.generate(10)
    match how:
        case "expired":
            (claim,) = harness.queue.claim(dsn)
            harness.queue.pass_time(2000)
            harness.queue.complete(claim, Outcome.DEFERRED)
        case "by an operator":
            operations = QueueOperations(harness.queue.database, sends_dsns=True)
            operations.apply(OPERATIONS["bounce"], Filter(id=dsn), actor="me", reason="")
        case "about us":
            harness.fail(dsn, reply=US)
        case _:
            harness.queue.change("UPDATE messages SET dsn_content = NULL")
            harness.fail(dsn)
    assert harness.generator.generate(10) == []
    assert harness.queue.state(dsn) == {"expired": "expired", "about us": "deferred"}.get(
        how, "bounced"
    )
    assert not harness.pending(dsn)
    given_up = capsys.readouterr().out.count("dsn given up")
    assert given_up == (how in ("expired", "by an operator"))


def test_refused_dsn_without_a_body_is_given_up(
    harness: DsnHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    harness.fail(harness.accept())
    (dsn,) = harness.generator.generate(10)
    harness.fail(dsn)
    harness.spool.path(dsn).unlink()
    assert harness.generator.generate(10) == []
    assert not harness.pending(dsn)
    assert capsys.readouterr().out.count("dsn given up") == 1


@pytest.mark.parametrize("whole_disk", [False, True])
def test_disk_error_leaves_the_refused_dsn_pending(
    harness: DsnHarness, monkeypatch: pytest.MonkeyPatch, whole_disk: bool
) -> None:
    harness.fail(harness.accept())
    (dsn,) = harness.generator.generate(10)
    harness.fail(dsn)

    def fails(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(Spool, "open", fails)
        if whole_disk:
            patched.setattr(Spool, "check_disk", fails)
            with pytest.raises(OSError, match="Input/output"):
                harness.generator.generate(10)
        else:  # the other DSNs do not wait
            assert harness.generator.generate(10) == []
    assert harness.pending(dsn)
    assert len(harness.another().generate(10)) == 1


@pytest.mark.parametrize("while_reading", [False, True])
def test_refused_dsn_that_cannot_be_read_is_given_up_at_the_second_try(
    harness: DsnHarness,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    while_reading: bool,
) -> None:
    """The other DSNs do not wait for it."""
    for _ in range(2):
        harness.fail(harness.accept())
    bad, good = harness.generator.generate(10)
    for dsn in (bad, good):
        harness.fail(dsn)
        harness.queue.pass_time(1)
    opens = harness.spool.open

    def fails(queue_id: str, size: int) -> BodyFile:
        if queue_id == bad and not while_reading:
            raise OSError(errno.EIO, "Input/output error")
        body = opens(queue_id, size)
        if queue_id == bad:
            break_reads(body)
        return body

    monkeypatch.setattr(harness.spool, "open", fails)
    assert len(harness.generator.generate(10)) == 1
    assert (harness.pending(bad), harness.pending(good)) == (True, False)
    now = time.monotonic()
    monkeypatch.setattr("relay.dsn.generator.time.monotonic", lambda: now + PUT_OFF)
    assert harness.generator.generate(10) == []
    assert not harness.pending(bad)
    output = capsys.readouterr().out
    assert output.count("dsn failed") == 1
    assert output.count("dsn given up") == 1
    assert "the disk cannot read the body in its file" in output


def test_refused_dsn_and_its_successor_change_in_one_transaction(harness: DsnHarness) -> None:
    harness.fail(harness.accept())
    (dsn,) = harness.generator.generate(10)
    harness.fail(dsn)

    def fails(_: Any, __: Any, statement: str, *___: Any) -> None:
        if "SET due_at = NULL" in statement:
            raise ValueError("stands for a kill")

    event.listen(harness.queue.database, "before_cursor_execute", fails)
    assert harness.generator.generate(10) == []
    event.remove(harness.queue.database, "before_cursor_execute", fails)
    assert harness.pending(dsn)
    assert (harness.dsns(), harness.files()) == ([dsn], {dsn})
    (again,) = harness.another().generate(10)
    assert harness.files() == {again}


# --- mail of untrusted clients
# ---------------------------------------------------------------------------------------


def test_dsn_about_mail_of_an_untrusted_client_encloses_the_header_alone(
    harness: DsnHarness,
) -> None:
    """Otherwise the client could send a text to a victim by naming it as the sender."""
    ids = [
        harness.accept(sender=f"a{trusted}@example.com", ret="FULL", client_trusted=trusted)
        for trusted in (False, True, None)
    ]
    for queue_id in ids:
        harness.fail(queue_id)
    dsns = harness.generator.generate(10)
    kinds = {harness.text(n)["To"]: enclosed(harness, n) for n in dsns}
    full = ("full", "message/rfc822")
    assert kinds == {
        "aFalse@example.com": ("header", "text/rfc822-headers"),
        "aTrue@example.com": full,
        "aNone@example.com": full,
    }
    assert [b"x" * 61 in body_in(harness.spool.path(n)) for n in dsns] == [False, True, True]


def test_sender_gets_one_dsn_a_minute_about_mail_of_untrusted_clients(
    harness: DsnHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [
        harness.accept(sender=sender, client_trusted=trusted)
        for sender, trusted in [
            ("a@example.com", False),
            ("A@example.com", False),
            ("a@example.com", True),
            ("b@example.com", False),
        ]
    ]
    for queue_id in ids:
        harness.fail(queue_id)
    made = harness.generator.generate(10)
    assert [len(harness.dsns(queue_id)) for queue_id in ids] == [1, 0, 1, 1]
    assert len(made) == 3
    assert not any(harness.pending(queue_id) or harness.has_body(queue_id) for queue_id in ids)
    withheld = [harness.queue.delivery(queue_id)["dsn_withheld"] for queue_id in ids]
    assert withheld == [None, "rate", None, None]
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "dsn withheld" in line)
    assert ids[1] in line
    harness.queue.change("UPDATE dsn_limits SET last_at = @ago(61)")
    later = harness.accept(client_trusted=False)
    harness.fail(later)
    assert len(harness.another().generate(10)) == 1


def test_clock_set_back_withholds_no_dsn(harness: DsnHarness) -> None:
    harness.fail(harness.accept(client_trusted=False))
    assert len(harness.generator.generate(10)) == 1
    harness.queue.change("UPDATE dsn_limits SET last_at = @later(7200)")
    harness.fail(harness.accept(client_trusted=False))
    assert len(harness.generator.generate(10)) == 1


def test_limit_holds_for_all_generators_together(clean_postgres_url: str, spool: Spool) -> None:
    """The second waits for the COMMIT of the first, and then sees that a DSN was generated a moment
    ago."""
    with opened(clean_postgres_url) as queue:
        harness = DsnHarness(queue, spool)
        ids = [harness.accept(client_trusted=False) for _ in range(8)]
        for queue_id in ids:
            harness.fail(queue_id)
        sweepers = [harness.another() for _ in range(4)]
        with ThreadPoolExecutor(4) as threads:
            made = list(threads.map(lambda sweeper: sweeper.generate(10), sweepers))
        assert sum(map(len, made)) == 1
        assert not any(map(harness.pending, ids))


def test_untrusted_client_gets_no_dsn_about_mail_to_our_postmaster(harness: DsnHarness) -> None:
    ours = f"Postmaster@{harness.queue.settings.hostname}"
    alone, mixed, trusted = (
        harness.accept(ours, sender="a1@example.com", client_trusted=False),
        harness.accept(
            "postmaster", "b@example.org", ours, sender="a2@example.com", client_trusted=False
        ),
        harness.accept(ours, sender="a3@example.com", client_trusted=True),
    )
    for queue_id in (alone, mixed, trusted):
        harness.fail(queue_id)
    made = harness.generator.generate(10)
    assert {harness.text(dsn)["To"]: harness.reported(dsn) for dsn in made} == {
        "a2@example.com": [("b@example.org", "failed")],
        "a3@example.com": [(ours, "failed")],
    }
    assert [harness.queue.delivery(one)["dsn_withheld"] for one in (alone, mixed, trusted)] == [
        "postmaster",
        None,
        None,
    ]
    assert not any(map(harness.pending, (alone, mixed, trusted)))


def test_warning_about_mail_of_an_untrusted_client_counts_for_the_limit(late: DsnHarness) -> None:
    ids = [late.accept(client_trusted=False) for _ in range(2)]
    for queue_id in ids:
        late.age(queue_id)
    assert len(late.generator.warn(10)) == 1
    assert late.generator.warn(10) == [], "a withheld warning is not repeated"
    late.fail(ids[0])
    assert late.generator.generate(10) == []
    assert late.queue.delivery(ids[0])["dsn_withheld"] == "rate"


def test_cleaner_removes_limits_that_are_over(harness: DsnHarness) -> None:
    for sender in ("a@example.com", "b@example.com"):
        harness.fail(harness.accept(sender=sender, client_trusted=False))
    assert len(harness.generator.generate(10)) == 2
    harness.queue.change(
        "UPDATE dsn_limits SET last_at = @ago(1000) WHERE sender = :old", old="a@example.com"
    )
    Cleaner(harness.queue.settings, harness.queue.database, harness.spool).clean()
    assert harness.queue.rows("SELECT sender FROM dsn_limits") == [{"sender": "b@example.com"}]


def test_without_bounces_no_dsn_is_pending(with_settings: Any) -> None:
    harness = with_settings(bounces="off")
    queue_id = harness.accept()
    harness.fail(queue_id)
    assert not harness.pending(queue_id)
    assert harness.generator.generate(10) == []


@pytest.mark.parametrize(
    ("notify", "sent"),
    [
        (None, True),
        ("FAILURE", True),
        ("SUCCESS,FAILURE", True),
        ("failure,delay", True),
        ("NEVER", False),
        ("DELAY", False),
        ("SUCCESS", False),
    ],
)
def test_NOTIFY_decides_whether_a_dsn_is_generated(
    harness: DsnHarness, notify: str | None, sent: bool
) -> None:
    queue_id = harness.accept(notify=notify)
    harness.fail(queue_id)
    assert len(harness.generator.generate(10)) == sent
    assert not harness.pending(queue_id)
    assert not harness.has_body(queue_id)


def test_NOTIFY_is_for_each_recipient(harness: DsnHarness) -> None:
    queue_id = harness.accept("x@example.org", "y@example.org", "z@example.org")
    harness.queue.change("UPDATE recipients SET notify = 'NEVER' WHERE position = 2")
    harness.fail(queue_id)
    (dsn,) = harness.generator.generate(10)
    assert harness.reported(dsn) == [("x@example.org", "failed"), ("z@example.org", "failed")]


@pytest.mark.parametrize(
    ("ret", "body", "kind"),
    [
        (None, BODY, "message/rfc822"),
        ("FULL", BODY, "message/rfc822"),
        ("HDRS", BODY, "text/rfc822-headers"),
        (None, BODY + b"x" * LONGEST_RETURNED, "text/rfc822-headers"),
        (
            "HDRS",
            b"X-Long: " + b"x" * 100 + b"\n" + b"X: y\n" * LONGEST_RETURNED,
            "text/rfc822-headers",
        ),
    ],
)
def test_RET_decides_what_a_dsn_encloses(
    harness: DsnHarness, ret: str | None, body: bytes, kind: str
) -> None:
    queue_id = harness.accept(ret=ret, body=body)
    harness.fail(queue_id)
    (dsn,) = harness.generator.generate(10)
    last = list(harness.text(dsn).iter_parts())[-1]
    assert last.get_content_type() == kind
    wire = body_in(harness.spool.path(dsn))
    assert (body in wire) == (kind == "message/rfc822")
    assert body.split(b"\n")[0] in wire
    assert len(wire) < LONGEST_RETURNED + 5000


def test_ENVID_and_ORCPT_are_in_the_dsn(harness: DsnHarness) -> None:
    queue_id = harness.accept(envid="an+2Did", orcpt="rfc822;first+40example.org")
    harness.fail(queue_id)
    (dsn,) = harness.generator.generate(10)
    wire = body_in(harness.spool.path(dsn)).decode()
    assert "\nOriginal-Envelope-Id: an-id\n" in wire
    assert "\nOriginal-Recipient: rfc822; first@example.org\n" in wire


def test_original_that_is_missing_or_truncated_is_not_returned(harness: DsnHarness) -> None:
    gone, cut = harness.accept(), harness.accept()
    for queue_id in (gone, cut):
        harness.fail(queue_id)
    harness.spool.path(gone).unlink()
    os.truncate(harness.spool.path(cut), 5)
    dsns = harness.generator.generate(10)
    assert [len(list(harness.text(dsn).iter_parts())) for dsn in dsns] == [2, 2]


def test_8_bit_original_is_declared(harness: DsnHarness) -> None:
    for body in (BODY, BODY + b"\xff\n"):
        harness.fail(harness.accept(body=body))
    plain, eight = harness.generator.generate(10)
    types = harness.queue.rows(
        "SELECT @hex(id) AS id, body_type FROM messages WHERE dsn_of IS NOT NULL"
    )
    assert {row["id"]: row["body_type"] for row in types} == {plain: "7BIT", eight: "8BITMIME"}


# --- refused because of the relay
# ------------------------------------------------------------------------


US = "Error: relay.example[192.0.2.1] is not authorized to use this service"


def test_delivery_that_was_refused_because_of_the_relay_is_deferred_without_a_dsn(
    harness: DsnHarness,
) -> None:
    queue_id = harness.accept()
    (claim,) = harness.fail(queue_id, reply=US)
    assert harness.generator.generate(10) == []
    row = harness.queue.delivery(queue_id)
    assert (row["state"], row["finished_at"]) == ("deferred", None)
    assert row["due_in"] == pytest.approx(GATHER, abs=20)
    assert harness.has_body(queue_id)
    harness.queue.pass_time(100)
    harness.queue.rescuer.requeue_due(10)
    (again,) = harness.queue.claim(queue_id)
    assert (again.claim, again.recipients) == (2, claim.recipients)
    assert harness.queue.complete(again, Outcome.DELIVERED).state is State.DELIVERED


def test_only_deliveries_refused_because_of_the_relay_are_deferred(harness: DsnHarness) -> None:
    queue_id = harness.accept("x@example.org", "bulk:y@example.org")
    first, second = sorted(
        harness.queue.claim(queue_id, capacity=ROOM), key=lambda claim: claim.number
    )
    harness.queue.complete(first, Outcome.REJECTED, reply=US)
    harness.queue.complete(second, Outcome.REJECTED)
    made = harness.generator.generate(10) + harness.generator.generate(10)
    assert [harness.reported(dsn) for dsn in made] == [[("y@example.org", "failed")]]
    assert harness.queue.state(queue_id, 1) == "deferred"


def test_delivery_that_expired_unauthorized_is_reported(harness: DsnHarness) -> None:
    queue_id = harness.accept()
    (claim,) = harness.queue.claim(queue_id)
    harness.queue.pass_time(2000)
    harness.queue.complete(claim, Outcome.REJECTED, state=State.DEFERRED, reply=US)
    assert harness.queue.state(queue_id) == "expired"
    (dsn,) = harness.generator.generate(10)
    assert harness.reported(dsn) == [("b@example.org", "failed")]
    assert not harness.pending(queue_id)


def test_bounce_by_an_operator_is_not_reported_as_a_reply(harness: DsnHarness) -> None:
    queue_id = harness.accept()
    harness.fail(queue_id, Outcome.DEFERRED, reply=US)
    QueueOperations(harness.queue.database, sends_dsns=True).apply(
        OPERATIONS["bounce"],
        Filter(id=queue_id),
        actor="me",
        reason="spam run, not authorized to use this service",
    )
    (dsn,) = harness.generator.generate(10)
    report = " ".join(body_in(harness.spool.path(dsn)).decode().split())
    assert "An operator of this relay bounced it: spam run, not authorized" in report
    assert "refused" not in report
    assert "Diagnostic-Code" not in report


def test_reported_bounce_is_not_reclassified(harness: DsnHarness) -> None:
    queue_id = harness.accept()
    harness.fail(queue_id)
    assert len(harness.generator.generate(10)) == 1
    harness.queue.change(
        "UPDATE deliveries SET last_reply = :us WHERE queue_id = @id(:id)", us=US, id=queue_id
    )
    assert harness.generator.generate(10) == []
    assert harness.queue.state(queue_id) == "bounced"


# --- warnings
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def late(with_settings: Any) -> DsnHarness:
    """A queue whose mail is late after four hours."""
    harness: DsnHarness = with_settings(delay_warning=4 * HOUR)
    return harness


def test_delay_is_reported_once(late: DsnHarness) -> None:
    queue_id = late.accept()
    late.fail(queue_id, Outcome.DEFERRED, reply="busy (#4.3.2)")
    late.age(queue_id, 3 * HOUR)
    assert late.another().warn(10) == []
    late.age(queue_id)
    (warning,) = late.generator.warn(10)
    assert late.generator.warn(10) == [] == late.another().warn(10)
    assert late.reported(warning) == [("b@example.org", "delayed")]
    assert [part.get_content_type() for part in late.text(warning).iter_parts()][
        2
    ] == "text/rfc822-headers"
    assert late.queue.state(queue_id) == "deferred"
    assert late.queue.delivery(queue_id)["due_in"] > 0
    assert late.has_body(queue_id)


def test_a_warning_and_then_a_bounce(late: DsnHarness) -> None:
    queue_id = late.accept()
    late.fail(queue_id, Outcome.DEFERRED)
    late.age(queue_id)
    (warning,) = late.generator.warn(10)
    late.queue.pass_time(100)
    late.queue.rescuer.requeue_due(10)
    late.fail(queue_id)
    (bounce,) = late.generator.generate(10)
    assert [late.reported(dsn)[0][1] for dsn in (warning, bounce)] == ["delayed", "failed"]


def test_delivery_that_is_being_sent_can_be_late(late: DsnHarness) -> None:
    queue_id = late.accept()
    late.age(queue_id)
    (claim,) = late.queue.claim(queue_id)
    assert len(late.generator.warn(10)) == 1
    assert late.queue.complete(claim, Outcome.DELIVERED).state is State.DELIVERED
    assert late.generator.warn(10) == []


def test_delivery_without_attempts_can_be_late(late: DsnHarness) -> None:
    late.age(late.accept())
    (warning,) = late.generator.warn(10)
    assert "has not been tried yet" in " ".join(body_in(late.spool.path(warning)).decode().split())


def test_kill_between_retry_and_warning_loses_no_warning(late: DsnHarness) -> None:
    queue_id = late.accept()
    late.fail(queue_id, Outcome.DEFERRED)
    late.age(queue_id)
    late.queue.pass_time(100)
    late.queue.rescuer.requeue_due(10)  # and killed
    late.fail(queue_id, Outcome.DEFERRED)
    assert len(late.another().warn(10)) == 1


def test_lateness_does_not_depend_on_the_clock_of_a_worker(
    late: DsnHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    late.accept()

    class Fast(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(hours=5)

    monkeypatch.setattr("relay.dsn.generator.datetime", Fast)
    assert late.generator.warn(10) == []


def test_held_mail_is_warned_of_after_its_release(late: DsnHarness) -> None:
    queue_id = late.accept()
    late.age(queue_id)
    operations = QueueOperations(late.queue.database, sends_dsns=True)
    operations.apply(OPERATIONS["hold"], Filter(id=queue_id), actor="ann@host", reason="looks odd")
    assert late.another().warn(10) == []
    operations.apply(OPERATIONS["release"], Filter(id=queue_id), actor="ann@host", reason="")
    (warning,) = late.generator.warn(10)
    assert "ann@host" not in body_in(late.spool.path(warning)).decode()


def test_warning_reports_the_waiting_recipients_and_is_not_repeated_after_a_split(
    late: DsnHarness,
) -> None:
    queue_id = late.accept(*(f"{n}@example.org" for n in "pqrs"), "bulk:done@example.org")
    late.queue.change("UPDATE recipients SET notify = 'FAILURE' WHERE position = 2")
    claims = {claim.route: claim for claim in late.queue.claim(queue_id, capacity=ROOM)}
    late.queue.complete(claims["bulk"], Outcome.DELIVERED)
    late.age(queue_id)
    (warning,) = late.generator.warn(10)
    assert late.reported(warning) == [(f"{n}@example.org", "delayed") for n in "prs"]
    late.queue.complete(
        claims["default"], Outcome.REJECTED, state=State.SPLIT, reply="unknown (#5.1.1)"
    )
    assert late.queue.state(queue_id, 1) == "split"
    assert late.generator.warn(10) == [] == late.another().warn(10)


def test_a_call_warns_of_a_bounded_number_of_deliveries(late: DsnHarness) -> None:
    ids = [late.accept() for _ in range(10)]
    for queue_id in ids[1:]:
        late.age(queue_id)
    assert [len(late.generator.warn(2)) for _ in range(6)] == [2, 2, 2, 2, 1, 0]
    late.age(ids[0])
    assert len(late.another().warn(2)) == 1
    assert [len(late.dsns(queue_id)) for queue_id in ids] == [1] * 10


def test_parts_of_a_delivery_are_late_when_it_would_have_been(late: DsnHarness) -> None:
    queue_id = late.accept(*(f"{n}@example.org" for n in "pq"))
    late.fail(queue_id, state=State.SPLIT)
    assert late.generator.warn(10) == []
    late.age(queue_id)
    (warning,) = late.generator.warn(10)
    assert late.reported(warning) == [(f"{n}@example.org", "delayed") for n in "pq"]
    assert late.generator.warn(10) == []


def test_part_of_a_delivery_whose_sender_was_warned_is_marked(late: DsnHarness) -> None:
    queue_id = late.accept(*(f"{n}@example.org" for n in "pq"))
    late.age(queue_id)
    assert len(late.generator.warn(10)) == 1
    late.fail(queue_id, state=State.SPLIT)
    pieces = late.queue.rows("SELECT warn_at, warned_at FROM deliveries WHERE parent IS NOT NULL")
    assert [(row["warn_at"], row["warned_at"] is None) for row in pieces] == [(None, False)] * 2


def test_delivery_that_was_locked_during_the_warning_is_not_warned_of_again(
    clean_postgres_url: str, spool: Spool
) -> None:
    with opened(clean_postgres_url, delay_warning=4 * HOUR) as queue:
        harness = DsnHarness(queue, spool)
        queue_id = harness.accept("x@example.org", "bulk:y@example.org")
        harness.age(queue_id)
        with queue.database.connect() as busy:
            busy.execute(text("SELECT 1 FROM deliveries WHERE number = 1 FOR UPDATE"))
            assert len(harness.generator.warn(10)) == 1
        assert queue.delivery(queue_id)["warn_at"] is not None
        assert harness.generator.warn(10) == []
        assert queue.delivery(queue_id)["warn_at"] is None


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({"delay_warning": None}, {}),
        ({"delay_warning": 6 * HOUR}, {}),
        ({"bounces": "off"}, {}),
        ({}, {"notify": "NEVER"}),
        ({}, {"notify": "FAILURE"}),
        ({}, {"sender": ""}),
        ({}, {"sender": "#@[]"}),
    ],
)
def test_delay_is_not_reported_while_warnings_are_off(
    with_settings: Any, settings: dict[str, Any], given: dict[str, Any]
) -> None:
    harness = with_settings(**({"delay_warning": 4 * HOUR} | settings))
    queue_id = harness.accept(**given)
    harness.fail(queue_id, Outcome.DEFERRED)
    harness.age(queue_id)
    assert harness.generator.warn(10) == []
    assert harness.dsns() == []


# --- failures
# --------------------------------------------------------------------------------------


def test_original_that_cannot_be_read_is_not_returned(
    harness: DsnHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = harness.accept(), harness.accept()
    for queue_id in (bad, good):
        harness.fail(queue_id)
    opens = harness.spool.open

    def fails(queue_id: str, size: int) -> BodyFile:
        body = opens(queue_id, size)
        if queue_id == bad:
            break_reads(body)
        return body

    monkeypatch.setattr(harness.spool, "open", fails)
    first, second = harness.generator.generate(10)
    assert [len(list(harness.text(dsn).iter_parts())) for dsn in (first, second)] == [2, 3]
    assert "could not be read" in " ".join(body_in(harness.spool.path(first)).decode().split())


def test_message_that_fails_delays_no_other(
    late: DsnHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it is the oldest, and a call handles a bounded number of messages."""
    ids = [late.accept() for _ in range(5)]
    for queue_id in ids[:4]:
        late.fail(queue_id)
        late.queue.pass_time(1)
    bad = {ids[0], ids[1], ids[4]}

    def fails(*parameters: Any, **more: Any) -> bytes:
        if parameters[3].id in bad:
            raise ValueError("stands for a defect of the relay")
        return compose(*parameters, **more)

    monkeypatch.setattr("relay.dsn.generator.compose", fails)
    late.age(ids[4])
    assert [len(late.generator.generate(2)) for _ in range(3)] == [0, 2, 0]
    assert late.generator.warn(10) == []
    assert [late.pending(queue_id) for queue_id in ids] == [True, True, False, False, False]
    bad.clear()
    assert late.generator.generate(2) == [] == late.generator.warn(2), "they failed a moment ago"
    now = time.monotonic()
    monkeypatch.setattr("relay.dsn.generator.time.monotonic", lambda: now + PUT_OFF)
    assert len(late.generator.generate(2)) == 2
    assert len(late.generator.warn(2)) == 1


def test_pending_dsn_without_recipients_is_cleared(harness: DsnHarness) -> None:
    queue_id = harness.accept()
    harness.fail(queue_id)
    harness.queue.change("DELETE FROM recipients")
    assert harness.generator.generate(10) == []
    assert not harness.pending(queue_id)


def test_full_spool_leaves_the_dsn_pending(
    harness: DsnHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_id = harness.accept()
    harness.fail(queue_id)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(harness.spool, "store", full)
        with pytest.raises(OSError, match="No space"):
            harness.generator.generate(10)
    assert harness.pending(queue_id)
    assert harness.has_body(queue_id)
    assert len(harness.another().generate(10)) == 1


def test_due_at_and_the_dsn_change_in_one_transaction(harness: DsnHarness) -> None:
    """A fault at any statement of it leaves either nothing or everything."""
    for at in range(1, 40):
        queue_id = harness.accept()
        harness.fail(queue_id)
        counted = [0]

        def fault(*_: Any, at: int = at, counted: list[int] = counted) -> None:
            counted[0] += 1
            if counted[0] == at:
                raise RuntimeError("stands for a connection that breaks")

        event.listen(harness.queue.database, "before_cursor_execute", fault)
        try:
            finished = len(harness.another().generate(10)) == 1
        except RuntimeError:
            finished = False
        finally:
            event.remove(harness.queue.database, "before_cursor_execute", fault)
        assert len(harness.dsns(queue_id)) == (not harness.pending(queue_id))
        if finished:
            return
        assert harness.has_body(queue_id)
        if harness.dsns(queue_id):  # after the COMMIT: the body stays for the cleaner
            continue
        assert harness.files() <= {queue_id, *harness.dsns()}
        assert len(harness.another().generate(10)) == 1
    raise AssertionError("it never came through")


def test_the_original_is_returned_with_the_fields_of_plugins(harness: DsnHarness) -> None:
    queue_id = harness.accept(prefix="X-Spam: maybe\n")
    harness.fail(queue_id)
    (dsn,) = harness.generator.generate(10)
    text = body_in(harness.spool.path(dsn))
    assert b"\nX-Spam: maybe\nReceived: by relay\nSubject: original\n" in text
