"""The broker carries only hints: whatever happens to it, queued mail is delivered within 2 x GRACE.

Half of a thousand messages are accepted before the fault and half after it. Only then a worker
starts, so it knows them from SQL alone. The time counts from when the database had the message and
a worker had a free connection.
"""

import signal
from collections.abc import Callable, Iterator

import pytest

from tests.acceptance.installation import Install, Installation
from tests.postfix import QmqpSink
from tests.services import ServiceError, temporary_directory
from tests.waiting import until

GRACE = 3.0
HALF = 500
CONNECTIONS = 50
LIST = "qmqp-relay:fresh"


@pytest.fixture(scope="module")
def server() -> Iterator[QmqpSink]:
    sink = QmqpSink(temporary_directory())
    try:
        sink.start()
    except ServiceError as error:
        pytest.skip(str(error))
    yield sink
    sink.stop()


@pytest.fixture(scope="module")
def accepting(request: pytest.FixtureRequest, install: Install, server: QmqpSink) -> Installation:
    """smtpd alone."""
    relay = install(
        request.param,
        QMQP_SERVERS=f"127.0.0.1:{server.port}",
        GRACE=f"{GRACE:g}s",
        SERVER_CONNECTIONS=str(CONNECTIONS),
    )
    relay.smtpd()
    return relay


@pytest.fixture
def relay(accepting: Installation) -> Iterator[Installation]:
    """With a working broker whose lists are empty, and no worker."""
    accepting.broker.resume()
    accepting.broker.start()
    assert accepting.broker.ask("FLUSHALL") == b"+OK"
    yield accepting
    for worker in accepting.children[1:]:
        accepting.end(worker, signal.SIGKILL)


def flush(relay: Installation) -> None:
    until(lambda: hints(relay) > 0, what="hints are in the list")
    assert relay.broker.ask("FLUSHALL") == b"+OK"


def hints(relay: Installation) -> int:
    return int(relay.broker.ask("LLEN", LIST)[1:])


def nothing(relay: Installation) -> None:
    """The fault of this case comes with the worker."""


WORKER = ["commands.cli.start", "worker"]
RETRIES_ALONE = ["celery", "-A", "worker.app", "worker", "--pool", "threads", "-Q", "retry"]


@pytest.mark.parametrize(
    ("accepting", "fault", "consumer"),
    [
        pytest.param("sqlite", flush, WORKER, id="flushed"),
        pytest.param("sqlite", lambda relay: relay.broker.pause(), WORKER, id="silent"),
        pytest.param(
            "postgresql", lambda relay: relay.broker.stop(), WORKER, id="stopped for good"
        ),
        pytest.param("postgresql", nothing, RETRIES_ALONE, id="unconsumed"),
    ],
    indirect=["accepting"],
)
def test_all_is_delivered_without_hints(
    relay: Installation, fault: Callable[[Installation], object], consumer: list[str]
) -> None:
    before = relay.count()
    relay.smtp_source(HALF, "b@example.org", "-s", "10")
    fault(relay)
    relay.smtp_source(HALF, "b@example.org", "-s", "10")
    until(lambda: relay.count() - before == 2 * HALF)  # rows follow the replies
    assert relay.count("d.state = 'queued'") == 2 * HALF
    if fault is flush:  # the later hints are removed too
        flush(relay)
    worker = relay.begin(*consumer)
    relay.until_all_delivered()
    tries = relay.rows(
        """SELECT @micros(a.started_at) AS started, @micros(a.finished_at) AS finished,
            CASE WHEN w.started_at > m.received_at THEN @micros(w.started_at)
            ELSE @micros(m.received_at) END AS ready
        FROM attempts a JOIN workers w ON w.id = a.worker JOIN messages m ON m.id = a.queue_id
        WHERE w.pid = :pid AND a.claim = 1 AND a.attempt_index = 1 AND a.outcome = 'delivered'
        ORDER BY a.started_at""",
        pid=worker.pid,
    )
    assert len(tries) == 2 * HALF
    # The first tries find a free connection; each later one needs that another has ended.
    freed = [0] * CONNECTIONS + sorted(one.finished for one in tries)
    waits = [one.started - max(one.ready, free) for one, free in zip(tries, freed, strict=False)]
    assert max(waits) < 2 * GRACE * 1_000_000
    if consumer[0] == "celery":
        assert hints(relay) > 0  # no worker read them
