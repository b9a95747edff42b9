"""The sweeper: a thread in every worker that does what is due in the database.

About once a second it makes deferred deliveries whose time has come `queued` and hints at them, in
due order and in bounded batches, wakes what waits for a server that is back, gives up transfers
that take longer than any session may, and watches the other workers. Any number of workers sweep at
once: rows that one has locked the others skip, and none is in charge.

What must stay true: a worker is declared dead only after its lease was seen to have run out,
unchanged, twice, LEASE apart by this machine's monotonic clock, with the database reachable at
every look between: so that neither a clock that jumped, nor an outage that kept everybody from
renewing, buries the living. After an outage nothing is swept before this worker's own engine has
renewed its lease, and thereby recorded what it knows. The tick file is touched only while both this
thread and the engine's loop go round: its age is the worker's health.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from relay.dsn.generator import DsnGenerator
from relay.hints import Hints
from relay.log import first_line, get_logger
from relay.queue.rescue import Rescuer
from relay.routes import Route
from relay.settings import WorkerSettings
from worker.delivery import longest_wait
from worker.engine import Engine

log = get_logger(__name__)
BATCH = 256
BATCHES = 8  # a sweep, so that the watch over workers is kept however much is due
MAX_HEARTBEAT_AGE = 10.0  # of an engine that is alive (seconds)


def heartbeat_file(settings: WorkerSettings, pid: int | None = None) -> Path:
    """The file whose age tells whether this worker is alive."""
    return settings.health_file or settings.state_dir / f"worker-{pid or os.getpid()}.tick"


class LeaseMonitor:
    """Who is dead: leases that ran out, and for how long they have been seen so.

    The time between two looks counts as LEASE / 4 at most. A watcher that was stopped has seen
    nothing meanwhile, and what stopped it (a paused machine) may have stopped the others too, which
    renew as soon as they are awake: at the latest after LEASE / 4, and so before they have been
    seen for a LEASE.
    """

    def __init__(self, lease: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease, self._clock = lease, clock
        self._seen: dict[tuple[str, str], float] = {}  # for how many seconds
        self._looked = clock()

    def forget(self) -> None:
        """The database was away: begin again."""
        self._seen.clear()

    def look(self, expired_leases: list[tuple[str, str]], own: str) -> list[tuple[str, str]]:
        """Those of the leases (worker, end) that have been seen like this for a LEASE; never our
        own."""
        now = self._clock()
        passed, self._looked = min(now - self._looked, self._lease / 4), now
        others = [lease for lease in expired_leases if lease[0] != own]
        self._seen = {
            lease: self._seen[lease] + passed if lease in self._seen else 0.0 for lease in others
        }
        return [lease for lease, seen in self._seen.items() if seen >= self._lease]


class Sweeper:
    """`start`, then `close`; `sweep` is one turn."""

    def __init__(
        self,
        settings: WorkerSettings,
        sweeps: Rescuer,
        debts: DsnGenerator,
        engine: Engine,
        hints: Hints,
        *,
        open_circuits: Callable[[], Mapping[str, str]] = dict,
        known: Callable[[], Mapping[str, Sequence[str]]] = dict,
        routes: Callable[[], Sequence[Route]] = tuple,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._sweeps, self._debts = settings, sweeps, debts
        self._engine, self._hints, self._clock = engine, hints, clock
        self._resting, self._known, self._routes = open_circuits, known, routes
        self._said: tuple[str, Mapping[str, str]] = ("", {})  # as who, which servers rest
        self._told: tuple[str, Mapping[str, Sequence[str]]] = (
            "",
            {},
        )  # as who, which routes there are
        self._watch = LeaseMonitor(settings.lease, clock)
        self._away_until: float | None = None  # when the database was last found away
        self._tick_file = heartbeat_file(settings)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        """Start sweeping."""
        self._thread.start()

    def close(self) -> None:
        """Sweep no more."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(1.0)
        self._tick_file.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._closing.wait(min(1.0, self._settings.lease / 8)):
            self.sweep()
            if not self._closing.is_set():
                self._tick()

    def sweep(self) -> None:
        """Do what is due, unless the database is away or this worker has not told yet what it did
        before it was."""
        if not self._engine.worker:
            self._watch.forget()
            return
        if self._away_until is not None and not self._engine.renewed_since(self._away_until):
            return
        try:
            self._engine.pause(self._sweeps.paused())
            self._say_what_it_knows()
            self._bring_near()
            self._requeue()
            self._wake()
            self._sweeps.expire_stuck_transfers()
            self._bury()
        except Exception as error:
            if self._away_until is None:
                log.warning("not swept", reason=first_line(error))
            self._away()
        else:
            self._away_until = None
            self._tell_senders()

    def _say_what_it_knows(self) -> None:
        known = self._engine.worker, self._known()
        if known != self._told and (known[1] or self._told[1]):
            self._sweeps.publish_routes(*known)
            self._told = known
        found = self._engine.worker, self._resting()
        if found != self._said and (found[1] or self._said[1]):
            self._sweeps.publish_open_circuits(*found)
            self._said = found

    def _away(self) -> None:
        self._away_until = self._clock()
        self._watch.forget()

    def _bring_near(self) -> None:
        """Make due what a clock that was set back has put off."""
        routes = self._routes()
        names = [route.name for route in routes]
        if moved := self._sweeps.bring_near(
            BATCH * BATCHES, longest_wait(self._settings, routes), names
        ):
            log.warning("due times too far ahead", deliveries=moved)

    def _requeue(self) -> None:
        """Make queued what is due."""
        for _ in range(BATCHES):
            ids = self._sweeps.requeue_due(BATCH)
            self._hints.offer(ids)
            if not ids or self._closing.is_set():
                break

    def _wake(self) -> None:
        """Make due what waits for a route that works again; of what waits for one that may work,
        the oldest.

        Whichever worker sees a route work wakes its mail, whoever deferred it. Where all mail of a
        route is deferred nothing else would be sent there, and none would see it.
        """
        woken = 0
        for route, most in self._engine.awaited(
            self._sweeps.waiting(self._engine.routes())
        ).items():
            woken += (count := self._sweeps.wake(route, most))
            if count > 1:
                log.info("deferred mail due", route=route, deliveries=count)
        if woken:
            self._engine.look()

    def _tell_senders(self) -> None:
        """Make the notices that are owed; what hinders them (a full spool) hinders nothing else."""
        for tell in (self._debts.generate, self._debts.warn):
            try:
                self._hints.offer(tell(BATCH))
            except Exception as error:
                log.error("notices put off", reason=first_line(error))

    def _bury(self) -> None:
        for worker, until in self._watch.look(self._sweeps.expired_leases(), self._engine.worker):
            lost = self._sweeps.expire_worker(worker, until)
            if lost is not None:
                log.error("worker vanished", worker=worker, uncertain=lost)
        self._sweeps.rescue_unowned()

    def _tick(self) -> None:
        if time.monotonic() - self._engine.heartbeat < MAX_HEARTBEAT_AGE:
            try:
                self._tick_file.touch()
            except OSError as error:
                log.error(
                    "health file not touched", path=str(self._tick_file), reason=error.strerror
                )
