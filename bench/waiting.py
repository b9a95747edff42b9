"""`python -m bench.waiting`: the cost of waiting mail for an idle relay and a busy one.

Half of the rows are overdue on a route whose server is down, half are deferred for long. A turn is
what a worker asks each second while it is idle: the sweeper's statements, and a poll for overdue
mail of another route. Then messages of that other route are accepted, claimed and completed in
rounds. Each figure is measured on a database with an empty queue and on one with the rows; the two
take turns. The CPU time of SQLite is that of this process, the CPU time of PostgreSQL that of all
its processes.
"""

import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil
from sqlalchemy import Engine, make_url

from bench import history
from bench.machine import cpu_seconds
from relay.db.engine import connect, migrate, writing
from relay.dsn.generator import DsnGenerator
from relay.ids import new_id
from relay.queue.accept import Acceptor, NewMessage, NewRecipient
from relay.queue.claim import WorkerQueue
from relay.queue.model import Attempt, ClaimRequest, Completion
from relay.queue.outcome import Outcome
from relay.queue.rescue import Rescuer
from relay.queue.states import State
from relay.settings import WorkerSettings, load
from relay.spool.store import Spool

ROUND = 32
ROUTES = ("default", "dead")
BLOCK = 10  # idle turns between two readings of the CPU time, which has ticks of 10 ms


class RelayQueue:
    """The statements of smtpd and of a worker, without either process. `samples` are the values of
    each figure."""

    def __init__(self, url: str, directory: Path) -> None:
        migrate(url)
        settings = load(WorkerSettings, state_dir=directory, delay_warning=4 * 3600.0)
        self.engine = connect(url, hot=True)
        spool = Spool(directory)
        spool.prepare(self.engine, unsafe=True)
        self.acceptor = Acceptor(
            self.engine,
            lifetime=settings.queue_lifetime,
            grace=settings.grace,
        )
        self.delay_warning = settings.delay_warning
        self.queue = WorkerQueue(self.engine, settings)
        self.rescuer = Rescuer(self.engine, settings)
        self.generator = DsnGenerator(self.engine, spool, settings, lambda _: "default")
        self.worker = new_id()
        self.queue.register(self.worker, "bench", os.getpid())
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

    def round(self) -> None:
        """Measure how ROUND messages are accepted, claimed and completed."""
        recipients = [NewRecipient("b@example.org")]
        messages = [
            NewMessage(new_id(), "a@example.com", 4096, recipients, "192.0.2.1", "c", "ESMTP")
            for _ in range(ROUND)
        ]
        began = time.perf_counter()
        with writing(self.engine) as connection:
            self.acceptor.insert(connection, messages, delay_warning=self.delay_warning)
        accepted = time.perf_counter()
        (claims,) = self.queue.commit(
            [ClaimRequest(self.worker, [message.id for message in messages], {"default": ROUND})]
        )
        if not isinstance(claims, list) or len(claims) != ROUND:
            raise SystemExit("not all of a round was claimed")
        attempt = Attempt(1, "192.0.2.1:628", Outcome.DELIVERED, "ok", 4200, 0.1, 0.0)
        self.queue.commit(
            [
                Completion(
                    self.worker,
                    claim.queue_id,
                    claim.number,
                    claim.claim,
                    State.DELIVERED,
                    Outcome.DELIVERED,
                    "ok",
                    attempts=[attempt],
                )
                for claim in claims
            ]
        )
        completed = time.perf_counter()
        self.samples["accepted a second"].append(ROUND / (accepted - began))
        self.samples["claimed and completed a second"].append(ROUND / (completed - accepted))


def database_cpu(engine: Engine) -> float:
    """The CPU seconds that the database has used so far."""
    if engine.dialect.name == "sqlite":
        return sum(os.times()[:2])
    return cpu_seconds(child.pid for child in psutil.Process().children())


def beside(url: str) -> str:
    """The URL of a second, new database on the same server."""
    other = make_url(url)
    if other.get_backend_name() == "sqlite":
        return f"{url}-waiting"
    engine = connect(url)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("CREATE DATABASE waiting")
    engine.dispose()
    return other.set(database="waiting").render_as_string(hide_password=False)


def measure(name: str, url: str, rows: int, turns: int, rounds: int) -> None:
    """Print a line for each figure: with an empty queue, with the rows, and the ratio. The two take
    turns, so that other load on the machine is the same for both."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        full_url = beside(url)
        empty, full = RelayQueue(url, Path(first)), RelayQueue(full_url, Path(second))
        history.fill(full_url, rows)
        history.run(full_url, "make_overdue")
        for relay in (empty, full) * 10:  # plans and caches
            relay.turn()
            relay.round()
        for relay in (empty, full):
            relay.samples.clear()
        for relay in (empty, full) * turns:
            relay.block()
        for relay in (empty, full) * rounds:
            relay.round()
        for relay in (empty, full):
            relay.engine.dispose()
    for figure, samples in empty.samples.items():
        average = statistics.fmean if figure.endswith(", ms") else statistics.median
        before, after = average(samples), average(full.samples[figure])
        ratio = after / max(before, 0.01)
        print(f"{name:12}{figure:32}{before:10.2f}{after:12.2f}{ratio:8.2f}", flush=True)


if __name__ == "__main__":
    heading = f"{'':44}{'empty':>10}{'waiting':>12}{'ratio':>8}"
    history.on_each_database(
        measure, "bench.waiting", heading, rows=1_000_000, turns=20, rounds=200
    )
