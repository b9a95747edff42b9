"""`python -m bench.waiting`: the cost of waiting mail for an idle relay and a busy one.

Half of the rows are overdue on a route whose server is down, half are deferred for long. A turn is
what a worker asks each second while it is idle: the sweeper's statements, and a poll for overdue
mail of another route. Then messages of that other route are accepted, claimed and completed in
rounds. Each figure is measured on a database with an empty queue and on one with the rows; the two
take turns. The CPU time of SQLite is that of this process, the CPU time of PostgreSQL that of all
its processes.

The rounds are measured twice. PostgreSQL has vacuumed the full tables, so it puts new attempts into
the gaps at the ends of old pages at first, one page for each; after LATER rounds the gaps are used.
"""

import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil
from sqlalchemy import Engine

from bench import history
from bench.machine import cpu_seconds
from bench.relay_queue import RelayQueue
from bench.services import beside
from relay.db.engine import migrate
from relay.dsn.generator import DsnGenerator
from relay.queue.model import ClaimRequest
from relay.queue.rescue import Rescuer
from relay.spool.store import Spool

ROUND = 32
LATER = 800
ROUTES = ("default", "dead")
BLOCK = 10  # idle turns between two readings of the CPU time, which has ticks of 10 ms


class IdleRelay(RelayQueue):
    """A queue with the sweeper of its worker. `samples` are the values of each figure."""

    def __init__(self, url: str, directory: Path) -> None:
        super().__init__(url, directory)
        spool = Spool(directory)
        spool.prepare(self.engine, unsafe=True)
        self.rescuer = Rescuer(self.engine, self.settings)
        self.generator = DsnGenerator(self.engine, spool, self.settings, lambda _: "default")
        self.samples: defaultdict[str, list[float]] = defaultdict(list)

    def turn(self) -> None:
        """Run the statements that an idle worker runs in a second."""
        self.rescuer.paused()
        self.rescuer.bring_near(2048, 5400.0, ROUTES)
        self.rescuer.requeue_due(256)
        self.rescuer.expire_stuck_transfers()
        self.rescuer.expired_leases()
        self.rescuer.rescue_unowned()
        self.generator.generate(256)
        self.generator.warn(256)
        self.queue.commit([ClaimRequest(self.worker, None, {"default": 64})])

    def block(self) -> None:
        """Measure BLOCK idle turns."""
        cpu, began = database_cpu(self.engine), time.perf_counter()
        for _ in range(BLOCK):
            self.turn()
        self.samples["an idle turn, ms"].append(1000 * (time.perf_counter() - began) / BLOCK)
        cpu = database_cpu(self.engine) - cpu
        self.samples["its CPU in the database, ms"].append(1000 * cpu / BLOCK)

    def round(self, when: str | None = None) -> None:
        """Measure how ROUND messages are accepted, claimed and completed; `when` ends the names of
        the figures. Without it the round does not count."""
        began = time.perf_counter()
        ids = self.accept(ROUND)
        accepted = time.perf_counter()
        self.complete_and_claim(self.complete_and_claim([], ids), [])
        completed = time.perf_counter()
        if when is not None:
            self.samples[f"accepted a second{when}"].append(ROUND / (accepted - began))
            completions = self.samples[f"claimed, completed a second{when}"]
            completions.append(ROUND / (completed - accepted))


def database_cpu(engine: Engine) -> float:
    """The CPU seconds that the database has used so far."""
    if engine.dialect.name == "sqlite":
        return sum(os.times()[:2])
    return cpu_seconds(child.pid for child in psutil.Process().children())


def measure(name: str, url: str, rows: int, turns: int, rounds: int) -> None:
    """Print a line for each figure: with an empty queue, with the rows, and the ratio. The two take
    turns, so that other load on the machine is the same for both."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        full_url = beside(url, "waiting")
        for each in (url, full_url):
            migrate(each)
        empty, full = IdleRelay(url, Path(first)), IdleRelay(full_url, Path(second))
        history.fill(full_url, rows)
        history.run(full_url, "make_overdue")
        for relay in (empty, full) * 10:  # plans and caches
            relay.turn()
            relay.round()
        for relay in (empty, full) * turns:
            relay.block()
        for relay in (empty, full) * rounds:
            relay.round("")
        for relay in (empty, full) * max(0, LATER - rounds):
            relay.round()
        for relay in (empty, full) * rounds:
            relay.round(", later")
        for relay in (empty, full):
            relay.engine.dispose()
    for figure, samples in empty.samples.items():
        average = statistics.fmean if figure.endswith(", ms") else statistics.median
        before, after = average(samples), average(full.samples[figure])
        ratio = after / max(before, 0.01)
        print(f"{name:12}{figure:40}{before:10.2f}{after:12.2f}{ratio:8.2f}", flush=True)


if __name__ == "__main__":
    heading = f"{'':52}{'empty':>10}{'waiting':>12}{'ratio':>8}"
    history.on_each_database(
        measure, "bench.waiting", heading, rows=1_000_000, turns=20, rounds=200
    )
