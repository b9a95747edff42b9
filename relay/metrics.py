"""Metrics for Prometheus: counters of smtpd and worker, and the state of the queue (docs/alerts.yml
has rules).

Counters and histograms are module objects; on the hot path their children are bound beforehand.
The queue is read from the database when Prometheus asks, at most every MIN_INTERVAL seconds and for
at most a twentieth of the time; counting it takes at most a two-hundredth. Every process reports
the same queue: take the `max` of those series, not the `sum`.

What must stay true: a scrape is answered in time in every outage, with `relay_database_up 0` and no
stale values; metrics never stop mail; labels come from settings and from the tables, never from the
network.
"""

import itertools
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import NamedTuple
from wsgiref.simple_server import WSGIServer

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Connection, Engine

from relay.db.engine import reading
from relay.db.sql import Queries
from relay.listeners import is_loopback
from relay.log import get_logger
from relay.metrics_server import listen
from relay.queue.states import UNFINISHED
from relay.settings import Settings
from relay.spool.journal.directory import JournalDirectory
from relay.spool.mark import SpoolMark
from relay.spool.store import Spool
from relay.version import running_version

log = get_logger(__name__)
MIN_INTERVAL = 5.0  # seconds between two reads of the database
COUNT_INTERVAL = 200  # between two counts of the queue, in units of what the last count took
SCRAPE_TIMEOUT = 2.0  # seconds that a scrape waits for the database
_QUICK = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_LONG = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 7200, 43200, 172800)

disable_created_metrics()  # type: ignore[no-untyped-call]  # they would add a series for each counter
SESSIONS = Counter("relay_sessions", "accepted connections", ["door"])
SESSIONS_OPEN = Gauge("relay_sessions_open", "connections open now", ["door"])
REFUSALS = Counter(
    "relay_refusals",
    "commands and messages refused, by code and enhanced code",
    ["door", "reply"],
)
AUTHENTICATIONS = Counter(
    "relay_authentications", "attempts to log in, by what they led to", ["result"]
)
PASSWORD_VERIFICATIONS = Counter(
    "relay_password_verifications", "computations of a password's hash"
)
RECEIVED_BYTES = Counter("relay_received_bytes", "bytes of the bodies of accepted messages")
BODIES_DAMAGED = Counter("relay_bodies_damaged", "bodies that did not verify when they were read")
ACCEPT_SECONDS = Histogram(
    "relay_accept_seconds", "from the end of a message to its 250", buckets=_QUICK
)
GROUP_COMMIT_SIZE = Histogram(
    "relay_group_commit_size",
    "rows committed in one transaction",
    ["writer"],
    buckets=[2**n for n in range(10)],
)
GROUP_COMMIT_SECONDS = Histogram(
    "relay_group_commit_seconds", "duration of this transaction", ["writer"], buckets=_QUICK
)
JOURNAL_LAG_MESSAGES = Gauge(
    "relay_journal_lag_messages", "accepted messages in the journal that have no rows yet"
)
JOURNAL_LAG_BYTES = Gauge("relay_journal_lag_bytes", "bytes of their envelopes and bodies")
JOURNAL_LAG_SECONDS = Gauge("relay_journal_lag_seconds", "age of the oldest of them")
JOURNAL_DAMAGES = Counter(
    "relay_journal_damages", "parts of segments that did not verify when rows were made from them"
)
RATE_LIMITED = Counter(
    "relay_rate_limited",
    "messages, recipients and connections refused by RELAY_RATE_LIMITS",
    ["subject", "what"],
)
HOOK_CALLS = Counter(
    "relay_hook_calls",
    "calls of hooks of plugins, by the answer; or late, or failed",
    ["plugin", "hook", "answer"],
)
HOOK_SECONDS = Histogram(
    "relay_hook_seconds", "how long a hook took", ["plugin", "hook"], buckets=_QUICK
)
PROXY_REFUSALS = Counter(
    "relay_proxy_refusals", "connections to a /proxy listener without a header from a proxy"
)
HANDSHAKES = Counter(
    "relay_tls_handshakes", "TLS handshakes of clients, by protocol, or failed", ["result"]
)
CERTIFICATE_DAYS = Gauge(
    "relay_tls_certificate_days", "days until the certificate in use ends", ["file"]
)
CERTIFICATE_REJECTED = Gauge(
    "relay_tls_certificate_rejected",
    "1 while the files of the certificate cannot be used, and the one before is",
    ["file"],
)
SPOOLER_RESTARTS = Counter("relay_spooler_restarts", "spoolers that died and were restarted")
HINTS = Counter("relay_hints", "hints published", ["queue"])
HINTS_REFUSED = Counter(
    "relay_hints_refused", "entries of the broker's lists that are not hints", ["queue"]
)
BUILD_INFO = Gauge("relay_build_info", "1; the label has the version that runs", ["version"])
OUTCOMES = Counter(
    "relay_outcomes", "deliveries that a worker tried, by what became of them", ["route", "outcome"]
)
ATTEMPTS = Counter("relay_attempts", "attempts at a server", ["server", "outcome"])
SENT_BYTES = Counter("relay_sent_bytes", "bytes of QMQP requests sent")
DELIVERY_SECONDS = Histogram(
    "relay_delivery_seconds", "from the 250 to the server's K", buckets=_LONG
)
TRANSFERS_OPEN = Gauge("relay_transfers_open", "transfers in progress in this worker")
NOTIFICATIONS = Counter(
    "relay_notifications",
    "tries to deliver events, by what they led to: delivered, failed or given_up",
    ["subscription", "result"],
)
NOTIFICATION_SECONDS = Histogram(
    "relay_notification_seconds",
    "duration of a try to deliver an event",
    ["subscription"],
    buckets=_QUICK,
)
CIRCUIT_OPENED = Counter(
    "relay_circuit_opened", "times that the circuit of a server opened", ["server", "why"]
)
CONNECTION_PROBES = Counter(
    "relay_connection_probes",
    "connections begun only to find out whether a server is back",
    ["server"],
)
CIRCUIT_OPEN = Gauge(
    "relay_circuit_open", "1 while the circuit of a server is open in this worker", ["server"]
)

