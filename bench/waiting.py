"""`python -m bench.waiting`: what mail that waits costs a relay that is idle, and one that is busy,
on both databases.

Half of the rows are overdue for a route whose server is dead, the other half are deferred far
ahead. A turn is what a worker asks once a second while it has nothing to do: a sweep, and a look
for overdue mail of another route. Then messages of that other route are accepted, claimed and
recorded in rounds. Each figure is taken beside an empty queue, then beside those rows. On SQLite
the database's CPU time is ours; that of PostgreSQL is all of its processes'.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Engine, text

from bench.history import fill, on_each
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
    """A worker and smtpd, as far as the database knows them."""

    def __init__(self, url: str, directory: Path) -> None:
        migrate(url)
        settings = load(WorkerSettings, state_dir=directory, delay_warning=4 * 3600.0)
        self.engine = connect(url, hot=True)
        spool = Spool(directory)
        spool.prepare(self.engine, unsafe=True)
        self.intake = Acceptor(self.engine, lifetime=settings.queue_lifetime, grace=settings.grace)
        self.ledger, self.sweeps = (
            WorkerQueue(self.engine, settings),
            Rescuer(self.engine, settings),
        )
        self.debts = DsnGenerator(self.engine, spool, settings, lambda _: "default")
        self.worker = new_id()
        self.ledger.register(self.worker, "bench", os.getpid())

    def turn(self) -> None:
        """What an idle worker asks in a second."""
        self.sweeps.paused()
        self.sweeps.bring_near(2048, 5400.0, ROUTES)
        self.sweeps.requeue_due(256)
        self.sweeps.expire_stuck_transfers()
        self.sweeps.expired_leases()
        self.sweeps.rescue_unowned()
        self.debts.generate(256)
        self.debts.warn(256)
        self.ledger.commit([ClaimRequest(self.worker, None, {"default": 64})])

    def round(self) -> tuple[float, float]:
        """A round of messages, from acceptance to delivery: seconds to accept, seconds to claim and
        record."""
        messages = [
            NewMessage(
                new_id(),
                "a@example.com",
                4096,
                [NewRecipient("b@example.org")],
                "192.0.2.1",
                "c",
                "ESMTP",
            )
            for _ in range(ROUND)
        ]
        began = time.perf_counter()
        self.intake.commit(messages)
        accepted = time.perf_counter()
        (claims,) = self.ledger.commit(
            [ClaimRequest(self.worker, [one.id for one in messages], {"default": ROUND})]
        )
        if not isinstance(claims, list) or len(claims) != ROUND:
            raise SystemExit("not all of a round was claimed")
        tried = Attempt(1, "192.0.2.1:628", Outcome.DELIVERED, "ok", 4200, 0.1, 0.0)
        given = {
            "state": State.DELIVERED,
            "outcome": Outcome.DELIVERED,
            "reply": "ok",
            "tries": [tried],
        }
        self.ledger.commit(
            [
                Completion(self.worker, c.queue_id, c.number, c.claim, **given)  # type: ignore[arg-type]
                for c in claims
            ]
        )
        return accepted - began, time.perf_counter() - accepted


def wait_for_a_dead_server(engine: Engine) -> None:
    """Half of what `fill` left deferred becomes overdue on another route."""
    spell = dialect_of(engine)
    with writing(engine) as connection:
        if spell.postgresql:
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        sql = """UPDATE deliveries SET state = 'queued', route = 'dead', due_at = @ago(3600 * (1 + @chance))
            WHERE state = 'deferred' AND queue_id IN (SELECT id FROM messages WHERE sender < 'sender5')"""
        connection.execute(text(spell(sql)))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if spell.postgresql:
            connection.exec_driver_sql("SET statement_timeout = 0")
        connection.exec_driver_sql("VACUUM ANALYZE" if spell.postgresql else "ANALYZE")


def database_cpu(engine: Engine) -> Callable[[], float]:
    """What tells the CPU time that the database has used until now (seconds)."""
    if engine.dialect.name == "sqlite":
        return lambda: sum(os.times()[:2])
    with engine.connect() as connection:
        backend = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    parent = int(Path(f"/proc/{backend}/stat").read_text().rpartition(")")[2].split()[1])
    return lambda: cpu_seconds({"database": [parent]})["database"]


def figures(relay: RelayQueue, turns: int, rounds: int) -> dict[str, float]:
    """What an idle second and what a message costs now."""
    used = database_cpu(relay.engine)
    for _ in range(10):  # plans and caches
        relay.turn()
        relay.round()
    before, began = used(), time.perf_counter()
    for _ in range(turns):
        relay.turn()
    idle, cpu = time.perf_counter() - began, used() - before
    times = [relay.round() for _ in range(rounds)]
    return {
        "an idle turn, ms": 1000 * idle / turns,
        "its CPU in the database, ms": 1000 * cpu / turns,
        "accepted a second": ROUND / statistics.median(accept for accept, _ in times),
        "claimed and recorded a second": ROUND / statistics.median(deliver for _, deliver in times),
    }


def measure(name: str, url: str, rows: int, turns: int, rounds: int) -> None:
    """Print a line for each figure: beside an empty queue, beside the rows, and their ratio."""
    with tempfile.TemporaryDirectory() as directory:
        relay = RelayQueue(url, Path(directory))
        empty = figures(relay, turns, rounds)
        fill(url, rows)
        wait_for_a_dead_server(relay.engine)
        full = figures(relay, turns, rounds)
        relay.engine.dispose()
    for what, value in empty.items():
        print(
            f"{name:12}{what:32}{value:10.2f}{full[what]:12.2f}{full[what] / max(value, 0.01):8.2f}",
            flush=True,
        )


def main() -> None:
    """Both databases, each made anew below a directory that goes with it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.waiting", description="Measure what waiting mail costs."
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=200)
    given = parser.parse_args()
    print(
        f"{given.rows} rows, load {os.getloadavg()[0]:.1f}\n{'':44}{'empty':>10}{'waiting':>12}{'ratio':>8}"
    )
    on_each(lambda name, url: measure(name, url, given.rows, given.turns, given.rounds))


if __name__ == "__main__":
    main()
