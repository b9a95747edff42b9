"""Metrics for Prometheus: what smtpd and worker count, and what the queue looks like
(docs/alerts.yml has rules).

Counters and histograms are module objects; on the road of a message their children are bound
beforehand (`attempts`, `hints`, `rests`, `rounds`), so that counting costs a look-up. The queue is
not counted but read: `QueueMetrics` asks the database when Prometheus asks us, at most every FRESH
seconds and for at most a twentieth of the time; to count what waits takes at most a two-hundredth.
Every process tells of the same queue: take the `max` of those series, never the `sum`.

What must stay true: a scrape is answered in time whatever is away, with `relay_database_up 0` and
no stale numbers; metrics never stop mail; labels take values from settings and from our own tables,
never from the network.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Connection, Engine

from relay.db.engine import reading
from relay.db.schema import UNFINISHED
from relay.db.sql import Statements
from relay.listener import listen
from relay.log import get_logger
from relay.settings import Settings
from relay.spool.store import Spool

log = get_logger(__name__)
FRESH = 5.0
COUNTING = 200  # times as long as counting what waits took, until it is counted again
PATIENCE = 2.0  # seconds that a scrape waits for the database
_QUICK = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_LONG = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 7200, 43200, 172800)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter that nobody asks for
SESSIONS = Counter("relay_smtp_sessions", "SMTP connections taken")
SESSIONS_OPEN = Gauge("relay_smtp_sessions_open", "SMTP connections open now")
REFUSALS = Counter(
    "relay_smtp_refusals", "commands and messages refused, by code and enhanced code", ["reply"]
)
RECEIVED_BYTES = Counter("relay_received_bytes", "bytes of the bodies of accepted messages")
ACCEPT_SECONDS = Histogram(
    "relay_accept_seconds", "from the end of a message to its 250", buckets=_QUICK
)
ROUND_SIZE = Histogram(
    "relay_round_size", "rows committed at once", ["writer"], buckets=[2**n for n in range(10)]
)
ROUND_SECONDS = Histogram(
    "relay_round_seconds", "what committing them took", ["writer"], buckets=_QUICK
)
KEEPERS = Counter("relay_keeper_deaths", "keepers that died and were started again")
HINTS = Counter("relay_hints", "hints published", ["queue"])
HINTS_REFUSED = Counter(
    "relay_hints_refused", "entries of the broker's lists that are no hints", ["queue"]
)
ATTEMPTS = Counter("relay_attempts", "tries at a server", ["server", "outcome"])
SENT_BYTES = Counter("relay_sent_bytes", "bytes of QMQP requests sent")
DELIVERY_SECONDS = Histogram(
    "relay_delivery_seconds", "from the 250 to the server's K", buckets=_LONG
)
TRANSFERS_OPEN = Gauge("relay_transfers_open", "transfers under way in this worker")
CIRCUIT_OPENED = Counter(
    "relay_circuit_opened", "times that the circuit of a server opened", ["server", "why"]
)
CIRCUIT_OPEN = Gauge(
    "relay_circuit_open", "1 while the circuit of a server is open in this worker", ["server"]
)

attempts, hints = cache(ATTEMPTS.labels), cache(HINTS.labels)


@cache
def rounds(writer: str) -> Callable[[int, float], None]:
    """What a `rounds.CommitThread` of that name tells its rounds to: rows, seconds."""
    size, seconds = ROUND_SIZE.labels(writer), ROUND_SECONDS.labels(writer)

    def observe(rows: int, took: float) -> None:
        size.observe(rows)
        seconds.observe(took)

    return observe


def refused(reply: bytes) -> None:
    """Count a refusal by the codes of its reply (`554 5.7.1`), never by its words."""
    words = reply[:20].decode("ascii", "replace").split()
    REFUSALS.labels(
        " ".join(words[:2] if len(words) > 1 and words[1][1:2] == "." else words[:1])
    ).inc()


# Each part has an index of its own, so that no long history is walked through.
_PARTS = " UNION ALL ".join(
    f"SELECT state, queue_id, due_at FROM deliveries WHERE {where}"
    for where in (
        *(f"state = '{state}'" for state in UNFINISHED),
        "state IN ('bounced', 'expired') AND due_at IS NOT NULL",
    )
)
_QUEUE = f"""
SELECT s.state, s.deliveries, s.overdue, @since(m.received_at) FROM (
    SELECT state, count(*) AS deliveries, min(CAST(queue_id AS text)) AS oldest,
           sum(CASE WHEN due_at < @now THEN 1 ELSE 0 END) AS overdue
    FROM ({_PARTS}) d GROUP BY state) s
