"""The sweeper: a thread in every worker that does what is due in the database, about once a second.

Any number of workers sweep at the same time, in due order and in bounded batches; each skips the
rows that another has locked. After an outage of the database nothing is swept before this worker
has renewed its own lease, and so has recorded its outcomes.

What must stay true: a worker is expired only after its lease was seen expired, unchanged, for a
LEASE by this machine's monotonic clock, with the database reachable. Neither a clock that jumps nor
an outage expires a worker that runs. The heartbeat file is touched only while this thread and the
engine's loop both run.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from relay.dsn.generator import DsnGenerator
from relay.hints import Hints
from relay.log import first_line, get_logger
from relay.queue.rescue import Rescuer
from relay.settings import WorkerSettings
from worker.delivery import longest_wait
from worker.engine import Engine
from worker.periodic import PeriodicThread

log = get_logger(__name__)
BATCH = 256
BATCHES = 8  # in one sweep, so that workers are watched however much is due
MAX_HEARTBEAT_AGE = 10.0  # seconds, of an engine that runs


def heartbeat_file(settings: WorkerSettings, pid: int | None = None) -> Path:
    """The file whose age tells whether a worker process is healthy."""
    return settings.health_file or settings.state_dir / f"worker-{pid or os.getpid()}.heartbeat"


class LeaseMonitor:
    """How long the expired leases of other workers have been seen unchanged.

    The time between two observations counts as LEASE / 4 at most. If this process was stopped it
    observed nothing, and the others may have been stopped with it (a paused machine). They renew
    within LEASE / 4 when they run again, so before the monitor has seen their leases for a LEASE.
    """

    def __init__(self, lease: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease = lease
        self._clock = clock
        self._seconds: dict[tuple[str, str], float] = {}
        self._observed_at = clock()

    def reset(self) -> None:
        """Begin again: the database was away."""
        self._seconds.clear()

    def observe(self, expired: Sequence[tuple[str, str]], own: str) -> list[tuple[str, str]]:
        """Those of the expired leases (worker, end) that have been seen for a LEASE; never this
        worker's own."""
        now = self._clock()
        elapsed = min(now - self._observed_at, self._lease / 4)
        self._observed_at = now
        self._seconds = {
            lease: self._seconds[lease] + elapsed if lease in self._seconds else 0.0
            for lease in expired
            if lease[0] != own
        }
        return [lease for lease, seconds in self._seconds.items() if seconds >= self._lease]


class Sweeper(PeriodicThread):
    """Sweeps and touches the heartbeat file."""

    def __init__(
        self,
        settings: WorkerSettings,
        rescuer: Rescuer,
        generator: DsnGenerator,
        engine: Engine,
        hints: Hints,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__("sweeper", min(1.0, settings.lease / 8))
        self._settings = settings
        self._rescuer = rescuer
        self._generator = generator
        self._engine = engine
        self._hints = hints
        self._clock = clock
        self._published_routes: tuple[str, Mapping[str, Sequence[str]]] = ("", {})
        self._published_circuits: tuple[str, Mapping[str, str]] = ("", {})
        self._monitor = LeaseMonitor(settings.lease, clock)
        self._away_at: float | None = None  # when the database was last found away
        self._heartbeat_file = heartbeat_file(settings)

    def close(self) -> None:
        """End after the current batch, and remove the heartbeat file."""
        super().close()
        if self.is_alive():
            self.join(1.0)
        self._heartbeat_file.unlink(missing_ok=True)

    def turn(self) -> None:
        """Sweep, and show that this thread runs."""
        self.sweep()
        if not self.closing.is_set():
            self.touch_heartbeat()

    def sweep(self) -> None:
        """Do what is due. Nothing happens while the database is away, or before this worker has
        renewed its lease after that."""
        lease = self._engine.lease
        if not lease.worker:
            self._monitor.reset()
            return
        if self._away_at is not None and lease.renewed_at < self._away_at:
            return
        try:
            self._engine.servers.pauses = self._rescuer.paused()
            self._publish(lease.worker)
            self._limit_waits()
            self._queue_due()
            self._wake()
            self._rescuer.expire_stuck_transfers()
            self._expire_workers(lease.worker)
        except Exception as error:
            if self._away_at is None:
                log.warning("sweep failed", reason=first_line(error))
            self._away_at = self._clock()
            self._monitor.reset()
        else:
            self._away_at = None
            self._generate_dsns()

    def _publish(self, worker: str) -> None:
        """Record for operators which routes this worker knows, and which circuits are open."""
        routes = worker, self._engine.routes.servers()
        if routes != self._published_routes:
            self._rescuer.publish_routes(*routes)
            self._published_routes = routes
        circuits = worker, self._engine.servers.open_circuits()
        if circuits != self._published_circuits and (circuits[1] or self._published_circuits[1]):
            self._rescuer.publish_open_circuits(*circuits)
            self._published_circuits = circuits

    def _limit_waits(self) -> None:
        """Make due what waits longer than any wait can be: a clock was set back."""
        routes = self._engine.routes.all()
        names = [route.name for route in routes]
        longest = longest_wait(self._settings, routes)
        if moved := self._rescuer.bring_near(BATCH * BATCHES, longest, names):
            log.warning("due times too far ahead", deliveries=moved)

    def _queue_due(self) -> None:
        for _ in range(BATCHES):
            due = self._rescuer.requeue_due(BATCH)
            for route, ids in due.items():
                self._hints.offer(ids, route)
            if not due or self.closing.is_set():
                break

    def _wake(self) -> None:
        """Make due what waits only for a route that works again, and the oldest delivery of a route
        that may be tried.

        Any worker that sees a route work wakes its mail, even if another worker deferred it: where
        all mail of a route is deferred nothing else would be sent there.
        """
        known = map(self._engine.routes.get, self._rescuer.waiting(self._engine.routes.names()))
        limits = self._engine.servers.wake_limits([route for route in known if route])
        woken = {route: self._rescuer.wake(route, most) for route, most in limits.items()}
        for route, count in woken.items():
            if count > 1:
                log.info("deferred mail due", route=route, deliveries=count)
        if any(woken.values()):
            self._engine.poll_now()

    def _expire_workers(self, own: str) -> None:
        for worker, ended_at in self._monitor.observe(self._rescuer.expired_leases(), own):
            uncertain = self._rescuer.expire_worker(worker, ended_at)
            if uncertain is not None:
                log.error("worker expired", worker=worker, uncertain=uncertain)
        self._rescuer.rescue_unowned()

    def _generate_dsns(self) -> None:
        """Generate pending DSNs and delay warnings. A failure here (a full spool) stops nothing
        else."""
        for generate in (self._generator.generate, self._generator.warn):
            try:
                self._hints.offer(generate(BATCH))
            except Exception as error:
                log.error("dsns not generated", reason=first_line(error))

    def touch_heartbeat(self) -> None:
        """Touch the heartbeat file if the engine's loop runs."""
        if time.monotonic() - self._engine.heartbeat < MAX_HEARTBEAT_AGE:
            try:
                self._heartbeat_file.touch()
            except OSError as error:
                path = str(self._heartbeat_file)
                log.error("heartbeat file not touched", path=path, reason=error.strerror)
