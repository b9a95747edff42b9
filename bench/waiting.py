"""`python -m bench.waiting`: the cost of waiting mail for an idle relay and a busy one.

Half of the rows are overdue on a route whose server is down, half are deferred for long. A turn is
what a worker asks each second while it is idle: the sweeper's statements, and a poll for overdue
mail of another route. Then messages of that other route are accepted, claimed and completed in
rounds. Each figure is measured with an empty queue and then with the rows. The CPU time of SQLite
is that of this process, the CPU time of PostgreSQL that of all its processes.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from sqlalchemy import Engine, text

from bench.history import analyze, fill, on_each_database
from bench.processes import cpu_seconds
from relay.db.engine import connect, migrate, writing
from relay.db.schema import Outcome, State
from relay.db.sql import dialect_of
from relay.dsn.generator import DsnGenerator
from relay.ids import new_id
from relay.queue.accept import Acceptor, NewMessage, NewRecipient
from relay.queue.claim import WorkerQueue
from relay.queue.model import Attempt, ClaimRequest, Completion
from relay.queue.rescue import Rescuer
from relay.settings import WorkerSettings, load
from relay.spool.store import Spool

ROUND = 32
ROUTES = ("default", "dead")


class RelayQueue:
    """The statements of smtpd and of a worker, without either process."""

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
            delay_warning=settings.delay_warning,
        )
        self.queue = WorkerQueue(self.engine, settings)
        self.rescuer = Rescuer(self.engine, settings)
        self.generator = DsnGenerator(self.engine, spool, settings, lambda _: "default")
        self.worker = new_id()
        self.queue.register(self.worker, "bench", os.getpid())

    def turn(self) -> None:
        """Ask what an idle worker asks in a second."""
        self.rescuer.paused()
        self.rescuer.bring_near(2048, 5400.0, ROUTES)
        self.rescuer.requeue_due(256)
        self.rescuer.expire_stuck_transfers()
        self.rescuer.expired_leases()
        self.rescuer.rescue_unowned()
        self.generator.generate(256)
        self.generator.warn(256)
        self.queue.commit([ClaimRequest(self.worker, None, {"default": 64})])

    def round(self) -> tuple[float, float]:
        """Accept, claim and complete ROUND messages: (seconds to accept, seconds to claim and
        complete)."""
        recipients = [NewRecipient("b@example.org")]
        messages = [
            NewMessage(new_id(), "a@example.com", 4096, recipients, "192.0.2.1", "c", "ESMTP")
            for _ in range(ROUND)
        ]
        began = time.perf_counter()
        self.acceptor.commit(messages)
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
                    self.worker, claim.queue_id, claim.number, claim.claim, State.DELIVERED,
                    Outcome.DELIVERED, "ok", tries=[attempt],
                )
                for claim in claims
            ]
        )  # fmt: skip
        return accepted - began, time.perf_counter() - accepted


def add_overdue_rows(engine: Engine) -> None:
    """Make half of the deferred rows overdue on a route whose server is down."""
    spell = dialect_of(engine)
    with writing(engine) as connection:
        if spell.postgresql:
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        sql = """UPDATE deliveries
            SET state = 'queued', route = 'dead', due_at = @ago(3600 * (1 + @chance))
            WHERE state = 'deferred'
                AND queue_id IN (SELECT id FROM messages WHERE sender < 'sender5')"""
        connection.execute(text(spell(sql)))
    analyze(engine)


def database_cpu(engine: Engine) -> Callable[[], float]:
    """A function that returns the CPU seconds that the database has used so far."""
    if engine.dialect.name == "sqlite":
        return lambda: sum(os.times()[:2])
    with engine.connect() as connection:
        backend = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    parent = psutil.Process(backend).ppid()
    return lambda: cpu_seconds({"database": [parent]})["database"]


def cost_now(relay: RelayQueue, turns: int, rounds: int) -> dict[str, float]:
    """The cost of an idle second and of a message now."""
    used = database_cpu(relay.engine)
    for _ in range(10):  # plans and caches
        relay.turn()
        relay.round()
    before = used()
    began = time.perf_counter()
    for _ in range(turns):
        relay.turn()
    idle = time.perf_counter() - began
    cpu = used() - before
    times = [relay.round() for _ in range(rounds)]
    return {
        "an idle turn, ms": 1000 * idle / turns,
        "its CPU in the database, ms": 1000 * cpu / turns,
        "accepted a second": ROUND / statistics.median(accept for accept, _ in times),
        "claimed and completed a second": ROUND
        / statistics.median(deliver for _, deliver in times),
    }


def measure(name: str, url: str, rows: int, turns: int, rounds: int) -> None:
    """Print a line for each figure: with an empty queue, with the rows, and the ratio."""
    with tempfile.TemporaryDirectory() as directory:
        relay = RelayQueue(url, Path(directory))
        empty = cost_now(relay, turns, rounds)
        fill(url, rows)
        add_overdue_rows(relay.engine)
        full = cost_now(relay, turns, rounds)
        relay.engine.dispose()
    for figure, value in empty.items():
        print(
            f"{name:12}{figure:32}{value:10.2f}{full[figure]:12.2f}"
            f"{full[figure] / max(value, 0.01):8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    heading = f"{'':44}{'empty':>10}{'waiting':>12}{'ratio':>8}"
    on_each_database(measure, "bench.waiting", heading, rows=1_000_000, turns=200, rounds=200)
