"""A server that accepts every connection and never replies occupies its own connections, and no
others."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qmqp.sink import Answer, Rule, Sink, running_sink
from tests.acceptance.installation import Install, assert_none_lost
from tests.services import free_port
from tests.waiting import until

CONNECTIONS = 3
EACH = 40


@pytest.fixture
def good() -> Iterator[Sink]:
    with running_sink() as sink:
        yield sink


def test_a_server_that_never_replies_delays_no_other_mail(
    install: Install, good: Sink, tmp_path: Path
) -> None:
    port = free_port()
    routes = tmp_path / "routes.toml"
    routes.write_text(f"""
        [pair]
        recipients = ["pair.test"]
        servers = ["127.0.0.1:{port}", "127.0.0.1:{good.port}"]
        [well]
        recipients = ["well.test"]
        servers = ["127.0.0.1:{good.port}"]
    """)
    relay = install(
        "sqlite",
        QMQP_SERVERS=f"127.0.0.1:{port}",
        ROUTES=str(routes),
        SERVER_CONNECTIONS=str(CONNECTIONS),
        WORKER_CONNECTIONS="10",
        UNCERTAIN_DELAY="500ms",
        RETRY_MIN="200ms",
        RETRY_MAX="400ms",
        BATCH_SIZE="8",
        LEASE="4s",
    )
    worker = relay.worker(wait=False)
    relay.smtpd()
    relay.until_registered(worker)
    recipients = [
        f"{n}@{domain}" for n in range(EACH) for domain in ("only.test", "pair.test", "well.test")
    ]

    with running_sink(Rule(Answer(raw=b"", end="stay")), port=port) as tarpit:
        for recipient in recipients:  # in turns: mail that must wait is before mail that need not
            relay.send(recipient)

        def stuck(domain: bytes) -> int:
            return sum(one.recipients[0].endswith(domain) for one in list(tarpit.received))

        def moving() -> int:
            return relay.count("d.route <> 'default' AND d.state <> 'delivered'") - stuck(
                b"@pair.test"
            )

        relay.until_rows()
        until(lambda: moving() == 0, 30, what=relay.unfinished)
        until(lambda: tarpit.count == CONNECTIONS, what=relay.unfinished)
        # All that there ever were, but for those that were made for a claim that had to wait: they
        # were closed without a request.
        until(lambda: tarpit.connections - len(tarpit.faults) == CONNECTIONS)
        assert relay.count("d.state = 'sending'") == CONNECTIONS
        waiting = (
            "d.route = 'default' AND d.state IN ('queued', 'deferred') AND d.last_outcome IS NULL"
        )
        assert relay.count(waiting) == EACH - stuck(b"@only.test")
    with running_sink(port=port) as better:
        relay.until_all_delivered()
        assert_none_lost(relay, recipients, good, better)
    uncertain = relay.rows("SELECT count(*) FROM attempts WHERE outcome = 'uncertain'")[0][0]
    assert uncertain == CONNECTIONS  # the tarpit never replied to them
