"""Debts, on both databases: every notice that is owed is made once, whoever is killed where, and nothing else is."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any, cast

import pytest
from sqlalchemy import Connection, event, text

from relay.bodies import Spool
from relay.claims import Claim, Recorded
from relay.debts import GATHER, LONGEST_RETURNED, Debts
from relay.filters import Filter
from relay.ids import new_id
from relay.intake import NewMessage, NewRecipient
from relay.schema import NEEDS_BODY, Outcome, State
from relay.verbs import VERBS, Verbs
from tests.integration.office import Office, opened

BODY = b"Received: by relay\nSubject: original\n\n" + b"x" * 61 + b"\n"
ROOM = {"default": 100, "bulk": 100, "other": 100}


class Post:
    """An office with bodies, and a sweeper that settles its debts."""

    def __init__(self, office: Office, spool: Spool) -> None:
        self.office, self.spool = office, spool
        self.debts = self.another()

    def another(self) -> Debts:
        """Debts as another process settles them."""
        return Debts(self.office.engine, self.spool, self.office.settings, lambda address: "default")

    def accept(self, *addresses: str, body: bytes = BODY, **given: Any) -> str:
        """A message with its body; `route:address` says which way."""
        message_id = new_id()
        self.spool.store(message_id, [body])
        ways = [address.rpartition(":") for address in addresses or ("b@example.org",)]
        dsn = {key: given.pop(key) for key in ("notify", "orcpt") if key in given}
        recipients = [NewRecipient(address, route=route or "default", **dsn) for route, _, address in ways]
        sender = given.pop("sender", "a@example.com")
        message = NewMessage(message_id, sender, len(body), recipients, "192.0.2.1", "client", "ESMTP", **given)
        self.office.intake.commit([message])
        return message_id

    def fail(self, message_id: str, outcome: Outcome = Outcome.REJECTED, **more: Any) -> list[Claim]:
        """Every delivery of it that is queued ends so."""
        claims = self.office.claim(message_id, room=ROOM)
        for claim in claims:
            self.office.record(claim, outcome, **more)
        return claims

    def notices(self, message_id: str | None = None) -> list[str]:
        """The notices there are, about a message or about anything."""
        rows = self.office.rows("SELECT @hex(id) AS id, @hex(notice_of) AS about FROM messages ORDER BY id")
        return [row["id"] for row in rows if row["about"] is not None and message_id in (None, row["about"])]

    def text(self, notice: str) -> EmailMessage:
        return message_from_bytes(self.spool.path(notice).read_bytes(), policy=policy.default)

    def told(self, notice: str) -> list[tuple[str, str]]:
        """Recipient and action of each group of a notice."""
        status = cast(list[Any], self.text(notice).get_payload())[1]
        groups = [dict(group.items()) for group in status.get_payload()][1:]
        return [(g["Final-Recipient"].removeprefix("rfc822; "), g["Action"]) for g in groups if g]

    def owing(self, message_id: str) -> bool:
        sql = "SELECT due_at FROM deliveries WHERE message_id = @id(:id) AND state IN ('bounced', 'expired')"
        return any(row["due_at"] is not None for row in self.office.rows(sql, id=message_id))

    def kept(self, message_id: str) -> bool:
        return self.spool.path(message_id).exists()


@pytest.fixture
def post(office: Office, spool: Spool) -> Post:
    return Post(office, spool)


@pytest.fixture
def with_settings(clean_url: str, spool: Spool) -> Iterator[Any]:
    opened_ones: list[Any] = []

    def make(**given: Any) -> Post:
        context = opened(clean_url, **given)
        opened_ones.append(context)
        return Post(context.__enter__(), spool)

    yield make
    for context in opened_ones:
        context.__exit__(None, None, None)


def test_a_notice_is_made_once_and_is_a_message_like_any_other(post: Post) -> None:
    message_id = post.accept(header_message_id="<1@client>")
    post.fail(message_id)
    assert post.owing(message_id)
    (notice,) = post.debts.settle(10)
    assert post.debts.settle(10) == [] == post.another().settle(10)
    assert post.notices() == [notice]
    assert not post.owing(message_id)
    (row,) = post.office.rows("SELECT * FROM messages WHERE id = @id(:id)", id=notice)
    assert (row["sender"], row["protocol"], row["size"]) == ("", "NOTICE", post.spool.path(notice).stat().st_size)
    (claim,) = post.office.claim(notice)
    assert (claim.sender, claim.recipients, claim.size) == ("", ("a@example.com",), row["size"])
    assert post.text(notice)["To"] == "a@example.com"
    assert post.told(notice) == [("b@example.org", "failed")]


def test_an_expired_message_is_told_of_too(post: Post) -> None:
    message_id = post.accept()
    claims = post.office.claim(message_id)
    post.office.pass_time(2000)
    post.office.record(claims[0], Outcome.DEFERRED)
    assert post.office.state(message_id) == "expired"
    (notice,) = post.debts.settle(10)
    assert "5.4.7" in post.spool.path(notice).read_text()


def test_the_original_stays_until_its_notice_is_made(post: Post) -> None:
    message_id = post.accept()
    post.fail(message_id)
    needed = f"SELECT 1 FROM deliveries WHERE message_id = @id(:id) AND {NEEDS_BODY}"
    assert post.office.rows(needed, id=message_id)
    assert post.kept(message_id)
    (notice,) = post.debts.settle(10)
    assert BODY in post.spool.path(notice).read_bytes()
    assert not post.kept(message_id)
    assert not post.office.rows(needed, id=message_id)


def test_an_original_that_another_delivery_needs_stays(post: Post) -> None:
    message_id = post.accept("x@example.org", "bulk:y@example.org")
    first, second = sorted(post.office.claim(message_id, room=ROOM), key=lambda claim: claim.number)
    post.office.record(first, Outcome.REJECTED)
    post.office.record(second, Outcome.DEFERRED, delay=1e6)
    assert len(post.debts.settle(10)) == 1
    assert post.kept(message_id)


def test_an_original_whose_last_deliveries_end_at_the_same_moment_goes(
    clean_postgres_url: str, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(clean_postgres_url) as office:
        post = Post(office, spool)
        message_id = post.accept("x@example.org", "bulk:y@example.org")
        first, second = sorted(office.claim(message_id, room=ROOM), key=lambda claim: claim.number)
        office.record(first, Outcome.REJECTED)
        office.pass_time(GATHER + 5)
        met: list[Recorded] = []
        stored: list[str] = []
        store = spool.store

        def note_it(notice: str, parts: Any) -> int:
            stored.append(notice)
            return store(notice, parts)

        def deliver(_: Connection) -> None:
            if not met and stored:
                met.append(Recorded(None, body_free=False))
                met[0] = office.record(second, Outcome.ACCEPTED)

        monkeypatch.setattr(spool, "store", note_it)
        event.listen(office.engine, "commit", deliver)  # just before the COMMIT that clears the debt
        assert len(post.debts.settle(10)) == 1
        assert met == [Recorded(State.DELIVERED, body_free=False)], "it does not see the debt being cleared"
        assert not post.kept(message_id)


def test_killed_between_body_and_commit_the_next_makes_the_same_notice_and_replaces_the_file(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    message_id = post.accept()
    post.fail(message_id)

    class Killed(BaseException):
        """Stands for kill -9: nothing is caught, nothing is cleaned up, the database rolls back."""

    left: list[str] = []
    store = post.spool.store

    def killed(notice: str, parts: Any) -> int:
        left.append(notice)
        store(notice, [b"half"])
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(post.spool, "store", killed)
        with pytest.raises(Killed):
            post.debts.settle(10)
    assert post.owing(message_id)
    assert post.kept(message_id)
    assert post.notices() == []
    assert post.spool.path(left[0]).read_bytes() == b"half"
    assert post.another().settle(10) == left
    assert post.told(left[0]) == [("b@example.org", "failed")]
    sizes = post.office.rows("SELECT size FROM messages WHERE id = @id(:id)", id=left[0])
    assert sizes == [{"size": post.spool.path(left[0]).stat().st_size}]


def test_killed_after_the_commit_there_is_one_and_the_body_is_for_housekeeping(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    message_id = post.accept()
    post.fail(message_id)
    monkeypatch.setattr(post.spool, "remove", lambda message_id: False)
    (notice,) = post.debts.settle(10)
    assert post.another().settle(10) == []
    assert post.notices() == [notice]
    assert post.kept(message_id)


def test_two_sweepers_make_each_notice_once(post: Post) -> None:
    ids = [post.accept("x@example.org", "bulk:y@example.org") for _ in range(15)]
    for message_id in ids:
        post.fail(message_id)
    barrier = threading.Barrier(2)

    def settle(debts: Debts) -> list[str]:
        barrier.wait(10)
        return [notice for _ in range(3) for notice in debts.settle(10)]

    with ThreadPoolExecutor(2) as pool:
        made = [notice for part in pool.map(settle, (post.debts, post.another())) for notice in part]
    made += post.debts.settle(50)
    assert sorted(made) == post.notices()
    for message_id in ids:
        told = [address for notice in post.notices(message_id) for address, _ in post.told(notice)]
        assert sorted(told) == ["x@example.org", "y@example.org"], "each recipient in exactly one notice"


def test_a_second_sweeper_skips_what_the_first_is_at(
    clean_postgres_url: str, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(clean_postgres_url) as office:
        post = Post(office, spool)
        message_id = post.accept()
        post.fail(message_id)
        meanwhile: list[list[str]] = []

        def other() -> None:
            if not meanwhile:
                meanwhile.append([])
                meanwhile[0] = post.another().settle(10)

        store = spool.store

        def store_with_company(notice: str, parts: Any) -> int:
            other()
            return store(notice, parts)

        monkeypatch.setattr(spool, "store", store_with_company)
        (notice,) = post.debts.settle(10)
        assert meanwhile == [[]], "it did not wait, and had nothing to do"
        assert post.notices() == [notice]


def test_two_sweepers_warn_once_though_each_found_another_delivery_due(
    clean_postgres_url: str, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(clean_postgres_url, delay_warning=1e-6) as office:
        post = Post(office, spool)
        message_id = post.accept("x@example.org", "bulk:y@example.org")
        busy = office.engine.connect()  # a worker that records something of the first
        busy.execute(text("SELECT 1 FROM deliveries WHERE number = 1 FOR UPDATE"))
        meanwhile: list[list[str]] = []
        store = spool.store

        def store_with_company(notice: str, parts: Any) -> int:
            busy.close()
            if not meanwhile:
                meanwhile.append([])
                meanwhile[0] = post.another().warn([message_id])
            return store(notice, parts)

        monkeypatch.setattr(spool, "store", store_with_company)
        (warning,) = post.debts.warn([message_id])
        assert meanwhile == [[]]
        assert post.told(warning) == [("y@example.org", "delayed")]
        assert post.notices(message_id) == [warning]


def test_deliveries_of_one_message_stand_in_one_notice(post: Post) -> None:
    message_id = post.accept("x@example.org", "bulk:y@example.org", "other:z@example.org")
    one, two, three = sorted(post.office.claim(message_id, room=ROOM), key=lambda claim: claim.number)
    post.office.record(one, Outcome.REJECTED)
    assert post.debts.settle(10) == [], "the others are about to be decided"
    post.office.record(two, Outcome.ACCEPTED)
    post.office.record(three, Outcome.REJECTED)
    (notice,) = post.debts.settle(10)
    assert post.told(notice) == [("x@example.org", "failed"), ("z@example.org", "failed")]


def test_a_debt_does_not_wait_long_for_the_others(post: Post) -> None:
    message_id = post.accept("x@example.org", "bulk:y@example.org")
    first, second = sorted(post.office.claim(message_id, room=ROOM), key=lambda claim: claim.number)
    post.office.record(first, Outcome.REJECTED)
    post.office.pass_time(GATHER + 5)
    (early,) = post.debts.settle(10)
    assert post.told(early) == [("x@example.org", "failed")]
    assert post.kept(message_id)
    post.office.record(second, Outcome.REJECTED)
    (late,) = post.debts.settle(10)
    assert late != early
    assert post.told(late) == [("y@example.org", "failed")]


@pytest.mark.parametrize("sender", ["", "#@[]"])
def test_nothing_is_said_about_a_notice(post: Post, sender: str) -> None:
    message_id = post.accept(sender=sender)
    post.fail(message_id)
    assert not post.owing(message_id)
    assert post.debts.settle(10) == []
    # ... not even if a debt stands in the database for some reason.
    post.office.change("UPDATE deliveries SET due_at = @ago(100)")
    assert post.debts.settle(10) == []
    assert not post.owing(message_id)
    assert post.notices() == []


def test_a_notice_that_fails_is_recorded_and_ends_there(post: Post) -> None:
    post.fail(post.accept())
    (notice,) = post.debts.settle(10)
    post.fail(notice)
    assert post.office.state(notice) == "bounced"
    assert post.office.delivery(notice)["last_reply"] == "its words"
    assert post.debts.settle(10) == []
    assert len(post.notices()) == 1


def test_without_bounces_nothing_is_owed(with_settings: Any) -> None:
    post = with_settings(bounces="off")
    message_id = post.accept()
    post.fail(message_id)
    assert not post.owing(message_id)
    assert post.debts.settle(10) == []


@pytest.mark.parametrize(("notify", "told"), [
    (None, True), ("FAILURE", True), ("SUCCESS,FAILURE", True), ("failure,delay", True), ("NEVER", False),
    ("DELAY", False), ("SUCCESS", False),
])  # fmt: skip
def test_NOTIFY_says_who_wants_to_know(post: Post, notify: str | None, told: bool) -> None:
    message_id = post.accept(notify=notify)
    post.fail(message_id)
    assert len(post.debts.settle(10)) == told
    assert not post.owing(message_id)
    assert not post.kept(message_id)


def test_NOTIFY_is_for_each_recipient(post: Post) -> None:
    message_id = post.accept("x@example.org", "y@example.org", "z@example.org")
    post.office.change("UPDATE recipients SET notify = 'NEVER' WHERE position = 2")
    post.fail(message_id)
    (notice,) = post.debts.settle(10)
    assert post.told(notice) == [("x@example.org", "failed"), ("z@example.org", "failed")]


@pytest.mark.parametrize(("ret", "body", "kind"), [
    (None, BODY, "message/rfc822"), ("FULL", BODY, "message/rfc822"), ("HDRS", BODY, "text/rfc822-headers"),
    (None, BODY + b"x" * LONGEST_RETURNED, "text/rfc822-headers"),
    ("HDRS", b"X-Long: " + b"x" * 100 + b"\n" + b"X: y\n" * LONGEST_RETURNED, "text/rfc822-headers"),
])  # fmt: skip
def test_RET_says_how_much_comes_back(post: Post, ret: str | None, body: bytes, kind: str) -> None:
    message_id = post.accept(ret=ret, body=body)
    post.fail(message_id)
    (notice,) = post.debts.settle(10)
    last = list(post.text(notice).iter_parts())[-1]
    assert last.get_content_type() == kind
    wire = post.spool.path(notice).read_bytes()
    assert (body in wire) == (kind == "message/rfc822")
    assert body.split(b"\n")[0] in wire
    assert len(wire) < LONGEST_RETURNED + 5000


def test_ENVID_and_ORCPT_reach_the_notice(post: Post) -> None:
    message_id = post.accept(envid="an+2Did", orcpt="rfc822;first+40example.org")
    post.fail(message_id)
    (notice,) = post.debts.settle(10)
    wire = post.spool.path(notice).read_text()
    assert "\nOriginal-Envelope-Id: an-id\n" in wire
    assert "\nOriginal-Recipient: rfc822; first@example.org\n" in wire


def test_an_original_that_is_gone_or_cut_is_not_returned_and_hinders_nothing(post: Post) -> None:
    gone, cut = post.accept(), post.accept()
    for message_id in (gone, cut):
        post.fail(message_id)
    post.spool.path(gone).unlink()
    os.truncate(post.spool.path(cut), 5)
    notices = post.debts.settle(10)
    assert [len(list(post.text(notice).iter_parts())) for notice in notices] == [2, 2]


def test_an_8_bit_original_is_declared_as_such(post: Post) -> None:
    for body in (BODY, BODY + b"\xff\n"):
        post.fail(post.accept(body=body))
    plain, eight = post.debts.settle(10)
    types = post.office.rows("SELECT @hex(id) AS id, body_type FROM messages WHERE notice_of IS NOT NULL")
    assert {row["id"]: row["body_type"] for row in types} == {plain: "7BIT", eight: "8BITMIME"}


# --- what was refused for our sake ------------------------------------------------------------------------


US = "Error: relay.example[192.0.2.1] is not authorized to use this service"


def test_what_was_refused_for_our_sake_is_deferred_and_nobody_is_told(post: Post) -> None:
    message_id = post.accept()
    (claim,) = post.fail(message_id, reply=US)
    assert post.debts.settle(10) == []
    row = post.office.delivery(message_id)
    assert (row["state"], row["finished_at"]) == ("deferred", None)
    assert row["due_in"] == pytest.approx(GATHER, abs=20)
    assert post.kept(message_id)
    post.office.pass_time(100)
    post.office.sweeps.requeue_due(10)
    (again,) = post.office.claim(message_id)
    assert (again.claim, again.recipients) == (2, claim.recipients)
    assert post.office.record(again, Outcome.ACCEPTED).state is State.DELIVERED


def test_only_what_was_refused_for_our_sake_is_deferred(post: Post) -> None:
    message_id = post.accept("x@example.org", "bulk:y@example.org")
    first, second = sorted(post.office.claim(message_id, room=ROOM), key=lambda claim: claim.number)
    post.office.record(first, Outcome.REJECTED, reply=US)
    post.office.record(second, Outcome.REJECTED)
    made = post.debts.settle(10) + post.debts.settle(10)
    assert [post.told(notice) for notice in made] == [[("y@example.org", "failed")]]
    assert post.office.state(message_id, 1) == "deferred"


def test_what_we_were_not_let_in_with_until_it_expired_is_told_of(post: Post) -> None:
    message_id = post.accept()
    (claim,) = post.office.claim(message_id)
    post.office.pass_time(2000)
    post.office.record(claim, Outcome.REJECTED, state=State.DEFERRED, reply=US)
    assert post.office.state(message_id) == "expired"
    (notice,) = post.debts.settle(10)
    assert post.told(notice) == [("b@example.org", "failed")]
    assert not post.owing(message_id)


def test_what_an_operator_sends_back_is_not_put_into_the_servers_mouth(post: Post) -> None:
    message_id = post.accept()
    post.fail(message_id, Outcome.DEFERRED, reply=US)
    Verbs(post.office.engine, notices=True).apply(
        VERBS["bounce"], Filter(id=message_id), actor="me", reason="spam run, not authorized to use this service"
    )
    (notice,) = post.debts.settle(10)
    words = " ".join(post.spool.path(notice).read_text().split())
    assert "It was sent back by an operator of this relay: spam run, not authorized" in words
    assert "refused" not in words
    assert "Diagnostic-Code" not in words


def test_a_notice_that_was_made_is_not_taken_back(post: Post) -> None:
    message_id = post.accept()
    post.fail(message_id)
    assert len(post.debts.settle(10)) == 1
    post.office.change("UPDATE deliveries SET last_reply = :us WHERE message_id = @id(:id)", us=US, id=message_id)
    assert post.debts.settle(10) == []
    assert post.office.state(message_id) == "bounced"


# --- warnings ---------------------------------------------------------------------------------------------


def test_a_delay_is_told_once(with_settings: Any) -> None:
    post = with_settings(delay_warning=1e-6)
    message_id = post.accept()
    post.fail(message_id, Outcome.DEFERRED, reply="busy (#4.3.2)")
    (warning,) = post.debts.warn([message_id])
    assert post.debts.warn([message_id]) == [] == post.another().warn([message_id])
    assert post.told(warning) == [("b@example.org", "delayed")]
    assert [part.get_content_type() for part in post.text(warning).iter_parts()][2] == "text/rfc822-headers"
    assert post.office.state(message_id) == "deferred"
    assert post.office.delivery(message_id)["due_in"] > 0
    assert post.kept(message_id)


def test_a_warning_and_then_a_bounce(with_settings: Any) -> None:
    post = with_settings(delay_warning=1e-6)
    message_id = post.accept()
    post.fail(message_id, Outcome.DEFERRED)
    (warning,) = post.debts.warn([message_id])
    post.office.pass_time(100)
    post.office.sweeps.requeue_due(10)
    post.fail(message_id)
    (bounce,) = post.debts.settle(10)
    assert [post.told(notice)[0][1] for notice in (warning, bounce)] == ["delayed", "failed"]


def test_what_is_being_sent_again_is_late_too(with_settings: Any) -> None:
    """Its hint may be faster than whoever warns."""
    post = with_settings(delay_warning=1e-6)
    message_id = post.accept()
    (claim,) = post.office.claim(message_id)
    assert len(post.debts.warn([message_id])) == 1
    assert post.office.record(claim, Outcome.ACCEPTED).state is State.DELIVERED
    assert post.debts.warn([message_id]) == []


@pytest.mark.parametrize(("settings", "given"), [
    ({}, {}), ({"delay_warning": 3600.0}, {}), ({"delay_warning": 1e-6, "bounces": "off"}, {}),
    ({"delay_warning": 1e-6}, {"notify": "NEVER"}), ({"delay_warning": 1e-6}, {"notify": "FAILURE"}),
    ({"delay_warning": 1e-6}, {"sender": ""}),
])  # fmt: skip
def test_who_hears_of_no_delay(with_settings: Any, settings: dict[str, Any], given: dict[str, Any]) -> None:
    post = with_settings(**settings)
    message_id = post.accept(**given)
    post.fail(message_id, Outcome.DEFERRED)
    assert post.debts.warn([message_id]) == []
    assert post.notices() == []


def test_a_full_spool_leaves_the_debt_as_it_was(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    message_id = post.accept()
    post.fail(message_id)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(post.spool, "store", full)
        with pytest.raises(OSError, match="No space"):
            post.debts.settle(10)
    assert post.owing(message_id)
    assert post.kept(message_id)
    assert len(post.debts.settle(10)) == 1


def test_a_debt_and_its_notice_change_in_one_transaction(post: Post) -> None:
    """A fault at any statement of it leaves either nothing or everything."""
    for at in range(1, 40):
        message_id = post.accept()
        post.fail(message_id)
        counted = [0]

        def fault(*_: Any, at: int = at, counted: list[int] = counted) -> None:
            counted[0] += 1
            if counted[0] == at:
                raise RuntimeError("stands for a connection that breaks")

        event.listen(post.office.engine, "before_cursor_execute", fault)
        try:
            finished = len(post.debts.settle(10)) == 1
        except RuntimeError:
            finished = False
        finally:
            event.remove(post.office.engine, "before_cursor_execute", fault)
        assert len(post.notices(message_id)) == (not post.owing(message_id))
        if finished:
            return
        assert post.kept(message_id)
        if post.notices(message_id):  # after the COMMIT: the body stays for housekeeping
            continue
        assert len(post.debts.settle(10)) == 1
    raise AssertionError("it never came through")
