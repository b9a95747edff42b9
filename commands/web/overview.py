"""What the first page shows: the problems, and the queue as a whole.

It scans tables, so what was read is kept for some seconds, and for longer if reading took long;
requests that arrive meanwhile get the same. Counts of all unfinished mail take longest: they are
read in the background, and a page that has waited for a moment is shown without them. The chart of
each span of time is kept apart. `version` changes when the rest was read, or when counts came late,
so that open pages are told when there is something new.

What must stay true: the problems are those of `qmqp-relay problems`.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine

from commands.ops.problems import problems_of
from commands.ops.show import disk_of, journal_rows, mounted_spool
from commands.output import stamp
from commands.web import charts
from relay.log import get_logger
from relay.queue.states import UNFINISHED, State
from relay.report.filters import Filter
from relay.report.problems import CRITICAL
from relay.report.queries import QueueReader
from relay.report.rows import Row
from relay.report.statistics import Statistics
from relay.settings import SmtpdSettings

log = get_logger(__name__)

KEPT = 5.0  # seconds, or
SLOWNESS = 10  # times as long as reading took
COUNTS_TIMEOUT = 2.0  # seconds that a page waits for counts
TOP_KEYS = ("reason", "domain", "sender")
TOP = 5  # of each
ACTIONS = 5
DAY = 86400.0


class KeptValue[T]:
    """A value that is read again when it is old."""

    def __init__(self, read: Callable[[], T]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._value: T | None = None
        self._expires_at = 0.0
        self.version = 0

    def get(self) -> T:
        """The value. Others wait while one reads."""
        with self._lock:
            began = time.monotonic()
            if self._value is None or began >= self._expires_at:
                self._value = self._read()
                took = time.monotonic() - began
                self._expires_at = began + took + max(KEPT, SLOWNESS * took)
                self.version += 1
            return self._value

    def expire(self) -> None:
        """Read it again at the next call."""
        self._expires_at = 0.0


class BackgroundValue[T]:
    """A value that a thread reads again when it is old. `get` waits for it until `timeout` seconds
    after the beginning of the read. `late` counts values that came after `get` went without them.
    """

    def __init__(self, read: Callable[[], T], timeout: float) -> None:
        self._read, self._timeout = read, timeout
        self._lock = threading.Lock()
        self._reading: Future[T] | None = None
        self._value: T | None = None
        self._began = self._expires_at = 0.0
        self._missed = False
        self.late = 0

    def begin(self) -> Future[T] | None:
        """Begin to read it if it is old; the read that goes on, if there is one."""
        with self._lock:
            if self._reading is None and time.monotonic() >= self._expires_at:
                self._reading, self._began = Future(), time.monotonic()
                threading.Thread(target=self._run, args=(self._reading,), daemon=True).start()
            return self._reading

    def get(self) -> T | None:
        """The value, or the one before it if reading takes longer; None before the first."""
        reading = self.begin()
        left = self._began + self._timeout - time.monotonic()
        if reading is not None:
            wait([reading], max(0.0, left))
            with self._lock:
                if reading.done():
                    return reading.result()
                self._missed = True
        return self._value

    def _run(self, reading: Future[T]) -> None:
        try:
            value = self._read()
        except Exception as error:
            with self._lock:
                if self._missed:
                    log.exception("count failed")
                    self._keep()
                self._reading = None
                reading.set_exception(error)
        else:
            with self._lock:
                self._value, self._reading = value, None
                self.late += self._missed
                self._keep()
                reading.set_result(value)

    def _keep(self) -> None:
        now = time.monotonic()
        self._expires_at = now + max(KEPT, SLOWNESS * (now - self._began))
        self._missed = False


@dataclass(frozen=True, slots=True)
class RouteRow:
    """A route with the mail that waits for it. `down`: none of its servers is tried now; `failing`
    since when, if it is known."""

    name: str
    servers: list[str]
    waiting: int
    oldest_seconds: float | None
    down: bool
    failing_at: Any
    paused_at: Any


class Overview:
    """The overview of one database."""

    def __init__(
        self, engine: Engine, settings: SmtpdSettings, timeout: float | None = None
    ) -> None:
        self._engine, self._settings = engine, settings
        self._queue, self._statistics = QueueReader(engine), Statistics(engine)
        self._now = KeptValue(self._read)
        self._counts = BackgroundValue(self._count, timeout or COUNTS_TIMEOUT)
        self._charts = {
            name: KeptValue(lambda span=span: self._draw(span))  # type: ignore[misc]
            for name, span in charts.SPANS.items()
        }

    def values(self, span: str) -> dict[str, Any]:
        """What the template needs, for a chart of this span."""
        self._counts.begin()
        rest = self._now.get() | self._charts[span].get()
        return rest | (self._counts.get() or _UNCOUNTED)

    def version(self) -> int:
        """A number that changes when there is something new; it reads what is old."""
        self._now.get()
        return self._now.version + self._counts.late

    def expire(self) -> None:
        """Show at once what an operator has changed."""
        self._now.expire()

    def _draw(self, span: charts.Span) -> dict[str, Any]:
        seconds = span.step * span.steps
        now, attempts = self._statistics.history(seconds, span.step)
        arrivals = self._statistics.arrivals(seconds, span.step)
        return {
            "span": span,
            "flow_chart": charts.flow(now, arrivals, attempts, span),
            "rate": charts.rate(now, attempts, span),
            "latency": charts.latency(now, attempts, span),
            "rows": charts.numbers(now, arrivals, attempts, span),
        }

    def _read(self) -> dict[str, Any]:
        queue, settings = self._queue, self._settings
        summary, servers = queue.read("summary"), queue.read("servers")
        words = {row["server"]: row for row in queue.read("last_words")}
        pauses = queue.read("paused")
        waiting = [row for row in summary if row["state"] in UNFINISHED]
        problems = problems_of(self._engine, settings)
        return {
            "problems": problems,
            "critical": any(problem.kind in CRITICAL for problem in problems),
            "summary": _in_order(summary),
            "counts": _counts(summary),
            "oldest": max((row["oldest_seconds"] for row in waiting), default=None),
            "overdue": sum(row["overdue"] for row in waiting),
            "paused": sum(row["paused"] for row in waiting),
            "bytes": sum(int(row["bytes"] or 0) for row in waiting),
            "servers": [row | {"words": words.get(row["server"])} for row in map(dict, servers)],
            "routes": _routes(summary, queue.read("route_servers"), servers, pauses),
            "workers": [row for row in queue.workers() if row.ended_at is None],
            "pauses": pauses,
            "journal": journal_rows(settings, queue),
            "disk": disk_of(mounted_spool(settings, queue)),
            "limited": self._statistics.rate_limited(),
            "actions": queue.read("actions", seconds=7 * DAY, actor="%", most=ACTIONS),
            "at": stamp(self._statistics.read("now")[0]["now_at"]),
        }

    def _count(self) -> dict[str, Any]:
        """What takes longer than the rest, and is less urgent."""
        return {
            "flow": self._statistics.read("flow"),
            "versions": self._statistics.read("versions"),
            "tops": [(key, self._top(key)) for key in TOP_KEYS],
        }

    def _top(self, key: str) -> Sequence[Row]:
        rows = self._queue.counted_by(key, Filter())
        return [row for row in rows if row[key] or key == "sender"][:TOP]


_UNCOUNTED: dict[str, Any] = {
    "flow": None,
    "versions": None,
    "tops": [(key, None) for key in TOP_KEYS],
}


def _in_order(summary: Iterable[Row]) -> list[Row]:
    order = {str(state): n for n, state in enumerate(State)}
    return sorted(summary, key=lambda row: (order[row["state"]], row["route"]))


def _counts(summary: Sequence[Row]) -> dict[str, int]:
    """Deliveries by state; final states without any are left out."""
    counts = {
        state: sum(row["deliveries"] for row in summary if row["state"] == state) for state in State
    }
    return {str(state): count for state, count in counts.items() if count or state in UNFINISHED}


def _routes(
    summary: Iterable[Row], pairs: Iterable[Row], servers: Iterable[Row], pauses: Iterable[Row]
) -> list[RouteRow]:
    """The routes that workers know or that have unfinished mail, by name."""
    of: dict[str, list[str]] = {}
    for pair in pairs:
        of.setdefault(pair["route"], []).append(pair["server"])
    waiting: dict[str, int] = {}
    oldest: dict[str, float] = {}
    for row in summary:
        if row["state"] in (State.QUEUED, State.DEFERRED):
            name = row["route"]
            of.setdefault(name, [])
            waiting[name] = waiting.get(name, 0) + row["deliveries"]
            oldest[name] = max(oldest.get(name, 0.0), row["oldest_seconds"])
    failing = {row["server"]: row for row in servers if row["circuit_open_workers"]}
    paused = {row["subject"]: row["paused_at"] for row in pauses}
    rows = []
    for name, names in sorted(of.items()):
        down = bool(names) and all(server in failing for server in names)
        times = [failing[server]["failed_at"] for server in names] if down else []
        since = max((at for at in times if at), default=None)
        pause = paused.get(f"route:{name}")
        rows.append(
            RouteRow(name, names, waiting.get(name, 0), oldest.get(name), down, since, pause)
        )
    return rows