JOIN messages m ON m.id = @id(s.oldest)"""
_OTHERS = """
SELECT (SELECT count(*) FROM workers WHERE ended_at IS NULL AND lease_expires_at > @now),
       (SELECT count(*) FROM attempts WHERE finished_at > @ago(3600) AND outcome IN ('uncertain', 'malformed'))"""
_UP = ("database_up", "whether the database answers")


def _gauge(name: str, words: str, value: float | Mapping[str, float], label: str = "") -> Metric:
    family = GaugeMetricFamily(f"relay_{name}", words, labels=[label] if label else None)
    for key, number in value.items() if isinstance(value, Mapping) else [("", value)]:
        family.add_metric([key] if label else [], float(number))
    return family


class QueueMetrics(Collector):
    """The queue in the database, the room for bodies, the broker's lists (`lists` gives what is
    known, at once)."""

    def __init__(
        self, engine: Engine, spool: Spool, lists: Callable[[], Mapping[str, float]] = dict
    ) -> None:
        self._engine, self._spool, self._lists, self._sql = engine, spool, lists, Statements(engine)
        self._lock, self._looked = threading.Lock(), threading.Event()
        self._look_at, self._seen = 0.0, list[Metric]()
        self._count_at, self._counted = 0.0, dict[str, list[Any]]()

    def describe(self) -> Iterable[Metric]:
        """Nothing: to register a collector looks at no database."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """What is known by now; a look that takes longer than PATIENCE is there for the next
        scrape."""
        with self._lock:
            if time.monotonic() >= self._look_at:
                self._look_at = float("inf")
                self._looked.clear()
                threading.Thread(target=self._look, name="metrics", daemon=True).start()
        return self._seen if self._looked.wait(PATIENCE) else [_gauge(*_UP, 0)]

    def _look(self) -> None:
        began, seen = time.monotonic(), list[Metric]()
        for part, without in (
            (self._database, [_gauge(*_UP, 0)]),
            (self._room, []),
            (self._broker, []),
        ):
            try:
                seen += part()
            except (
                Exception
            ) as error:  # whatever is away is missing from the answer, and nothing else is
                log.debug("metrics incomplete", reason=str(error)[:200])
                seen += without
        ended, self._seen = time.monotonic(), seen
        self._look_at = ended + max(FRESH, 20 * (ended - began))
        self._looked.set()

    def _database(self) -> list[Metric]:
        with reading(self._engine) as connection:
            found = self._counts(connection)
            workers, uncertain = self._sql.run(connection, _OTHERS).one()
            pauses = {
                subject: 1.0
                for (subject,) in self._sql.run(connection, "SELECT subject FROM pauses")
            }
        counts, overdue, oldest = (
            {str(s): found.get(s, (0, 0, 0))[n] for s in UNFINISHED} for n in range(3)
        )
        owed = sum(values[0] for state, values in found.items() if state not in counts)
        return [
            _gauge(*_UP, 1),
            _gauge("deliveries", "unfinished deliveries", counts, "state"),
            _gauge(
                "overdue",
                "deliveries past the time when somebody was to look at them",
                overdue,
                "state",
            ),
            _gauge(
                "oldest_age_seconds",
                "age of the oldest message with such a delivery",
                oldest,
                "state",
            ),
            _gauge("notices_owed", "failed deliveries whose sender was not told yet", owed),
            _gauge("workers_alive", "workers whose lease has not run out", workers),
            _gauge(
                "paused", "routes and servers that nothing is sent to for now", pauses, "subject"
            ),
            _gauge(
                "uncertain_attempts", "tries of the last hour whose end nobody knows", uncertain
            ),
        ]

    def _counts(self, connection: Connection) -> dict[str, list[Any]]:
        """By state: how many deliveries, overdue ones, the age of the oldest. To count many takes
        long, so it is seldom done."""
        if (began := time.monotonic()) >= self._count_at:
            self._counted = {state: values for state, *values in self._sql.run(connection, _QUEUE)}
            ended = time.monotonic()
            self._count_at = ended + COUNTING * (ended - began)
        return self._counted

    def _room(self) -> list[Metric]:
        return [_gauge("spool_free_bytes", "room for bodies", self._spool.free_bytes())]

    def _broker(self) -> list[Metric]:
        return [
            _gauge("broker_list_length", "hints that wait at the broker", self._lists(), "queue")
        ]


def serve(settings: Settings, *collectors: Collector) -> Callable[[], None]:
    """Answer Prometheus on the first address of METRICS_LISTEN that is free; the function returned
    ends that.

    Processes on one machine share a list of addresses that way. When none is free there is a
    warning, and no metrics.
    """
    taken = []
    for host, port in settings.metrics_listen:
        try:
            server = listen(host, port)
        except OSError as error:
            taken.append(f"{host}:{port}: {error.strerror}")
            continue
        for collector in collectors:
            REGISTRY.register(collector)
        log.info("metrics", host=host, port=server.server_port)
        return partial(_stop, server, collectors)
    if taken:
        log.warning("metrics not served", reason="; ".join(taken))
    return lambda: None


def _stop(server: WSGIServer, collectors: Iterable[Collector]) -> None:
    for collector in collectors:
        REGISTRY.unregister(collector)
    server.shutdown()
    server.server_close()
