"""The state of a message follows from the replies of its servers, and every attempt is recorded."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from qmqp.sink import Answer, MagicRecipients, Rule, Sink, running_sink
from tests.acceptance.installation import Install, Installation
from tests.services import free_port
from tests.waiting import until


@dataclass(slots=True)
class RoutedInstallation:
    """An installation whose routes are named by the recipient's domain.

    `sink.test` goes to `sink`, which obeys magic recipients; `second.test` to a closed port and
    then to `sink`; `lost.test` to `forgetful`, which closes without a reply
    once, and then to `sink`; `late.test` to `late_port` alone. Everything else has no server.
    """

    relay: Installation
    sink: Sink
    forgetful: Sink
    dead_port: int
    late_port: int


@pytest.fixture(scope="module")
def scene(
    install: Install, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RoutedInstallation]:
    forget = Rule(Answer(raw=b""), recipient=b"once@", times=1)
    with running_sink(MagicRecipients()) as sink, running_sink(forget) as forgetful:
        dead, late = free_port(), free_port()
        routes = tmp_path_factory.mktemp("routes") / "routes.toml"
        servers = {
            "sink": [sink.port],
            "second": [dead, sink.port],
            "lost": [forgetful.port, sink.port],
            "late": [late],
        }
        routes.write_text(
            "".join(
                f'[{name}]\nrecipients = ["{name}.test"]\nservers ='
                f" {[f'127.0.0.1:{port}' for port in ports]}\n"
                for name, ports in servers.items()
            )
        )
        relay = install(
            "postgresql",
            ROUTES=str(routes),
            RETRY_MIN="200ms",
            RETRY_MAX="400ms",
            UNCERTAIN_DELAY="500ms",
            LEASE="4s",
        )
        worker = relay.worker(wait=False)
        relay.smtpd()
        relay.until_registered(worker)
        yield RoutedInstallation(relay, sink, forgetful, dead, late)


def test_z_then_k(scene: RoutedInstallation) -> None:
    relay, server = scene.relay, f"127.0.0.1:{scene.sink.port}"
    relay.send("defer-2@sink.test")
    delivered = relay.until_state("defer-2@sink.test", "delivered")
    busy = "Error: defer-2@sink.test is busy, try {} of 2"
    *deferred, (last_server, last, reply) = relay.attempts("defer-2@sink.test")
    assert deferred == [(server, "deferred", busy.format(1)), (server, "deferred", busy.format(2))]
    assert (last_server, last, delivered.attempts) == (server, "delivered", 3)
    assert reply.startswith("Ok: queued as ")
    assert reply == delivered.reason


def test_d_bounces_with_the_reply_of_the_server_and_a_dsn(scene: RoutedInstallation) -> None:
    relay, reply = scene.relay, "Error: no such mailbox: reject@sink.test"
    queue_id = relay.send("reject@sink.test", sender="author@sink.test")
    bounced = relay.until_state("reject@sink.test", "bounced")
    assert (bounced.reason, bounced.attempts) == (reply, 1)
    assert relay.attempts("reject@sink.test") == [
        (f"127.0.0.1:{scene.sink.port}", "rejected", reply)
    ]
    until(
        lambda: relay.rows("SELECT 1 FROM mail_history WHERE dsn_of = :id", id=queue_id),
        what=relay.log_text,
    )
    dsn = relay.until_state("author@sink.test", "delivered")
    assert (dsn.sender, dsn.dsn_of) == ("", queue_id)
    assert relay.count("d.state = 'bounced' AND d.due_at IS NOT NULL") == 0  # no DSN is pending


def test_the_second_server_when_the_first_is_dead(scene: RoutedInstallation) -> None:
    relay = scene.relay
    relay.send("you@second.test")
    relay.until_state("you@second.test", "delivered")
    (first, unreachable, why), (second, accepted, _) = relay.attempts("you@second.test")
    assert (first, unreachable) == (f"127.0.0.1:{scene.dead_port}", "unreachable")
    assert "refused" in why
    assert (second, accepted) == (f"127.0.0.1:{scene.sink.port}", "delivered")
    assert relay.to("you@second.test").attempts == 1  # one claim, two hops


def test_a_lost_reply_is_uncertain_and_never_failed_over(scene: RoutedInstallation) -> None:
    relay, server = scene.relay, f"127.0.0.1:{scene.forgetful.port}"
    relay.send("once@lost.test")
    relay.until_state("once@lost.test", "delivered")
    assert [(who, what) for who, what, _ in relay.attempts("once@lost.test")] == [
        (server, "uncertain"),
        (server, "delivered"),
    ]
    assert scene.forgetful.count == 2
    assert not [one for one in list(scene.sink.received) if b"once@lost.test" in one.recipients]


def test_a_server_that_recovers_gets_waiting_mail(scene: RoutedInstallation) -> None:
    relay = scene.relay
    relay.send("you@late.test")
    waiting = relay.until_state("you@late.test", "deferred")
    assert (waiting.last_outcome, waiting.server) == ("unreachable", f"127.0.0.1:{scene.late_port}")
    assert "refused" in waiting.reason
    with running_sink(port=scene.late_port) as late:
        relay.until_state("you@late.test", "delivered")
        assert late.count == 1
    *refused, last = relay.attempts("you@late.test")
    assert {what for _, what, _ in refused} == {"unreachable"}
    assert last[1] == "delivered"


def test_without_a_server_mail_waits_for_the_setting(scene: RoutedInstallation) -> None:
    relay = scene.relay
    relay.send("you@nowhere.test")
    reason = "no QMQP server configured (RELAY_QMQP_SERVERS)"
    until(lambda: relay.to("you@nowhere.test").reason == reason, 30, what=relay.log_text)
    assert relay.to("you@nowhere.test").state in ("deferred", "queued", "sending")
    assert re.search(re.escape(reason), relay.log_text())
    worker = relay.children[0]
    assert relay.end(worker) == 0
    relay.worker(wait=False, QMQP_SERVERS=f"127.0.0.1:{scene.sink.port}")
    relay.until_state("you@nowhere.test", "delivered")
