"""A database with a spool and mail in it, for tests of the worker: no SMTP, no Celery, no
processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import text

from relay.db.engine import connect, reading, writing
from relay.ids import dashed, new_id
from relay.queue.accept import Acceptor, NewMessage, NewRecipient
from relay.queue.claim import WorkerQueue
from relay.queue.rescue import Rescuer
from relay.routes import Routes
from relay.settings import WorkerSettings, load
from relay.spool.store import Spool
from tests.dialect import dialect_of
from tests.state_guard import unguarded
from worker.circuit_breaker import ServerPool
from worker.engine import Engine

BODY = b"Subject: test\n\nhello\n"


class EngineHarness:
    """What was accepted, and engines to send it. Settings are quick ones, so that no test waits for
    a default."""

    def __init__(self, database_url: str, spool: Spool, directory: Path, **given: Any) -> None:
        quick: dict[str, Any] = {
            "lease": 20.0, "grace": 0.2, "retry_min": 0.05, "retry_max": 0.2, "uncertain_delay": 0.1,
            "connect_timeout": 5.0, "reply_timeout": 5.0, "drain_timeout": 5.0,
        }  # fmt: skip
        places = {
            "state_dir": directory,
            "database_url": database_url,
            "spool_dir": spool.directory,
        }
        self.settings = load(WorkerSettings, **{**quick, **places, **given})
        self.database, self.spool = connect(database_url, hot=True), spool
        self.dialect = dialect_of(self.database)
        self.spool.prepare(self.database, unsafe=True)
        self.worker_queue = WorkerQueue(self.database, self.settings)
        self.rescuer = Rescuer(self.database, self.settings)

    def accept(
        self, *recipients: str, body: bytes = BODY, sender: str = "a@example.com", stored: bool = True,
        has_turn: bool = False,
    ) -> str:  # fmt: skip
        """One message, as smtpd leaves it; its id. `has_turn`: the caller has the turn to write
        (SQLite)."""
        queue_id, route_for = new_id(), Routes.load(self.settings).route_for
        if stored:
            self.spool.store(queue_id, [body])
        to = [NewRecipient(r, route=route_for(r)) for r in recipients or ("b@example.org",)]
        new = NewMessage(
            queue_id, sender, len(body), to, "127.0.0.1", "client.example.com", "ESMTP"
        )
        acceptor = Acceptor(
            self.database, lifetime=self.settings.queue_lifetime, grace=self.settings.grace
        )
        if has_turn:
            with self.database.begin() as connection:
                acceptor.insert(connection, [new])
        else:
            acceptor.commit([new])
        return queue_id

    def rows(self, sql: str, **given: Any) -> list[dict[str, Any]]:
        """What a SELECT finds; `@` macros and `:id` (32 digits) work."""
        if "id" in given:
            given["id"] = dashed(given["id"])
        with reading(self.database) as connection:
            return [
                dict(row._mapping) for row in connection.execute(text(self.dialect(sql)), given)
            ]

    def change(self, sql: str, **given: Any) -> int:
        """Run an UPDATE; how many rows it changed."""
        if "id" in given:
            given["id"] = dashed(given["id"])
        with writing(self.database) as connection, unguarded(connection):
            return connection.execute(text(self.dialect(sql)), given).rowcount

    def delivery(self, queue_id: str) -> dict[str, Any]:
        return self.rows("SELECT d.* FROM deliveries d WHERE queue_id = :id", id=queue_id)[0]

    def state(self, queue_id: str) -> str:
        return str(self.delivery(queue_id)["state"])

    def states(self) -> set[str]:
        return {row["state"] for row in self.rows("SELECT DISTINCT state FROM deliveries")}

    def attempts(self, queue_id: str) -> list[tuple[str | None, str]]:
        """Server and outcome of each try, in order."""
        sql = "SELECT server, outcome FROM attempts WHERE queue_id = :id ORDER BY claim, attempt_index"
        return [(row["server"], row["outcome"]) for row in self.rows(sql, id=queue_id)]

    def engine(self, *, servers: ServerPool | None = None) -> Engine:
        return Engine(
            self.settings,
            self.worker_queue,
            self.spool,
            Routes.load(self.settings),
            servers=servers,
        )

    @contextmanager
    def working(self, **options: Any) -> Iterator[Engine]:
        """An engine that has its row; drained at the end."""
        engine = self.engine(**options)
        engine.start()
        try:
            assert engine.lease.registered.wait(10)
            yield engine
        finally:
            assert engine.drain(5)

    def close(self) -> None:
        self.database.dispose()
