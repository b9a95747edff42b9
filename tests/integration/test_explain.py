"""`why` names one cause. It reads the routes that the workers have published, not its own
settings."""

import re

import pytest

from relay.dsn.generator import DsnGenerator
from relay.queue.outcome import Outcome
from relay.spool.store import Spool
from tests.integration.harness import QueueHarness
from tests.integration.typed import Typed, typed_at

ONE, TWO = "127.0.0.1:6280", "[::1]:628"


@pytest.fixture
def typed(queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Typed:
    monkeypatch.setenv("RELAY_QMQP_SERVERS", "192.0.2.99")  # other routes than those of the workers
    return typed_at(queue, spool, monkeypatch)


def overdue(queue: QueueHarness) -> str:
    queue_id = queue.accept()
    queue.pass_time(60, only=[queue_id])
    return queue_id


def why(typed: Typed, queue_id: str) -> str:
    return str(typed("why", queue_id).stdout).strip()


def test_a_paused_server_is_named_with_actor_and_reason(queue: QueueHarness, typed: Typed) -> None:
    queue_id = overdue(queue)
    queue.rescuer.publish_routes(queue.worker, {"default": [ONE]})
    typed("pause", "--server", ONE, "--reason", "new disk")
    expected = (
        rf"b@example\.org: queued, and not sent because server {ONE} is paused until `resume` "
    )
    assert re.fullmatch(expected + r"\(by \S+@\S+ \d+s ago: new disk\)\.", why(typed, queue_id))
    other = queue.register_worker()
    queue.rescuer.publish_routes(other, {"default": [ONE, TWO]})
    assert "paused" not in why(typed, queue_id), "another worker has another server"
    queue.rescuer.publish_open_circuits(other, {TWO: "no connection: Connection refused"})
    both = why(typed, queue_id)
    assert f"server {ONE} is paused" in both
    assert (
        f" and the circuit of server {TWO} is open: it is tried again within a minute (no"
        " connection: Conn"
    ) in both
    third = queue.register_worker()
    queue.rescuer.publish_routes(third, {"default": [TWO]})
    assert "circuit" not in why(typed, queue_id), "a worker that knows it would send there"


def test_why_explains_a_route(queue: QueueHarness, typed: Typed) -> None:
    queue_id = overdue(queue)
    queue.claim(queue.accept())
    assert re.search(
        r"overdue for 5\ds: 1 worker is busy with 1 delivery,",
        why(typed, queue_id),
    )
    queue.rescuer.publish_routes(queue.worker, {"default": []})
    assert why(typed, queue_id).endswith(
        "no QMQP server is configured for route default (RELAY_QMQP_SERVERS)."
    )
    queue.rescuer.publish_routes(queue.worker, {"bulk": [ONE]})
    assert (
        "no worker has route default; `retry --reroute` moves the mail to its route of today"
        in why(typed, queue_id)
    )
    typed("pause", "--server", "192.0.2.99")
    queue.change("UPDATE workers SET lease_expires_at = @ago(1)")
    assert "because no worker is alive, and server 192.0.2.99:628 is paused until" in why(
        typed, queue_id
    )


def test_the_start_of_a_transfer_is_that_of_its_worker(queue: QueueHarness, typed: Typed) -> None:
    queue_id = queue.accept()
    queue.claim(queue_id)
    queue.pass_time(120, only=[queue_id])
    assert re.search(r"\(host 1\) since [-:0-9 ]+Z \(2m( \ds)?\)\.$", why(typed, queue_id))
    queue.change("UPDATE workers SET claim_seconds = claim_seconds - 60")
    assert re.search(r"since [-:0-9 ]+Z \(1m( \ds)?\)\.$", why(typed, queue_id))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (
            "no connection: 127.0.0.1:6280 Connection refused",
            "because no connection: 127.0.0.1:6280 Connection",
        ),
        (
            "the circuit of mx:628 is open: 450 go away",
            "because the circuit of mx:628 is open: 450 go",
        ),
        (
            "no QMQP server configured (RELAY_QMQP_SERVERS)",
            "because no QMQP server configured (RELAY",
        ),
    ],
)
def test_no_connection_is_named_once(
    queue: QueueHarness, typed: Typed, reply: str, expected: str
) -> None:
    queue_id = queue.accept()
    queue.complete(queue.claim(queue_id)[0], Outcome.UNREACHABLE, reply=reply, server=None)
    assert f"{expected}" in why(typed, queue_id)