attempts, hints, sessions = cache(ATTEMPTS.labels), cache(HINTS.labels), cache(SESSIONS.labels)
outcomes = cache(OUTCOMES.labels)
_hook_calls, _hook_seconds = cache(HOOK_CALLS.labels), cache(HOOK_SECONDS.labels)


@cache
def group_commit(writer: str) -> Callable[[int, float], None]:
    """A function that observes a group commit of this writer: rows, seconds."""
    size, seconds = GROUP_COMMIT_SIZE.labels(writer), GROUP_COMMIT_SECONDS.labels(writer)

    def observe(rows: int, took: float) -> None:
        size.observe(rows)
        seconds.observe(took)

    return observe


def hook_called(plugin: str, hook: str, answer: str, seconds: float) -> None:
    """Count a call of a plugin's hook."""
    _hook_calls(plugin, hook, answer).inc()
    _hook_seconds(plugin, hook).observe(seconds)


def refused(reply: str, door: str = "smtp") -> None:
    """Count a refusal by the codes of its reply (`554 5.7.1`), without its text."""
    codes = reply[:20].split()[:2]
    if len(codes) > 1 and codes[1][1:2] != ".":
        codes.pop()
    REFUSALS.labels(door, " ".join(codes)).inc()


class StateCount(NamedTuple):
    """The deliveries in one state. `paused`: those behind a pause, which are neither `overdue` nor
    in `age`, that of the oldest message in seconds. `expiring`: those that wait and expire soon."""

    state: str
    deliveries: int
    overdue: int
    paused: int
    expiring: int
    age: float


_UP = ("database_up", "whether the database answers")


def _gauge(name: str, text: str, value: float | Mapping[str, float], label: str = "") -> Metric:
    family = GaugeMetricFamily(f"relay_{name}", text, labels=[label] if label else None)
    for key, number in value.items() if isinstance(value, Mapping) else [("", value)]:
        family.add_metric([key] if label else [], float(number))
    return family


