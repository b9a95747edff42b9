"""Mail that waits for a server, a route or a pause is sent within seconds of its end.

RETRY_MIN is so long that no retry comes due within the test.
"""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from qmqp.sink import running_sink
from tests.acceptance.installation import Install, Installation
from tests.acceptance.stack import command
from tests.services import free_port
from tests.waiting import until

MANY = 80
DATABASES = ("sqlite", "postgresql")
PROMPT = 5.0  # seconds
# Seconds until the first is sent: 3 s to the next connection probe, a sweep, and a busy machine.
RESTART_TIMEOUT = 8.0
SLOW = {"RETRY_MIN": "3m", "RETRY_MAX": "1h", "GRACE": "5s"}


@pytest.fixture
def port() -> int:
    """A port that refuses connections until a sink listens there."""
    return free_port()


def accept(relay: Installation, count: int) -> None:
    """Accept mail and wait until every message was tried and is deferred."""
    before = relay.count()
    for _ in range(count):
        relay.send("b@example.org")
    until(
        lambda: (
            relay.count("d.last_outcome = 'unreachable' AND d.claim_count > 0") >= before + count
        ),
        60,
        what=relay.log_text,
    )
    assert (
        relay.count("d.waiting_for = 'route:default' AND d.state = 'deferred'")
        >= before + count - 4
    ), "tries apart"


def sweep(relay: Installation, worker: subprocess.Popen[Any]) -> None:
    """Wait until a worker has swept twice, so that a whole sweep began after now."""
    heartbeat = relay.directory / "var" / f"worker-{worker.pid}.heartbeat"
    for _ in range(2):
        last = heartbeat.stat().st_mtime_ns
        until(lambda last=last: heartbeat.stat().st_mtime_ns > last)  # type: ignore[misc]


def events(relay: Installation, event: str) -> int:
    """How often an event was logged."""
    return relay.log.read_text().count(f'"event": "{event}"')


def span(relay: Installation) -> float:
    """The seconds from the first success to the last."""
    sql = """SELECT @micros(max(finished_at)) - @micros(min(finished_at)) FROM attempts
        WHERE outcome = 'delivered'"""
    return float(relay.rows(sql)[0][0]) / 1e6


@pytest.mark.parametrize("database", DATABASES)
def test_all_that_waits_for_a_server_is_sent_when_it_returns(
    install: Install, port: int, database: str
) -> None:
    """Two workers, one of which sees the first success before the other."""
    relay = install(database, QMQP_SERVERS=f"127.0.0.1:{port}", **SLOW)
    relay.smtpd()
    relay.worker()
    relay.worker()
    accept(relay, MANY)
    with running_sink(port=port) as sink:
        until(lambda: sink.count > 0, RESTART_TIMEOUT, what=relay.log_text)
        relay.until_all_delivered()
        assert span(relay) < PROMPT
        assert sink.count == MANY


def test_a_server_that_is_away_is_probed_without_claims_and_log_lines(
    install: Install, port: int
) -> None:
    relay = install("sqlite", QMQP_SERVERS=f"127.0.0.1:{port}", **SLOW)
    relay.smtpd()
    worker = relay.worker()
    accept(relay, 1)
    until(lambda: events(relay, "circuit opened"), what=relay.log_text)
    for _ in range(4):
        sweep(relay, worker)
    assert relay.count("d.claim_count > 2") == 0
    assert events(relay, "circuit opened") == 1
    assert events(relay, "connect failed") <= 2
    for _ in range(5):
        relay.send("b@example.org")
    until(lambda: relay.count("d.waiting_for = 'route:default'") == 6, 30, what=relay.log_text)
    with running_sink(port=port) as sink:
        until(lambda: sink.count > 0, RESTART_TIMEOUT, what=relay.log_text)
        relay.until_all_delivered()
        assert span(relay) < PROMPT
    assert relay.count("d.claim_count > 3") == 0
    assert events(relay, "circuit opened") == 1


def test_a_worker_sends_what_others_deferred_when_a_server_works(
    install: Install, port: int
) -> None:
    relay = install("postgresql", QMQP_SERVERS=f"127.0.0.1:{port}", **SLOW)
    relay.smtpd()
    ended = relay.worker()
    accept(relay, MANY)
    relay.end(ended)
    with running_sink(port=port) as sink:
        relay.worker()
        until(lambda: sink.count > 0, RESTART_TIMEOUT, what=relay.log_text)
        relay.until_all_delivered()
        assert span(relay) < PROMPT


def test_mail_is_delivered_when_the_first_server_starts_later(install: Install, port: int) -> None:
    relay = install(
        "sqlite", QMQP_SERVERS=f"127.0.0.1:{port}", RETRY_MIN="30s", RETRY_MAX="1h"
    )  # the defaults
    relay.smtpd()
    relay.worker()
    accept(relay, 1)
    with running_sink(port=port) as sink:
        until(lambda: sink.count == 1, RESTART_TIMEOUT, what=relay.log_text)


def test_mail_of_a_route_without_a_server_is_sent_when_it_gets_one(
    install: Install, port: int, tmp_path: Path
) -> None:
    routes = tmp_path / "routes.toml"
    routes.write_text("")
    relay = install("sqlite", ROUTES=str(routes), **SLOW)
    relay.smtpd()
    relay.worker()
    accept(relay, MANY)
    with running_sink(port=port) as sink:
        routes.write_text(f'[default]\nservers = ["127.0.0.1:{port}"]\n')
        until(lambda: sink.count > 0, RESTART_TIMEOUT, what=relay.log_text)
        relay.until_all_delivered()
        assert span(relay) < PROMPT


def test_mail_that_was_deferred_before_a_pause_is_sent_when_that_ends(
    install: Install, port: int
) -> None:
    server = f"127.0.0.1:{port}"
    relay = install("sqlite", QMQP_SERVERS=server, **SLOW)
    relay.smtpd()
    worker = relay.worker()
    accept(relay, MANY)
    assert (
        command("pause", "--server", server, "--reason", "a test", **relay.settings).returncode == 0
    )
    sweep(relay, worker)
    with running_sink(port=port) as sink:
        sweep(relay, worker)
        assert sink.count == 0
        assert (
            command("resume", "--server", server, "--reason", "a test", **relay.settings).returncode
            == 0
        )
        until(lambda: sink.count > 0, RESTART_TIMEOUT, what=relay.log_text)
        relay.until_all_delivered()
        assert span(relay) < PROMPT
        assert sink.count == MANY