def test_why_explains_an_envelope_that_no_server_accepts(queue: QueueHarness, typed: Typed) -> None:
    queue_id = queue.accept("x\n@example.org")
    reply = "QMQP cannot carry the envelope: no server can be trusted with the recipient <x"
    queue.complete(queue.claim(queue_id)[0], Outcome.UNSENDABLE, reply=reply)
    advice = "release it: recipients that can be sent are sent, the others bounce. It stays"
    assert f"it cannot be sent: {reply}; {advice}" in why(typed, queue_id)


def refused(queue: QueueHarness, queue_id: str, reply: str = "550 go away") -> None:
    queue.complete(queue.claim(queue_id)[0], Outcome.REJECTED, reply=reply)


def test_why_explains_a_dsn_and_its_message(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    generator = DsnGenerator(queue.database, spool, queue.settings, lambda address: "default")
    queue_id = queue.accept(ret="FULL")
    spool.store(queue_id, [b"Subject: x\n\n".ljust(100, b"x")])
    refused(queue, queue_id)
    (full,) = generator.generate(5)
    assert why(typed, queue_id).endswith(
        f"rejected it: 550 go away; the sender is told by {full}, which is queued."
    )
    assert f"DSN of: {queue_id} and encloses the whole message\n" in typed("show", full).stdout
    assert why(typed, full).endswith(
        f"; it is a DSN about {queue_id} and encloses the whole message."
    )
    refused(queue, full, "no viruses")
    pending = "; a worker replaces it with a smaller DSN, or gives up; it is a DSN about"
    assert pending in why(typed, full)
    (header,) = generator.generate(5)
    again = (
        f"DSN {full} is bounced, because qmqp.example.net:628 rejected it: no viruses, and a"
        " smaller DSN"
    )
    again += " replaced it"
    assert why(typed, queue_id).endswith(
        f"{again}; the sender is told by {header}, which is queued."
    )
    assert "; a smaller DSN replaced it; it is a DSN about" in why(typed, full)
    refused(queue, header)
    (none,) = generator.generate(5)
    assert f"; it is a DSN about {queue_id} and encloses nothing of it." in why(typed, none)
    (claim,) = queue.claim(none)
    queue.complete(claim, Outcome.DELIVERED)
    assert why(typed, queue_id).endswith(f"; the sender was told by {none}.")
    assert f"the sender was told by {none}." in typed("show", queue_id).stdout


def test_a_dsn_that_failed_and_is_not_replaced(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    generator = DsnGenerator(queue.database, spool, queue.settings, lambda address: "default")
    queue_id = queue.accept()
    refused(queue, queue_id)
    (dsn,) = generator.generate(5)  # without its body, which was never stored
    refused(queue, dsn, "no bounces")
    assert generator.generate(5) == []
    not_replaced = "no other DSN replaces it: the sender of the original is not told by it"
    assert why(typed, queue_id).endswith(
        f"DSN {dsn} is bounced, because qmqp.example.net:628 rejected it: no bounces, and"
        f" {not_replaced}."
    )
    assert f"rejected it: no bounces; {not_replaced}; it is a DSN about {queue_id}" in why(
        typed, dsn
    )


@pytest.mark.parametrize(
    ("recipient", "sender", "expected"),
    [
        (
            "postmaster",
            "a@example.com",
            "the mail came from an untrusted client and was for our own postmaster",
        ),
        ("b@example.org", "<a@example.com", "no mail server accepts its address"),
        (
            "b@example.org",
            "a@example.com",
            (
                "less than a minute before, a DSN about mail from an untrusted client was sent to"
                " this address"
            ),
        ),
    ],
)
def test_why_explains_a_missing_dsn(
    queue: QueueHarness, spool: Spool, typed: Typed, recipient: str, sender: str, expected: str
) -> None:
    generator = DsnGenerator(queue.database, spool, queue.settings, lambda address: "default")
    before = queue.accept(client_trusted=False)
    refused(queue, before)
    assert len(generator.generate(5)) == 1
    queue_id = queue.accept(recipient, sender=sender, client_trusted=False)
    refused(queue, queue_id)
    assert generator.generate(5) == []
    assert why(typed, queue_id).endswith(
        f"rejected it: 550 go away; the sender is not told: {expected}."
    )