class QueueMetrics(Collector):
    """The queue in the database, the free space of the spool, the broker's lists (`lists` must
    return at once)."""

    def __init__(
        self, engine: Engine, spool: Spool, lists: Callable[[], Mapping[str, float]] = dict
    ) -> None:
        self._engine = engine
        self._spool = spool
        self._lists = lists
        self._queries = Queries(engine, __name__)
        self._lock = threading.Lock()
        self._is_read = threading.Event()
        self._read_at = self._count_at = 0.0
        self._metrics: list[Metric] = []
        self._counted: dict[str, StateCount] = {}
        self._waiting: dict[str, int] = {}
        self._notified: dict[str, tuple[int, float, int]] = {}

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registration reads no database."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The values of the last read; one that takes longer than SCRAPE_TIMEOUT is for the next
        scrape."""
        with self._lock:
            if time.monotonic() >= self._read_at:
                self._read_at = float("inf")
                self._is_read.clear()
                threading.Thread(target=self._read, name="metrics", daemon=True).start()
        return self._metrics if self._is_read.wait(SCRAPE_TIMEOUT) else [_gauge(*_UP, 0)]

    def _read(self) -> None:
        began = time.monotonic()
        metrics: list[Metric] = []
        for part, fallback in (
            (self._database, [_gauge(*_UP, 0)]),
            (self._disk, []),
            (self._broker, []),
        ):
            try:
                metrics += part()
            except Exception as error:  # a part that fails leaves the others
                log.debug("metrics incomplete", reason=str(error)[:200])
                metrics += fallback
        ended = time.monotonic()
        self._metrics = metrics
        self._read_at = ended + max(MIN_INTERVAL, 20 * (ended - began))
        self._is_read.set()

    def _database(self) -> list[Metric]:
        with reading(self._engine) as connection:
            states, waiting = self._counts(connection)
            totals = self._queries.run(connection, "totals").one()
            paused = dict(self._queries.run(connection, "paused").all())
            failing = dict(self._queries.run(connection, "failing").all())
            journal = self._queries.run(connection, "journal").one()
        directory = JournalDirectory(self._spool.handle)
        older = journal.mark < SpoolMark(directory, self._spool.identity).known
        unfinished = [states.get(state, StateCount(state, 0, 0, 0, 0, 0.0)) for state in UNFINISHED]
        pending = sum(row.deliveries for row in states.values() if row.state not in UNFINISHED)
        return [
            _gauge(*_UP, 1),
            _gauge(
                "deliveries",
                "unfinished deliveries",
                {row.state: row.deliveries for row in unfinished},
                "state",
            ),
            _gauge(
                "overdue",
                "deliveries that a worker should have claimed by now",
                {row.state: row.overdue for row in unfinished},
                "state",
            ),
            _gauge(
                "paused_deliveries",
                "deliveries that wait behind a pause",
                {row.state: row.paused for row in unfinished},
                "state",
            ),
            _gauge(
                "oldest_age_seconds",
                "age of the oldest message with such a delivery that is not behind a pause",
                {row.state: row.age for row in unfinished},
                "state",
            ),
            _gauge(
                "expiring_soon",
                "queued and deferred deliveries that expire in less than six hours",
                sum(row.expiring for row in unfinished),
            ),
            _gauge("failing_seconds", "since when a server has an open circuit", failing, "server"),
            _gauge(
                "waiting", "deliveries that wait for a server of their route", waiting, "server"
            ),
            _gauge("dsns_pending", "failed deliveries whose DSN is not generated yet", pending),
            _gauge(
                "journal_live_bytes",
                "bytes in sealed segments that deliveries need, as last seen",
                journal.live,
            ),
            _gauge(
                "journal_sealed_segments", "segments to which nothing is written", journal.segments
            ),
            _gauge("database_older", "1 if the database is older than the spool", int(older)),
            _gauge("workers_alive", "workers whose lease has not expired", totals.workers),
            _gauge(
                "paused", "routes and servers that are paused", dict.fromkeys(paused, 1), "subject"
            ),
            _gauge("paused_seconds", "for how long they have been paused", paused, "subject"),
            _gauge(
                "notifications_pending",
                "events that a subscription has not got yet",
                {name: pending for name, (pending, _, _) in self._notified.items()},
                "subscription",
            ),
            _gauge(
                "notification_lag_seconds",
                "age of the oldest of them",
                {name: lag for name, (_, lag, _) in self._notified.items()},
                "subscription",
            ),
            _gauge(
                "subscription_disabled",
                "1 if a subscription is disabled",
                {name: disabled for name, (_, _, disabled) in self._notified.items()},
                "subscription",
            ),
            _gauge(
                "uncertain_attempts",
                "attempts of the last hour with an unknown end",
                totals.uncertain,
            ),
        ]

    def _counts(self, connection: Connection) -> tuple[dict[str, StateCount], dict[str, int]]:
        """The counts by state, and those that wait for each server. Counting a long queue takes
        long, so they are kept for COUNT_INTERVAL."""
        if (began := time.monotonic()) >= self._count_at:
            rows = itertools.starmap(StateCount, self._queries.run(connection, "counts"))
            self._counted = {row.state: row for row in rows}
            self._waiting = dict(self._queries.run(connection, "waiting").all())
            notified = self._queries.run(connection, "notifications")
            self._notified = {name: (pending, lag, off) for name, pending, lag, off in notified}
            ended = time.monotonic()
            self._count_at = ended + COUNT_INTERVAL * (ended - began)
        return self._counted, self._waiting

    def _disk(self) -> list[Metric]:
        segments, octets = self._spool.journal_usage()
        return [
            _gauge("spool_free_bytes", "free space for bodies", self._spool.free_bytes()),
            _gauge("journal_segments", "segments of the journal", segments),
            _gauge("journal_disk_bytes", "bytes that they take on the disk", octets),
        ]

    def _broker(self) -> list[Metric]:
        return [_gauge("broker_list_length", "hints in the broker's list", self._lists(), "queue")]


def serve(
    settings: Settings,
    *collectors: Collector,
    tls_context: Callable[[], ssl.SSLContext] | None = None,
) -> Callable[[], None]:
    """Serve metrics on the first free address of METRICS_LISTEN; the function returned stops it.

    Processes on one machine share a list of addresses. If no address is free, a warning is logged
    and nothing is served. Beyond loopback they are served over TLS if there is a `tls_context`.
    """
    in_use = []
    BUILD_INFO.labels(running_version()).set(1)
    for host, port in settings.metrics_listen:
        try:
            server = listen(host, port, None if is_loopback(host) else tls_context)
        except OSError as error:
            in_use.append(f"{host}:{port}: {error.strerror}")
            continue
        for collector in collectors:
            REGISTRY.register(collector)
        log.info("metrics served", host=host, port=server.server_port)
        return partial(_stop, server, collectors)
    if in_use:
        log.warning("metrics not served", reason="; ".join(in_use))
    return lambda: None


def _stop(server: WSGIServer, collectors: Iterable[Collector]) -> None:
    for collector in collectors:
        REGISTRY.unregister(collector)
    server.shutdown()
    server.server_close()
