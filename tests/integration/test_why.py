"""`why` says one cause, which holds: what workers have written down, whatever the settings of who
asks."""

import re

import pytest

from relay.db.schema import Outcome
from relay.dsn.generator import DsnGenerator
from relay.spool.store import Spool
from tests.integration.office import Office
from tests.integration.typed import Typed, typed_at

ONE, TWO = "127.0.0.1:6280", "[::1]:628"


@pytest.fixture
def typed(office: Office, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Typed:
    monkeypatch.setenv("RELAY_QMQP_SERVERS", "192.0.2.99")  # not what the workers have
    return typed_at(office, spool, monkeypatch)


def overdue(office: Office) -> str:
    queue_id = office.accept()
    office.pass_time(60, only=[queue_id])
    return queue_id


def told(typed: Typed, queue_id: str) -> str:
    return str(typed("why", queue_id).stdout).strip()


def test_a_paused_server_is_named_with_who_and_why(office: Office, typed: Typed) -> None:
    queue_id = overdue(office)
    office.sweeps.publish_routes(office.worker, {"default": [ONE]})
    typed("pause", "--server", ONE, "--reason", "new disk")
    words = rf"b@example\.org: queued, and not sent because server {ONE} is paused until `resume` "
    assert re.fullmatch(words + r"\(by \S+@\S+ \d+s ago: new disk\)\.", told(typed, queue_id))
    other = office.hire()
    office.sweeps.publish_routes(other, {"default": [ONE, TWO]})
    assert "paused" not in told(typed, queue_id), "another worker has another server"
    office.sweeps.publish_open_circuits(other, {TWO: "no connection: Connection refused"})
    both = told(typed, queue_id)
    assert f"server {ONE} is paused" in both
    assert (
        f" and server {TWO} is left alone until it is tried again, within a minute (no connection: Conn"
        in both
    )
    third = office.hire()
    office.sweeps.publish_routes(third, {"default": [TWO]})
    assert "left alone" not in told(typed, queue_id), "one of those who know it would send there"


def test_what_is_wrong_with_a_route(office: Office, typed: Typed) -> None:
    queue_id = overdue(office)
    office.claim(office.accept())
    assert re.search(
        r"overdue for 5\ds: its turn has not come: 1 worker is busy with 1 other,",
        told(typed, queue_id),
    )
    office.sweeps.publish_routes(office.worker, {"default": []})
    assert told(typed, queue_id).endswith(
        "no QMQP server is configured for route default (RELAY_QMQP_SERVERS)."
    )
    office.sweeps.publish_routes(office.worker, {"bulk": [ONE]})
    assert "no worker knows a route default: `retry --reroute` gives it another" in told(
        typed, queue_id
    )
    typed("pause", "--server", "192.0.2.99")
    office.change("UPDATE workers SET lease_expires_at = @ago(1)")
    assert "because no worker is alive, and server 192.0.2.99:628 is paused until" in told(
        typed, queue_id
    )


def test_since_when_it_is_being_sent_comes_from_its_worker(office: Office, typed: Typed) -> None:
    queue_id = office.accept()
    office.claim(queue_id)
    office.pass_time(120, only=[queue_id])
    assert re.search(r"\(host 1\) since [-:0-9 ]+ \(2m( \ds)?\)\.$", told(typed, queue_id))
    office.change("UPDATE workers SET claim_seconds = claim_seconds - 60")
    assert re.search(r"since [-:0-9 ]+ \(1m( \ds)?\)\.$", told(typed, queue_id))


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (
            "no connection: 127.0.0.1:6280 Connection refused",
            "no server took a connection: 127.0.0.1:6280 Connection",
        ),
        (
            "mx:628 is left alone for a while: 450 go away",
            "because mx:628 is left alone for a while: 450 go",
        ),
        (
            "no QMQP server configured (RELAY_QMQP_SERVERS)",
            "because no QMQP server configured (RELAY",
        ),
    ],
)
def test_no_connection_is_said_once(office: Office, typed: Typed, reply: str, words: str) -> None:
    queue_id = office.accept()
    office.record(office.claim(queue_id)[0], Outcome.UNREACHABLE, reply=reply, server=None)
    assert f"{words}" in told(typed, queue_id)


def test_what_to_do_about_an_envelope_that_nobody_takes(office: Office, typed: Typed) -> None:
    queue_id = office.accept("x\n@example.org")
    reply = "no request can be made of it: no server can be trusted with the recipient <x"
    office.record(office.claim(queue_id)[0], Outcome.UNSENDABLE, reply=reply)
    advice = "release it: what can be sent is sent, and the rest bounces. It stays"
    assert f"it cannot be sent: {reply}; {advice}" in told(typed, queue_id)


def refused(office: Office, queue_id: str, reply: str = "550 go away") -> None:
    office.record(office.claim(queue_id)[0], Outcome.REJECTED, reply=reply)


def test_what_became_of_a_notice_and_what_it_is_about(
    office: Office, spool: Spool, typed: Typed
) -> None:
    debts = DsnGenerator(office.engine, spool, office.settings, lambda address: "default")
    queue_id = office.accept(ret="FULL")
    spool.store(queue_id, [b"Subject: x\n\n".ljust(100, b"x")])
    refused(office, queue_id)
    (full,) = debts.settle(5)
    assert told(typed, queue_id).endswith(
        f"refused it: 550 go away; the sender is told by {full}, which is queued."
    )
    assert f"notice of: {queue_id} and encloses the whole message\n" in typed("show", full).stdout
    assert told(typed, full).endswith(
        f"; it is a notice about {queue_id} and encloses the whole message."
    )
    refused(office, full, "no viruses")
    pending = "; a worker makes one with less of the original in its place, or gives it up; it is a notice about"
    assert pending in told(typed, full)
    (header,) = debts.settle(5)
    again = f"notice {full} is bounced, because qmqp.example.net:628 refused it: no viruses, and a notice with less of"
    again += " the original was made in its place"
    assert told(typed, queue_id).endswith(
        f"{again}; the sender is told by {header}, which is queued."
    )
    assert (
        "; a notice with less of the original was made in its place; it is a notice about"
        in told(typed, full)
    )
    refused(office, header)
    (none,) = debts.settle(5)
    assert f"; it is a notice about {queue_id} and encloses nothing of it." in told(typed, none)
    (claim,) = office.claim(none)
    office.record(claim, Outcome.DELIVERED)
    assert told(typed, queue_id).endswith(f"; the sender was told by {none}.")
    assert f"the sender was told by {none}." in typed("show", queue_id).stdout


def test_a_notice_that_was_given_up(office: Office, spool: Spool, typed: Typed) -> None:
    debts = DsnGenerator(office.engine, spool, office.settings, lambda address: "default")
    queue_id = office.accept()
    refused(office, queue_id)
    (notice,) = debts.settle(5)  # without its body, which never was
    refused(office, notice, "no bounces")
    assert debts.settle(5) == []
    given_up = "it was given up: the sender of the original is not told by it"
    assert told(typed, queue_id).endswith(
        f"notice {notice} is bounced, because qmqp.example.net:628 refused it: no bounces, and {given_up}."
    )
    assert f"refused it: no bounces; {given_up}; it is a notice about {queue_id}" in told(
        typed, notice
    )


@pytest.mark.parametrize(("recipient", "sender", "words"), [
    ("postmaster", "a@example.com", "the mail came from an untrusted client and was for our own postmaster"),
    ("b@example.org", "<a@example.com", "no mail server can be given its address"),
    ("b@example.org", "a@example.com", "it had a notice about mail from an untrusted client less than a minute before"),
])  # fmt: skip
def test_why_a_sender_is_not_told(
    office: Office, spool: Spool, typed: Typed, recipient: str, sender: str, words: str
) -> None:
    debts = DsnGenerator(office.engine, spool, office.settings, lambda address: "default")
    before = office.accept(client_trusted=False)
    refused(office, before)
    assert len(debts.settle(5)) == 1
    queue_id = office.accept(recipient, sender=sender, client_trusted=False)
    refused(office, queue_id)
    assert debts.settle(5) == []
    assert told(typed, queue_id).endswith(
        f"refused it: 550 go away; the sender is not told: {words}."
    )
