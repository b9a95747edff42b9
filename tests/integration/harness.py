"""Harnesses of the queue and of a worker: one database, without SMTP, Celery or processes.

`QueueHarness` runs the statements of smtpd, workers, sweepers and operators. `EngineHarness` has a
spool too, and runs a worker's engine. Time does not pass by waiting: `QueueHarness.pass_time` moves
the times in the database back.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from sqlalchemy import text

from relay.db.engine import connect, reading, writing
from relay.ids import dashed, new_id
from relay.queue.accept import Acceptor, NewMessage, NewRecipient
from relay.queue.claim import WorkerQueue
from relay.queue.model import Attempt, Claim, ClaimRequest, Completion, CompletionResult, Renewal
from relay.queue.outcome import Outcome
from relay.queue.rescue import Rescuer
from relay.queue.states import State
from relay.routes import Routes
from relay.settings import WorkerSettings, load
from relay.spool.store import Spool
from tests.dialect import dialect_of
from tests.state_guard import unguarded
from worker.circuit_breaker import ServerPool
from worker.engine import Engine

BODY = b"Subject: test\n\nhello\n"
PLENTY = {"default": 1000}
OUTCOME_POLICY = {
    Outcome.DELIVERED: State.DELIVERED,
    Outcome.DEFERRED: State.DEFERRED,
    Outcome.REJECTED: State.BOUNCED,
    Outcome.UNREACHABLE: State.DEFERRED,
    Outcome.INTERRUPTED: State.DEFERRED,
    Outcome.UNCERTAIN: State.DEFERRED,
    Outcome.MALFORMED: State.DEFERRED,
    Outcome.UNSENDABLE: State.HELD,
}


def new_message(
    *addresses: str,
    queue_id: str | None = None,
    sender: str = "a@example.com",
    size: int = 100,
    **more: Any,
) -> NewMessage:
    """A message to `b@example.org`, or to these addresses; `route:address` names the route."""
    routed = [address.rpartition(":") for address in addresses or ("b@example.org",)]
    recipients = [NewRecipient(address, route=route or "default") for route, _, address in routed]
    client = {"client_address": "192.0.2.1", "helo": "client.example.com", "protocol": "ESMTP"}
    return NewMessage(queue_id or new_id(), sender, size, recipients, **(client | more))


class QueueHarness:
    """One database, and all programs that use it. Settings can be given by name. `registered`:
    `worker` is registered at once, and not when it is first used."""

    def __init__(self, database_url: str, *, registered: bool = True, **given: Any) -> None:
        quick = {"grace": 5.0, "lease": 60.0, "queue_lifetime": 1000.0, "uncertain_delay": 15.0}
        self.settings = load(WorkerSettings, **(quick | {"database_url": database_url} | given))
        self.database = connect(database_url, hot=True, pool=8)
        self.dialect = dialect_of(self.database)
        self.acceptor = Acceptor(
            self.database,
            lifetime=self.settings.queue_lifetime,
            grace=self.settings.grace,
        )
        self.worker_queue = self.another_worker_queue()
        self.rescuer = Rescuer(self.database, self.settings)
        if registered:
            assert self.worker

    def close(self) -> None:
        self.database.dispose()

    @cached_property
    def worker(self) -> str:
        """The id of a registered worker."""
        return self.register_worker()

    def another_worker_queue(self) -> WorkerQueue:
        """The queue as another worker process sees it."""
        return WorkerQueue(self.database, self.settings)

    def register_worker(self) -> str:
        """Register another worker; its id."""
        worker = new_id()
        self.worker_queue.register(worker, "host", 1)
        return worker

    def accept(self, *addresses: str, **more: Any) -> str:
        """Accept `new_message`; its queue id."""
        message = new_message(*addresses, **more)
        self.insert([message])
        return message.id

    def insert(self, messages: Sequence[NewMessage]) -> None:
        """Accept messages whose bodies are files."""
        with writing(self.database) as connection:
            self.acceptor.insert(connection, messages, delay_warning=self.settings.delay_warning)

    def claim(
        self,
        *ids: str,
        worker: str = "",
        capacity: Mapping[str, int] = PLENTY,
        worker_queue: WorkerQueue | None = None,
    ) -> list[Claim]:
        """Claim deliveries of these messages, or overdue ones without any; at most `capacity` of
        each route."""
        (claims,) = (worker_queue or self.worker_queue).commit(
            [ClaimRequest(worker or self.worker, list(ids) or None, capacity)]
        )
        assert isinstance(claims, list)
        return claims

    def completion(
        self, claim: Claim, outcome: Outcome, *, worker: str = "", **more: Any
    ) -> Completion:
        """The completion of a claim: one attempt with this outcome, and the state that follows."""
        attempt = Attempt(1, "qmqp.example.net:628", outcome, "its words", 90, 0.5, 0.1)
        values: dict[str, Any] = {
            "state": OUTCOME_POLICY[outcome],
            "reply": attempt.reply,
            "server": attempt.server,
            "delay": 30.0,
            "attempts": [attempt],
        }
        fence = (worker or self.worker, claim.queue_id, claim.number, claim.claim)
        return Completion(*fence, outcome=outcome, **(values | more))

    def complete(
        self,
        claim: Claim,
        outcome: Outcome,
        *,
        worker: str = "",
        worker_queue: WorkerQueue | None = None,
        **more: Any,
    ) -> CompletionResult:
        """Commit the `completion` of a claim."""
        (result,) = (worker_queue or self.worker_queue).commit(
            [self.completion(claim, outcome, worker=worker, **more)]
        )
        assert isinstance(result, CompletionResult)
        return result

    def renew(self, worker: str = "") -> bool:
        """Renew the lease of a worker; False if it has expired."""
        (renewed,) = self.worker_queue.commit([Renewal(worker or self.worker)])
        return renewed is True

    def expire_worker(self, worker: str) -> int | None:
        """Expire a worker whose lease has run out."""
        return self.rescuer.expire_worker(worker, dict(self.rescuer.expired_leases())[worker])

    def request_operation(self, queue_id: str, operation: str) -> None:
        """Request an operation on a delivery that is being sent, as an operator does."""
        self.change(
            "UPDATE deliveries SET pending_operation = :operation WHERE queue_id = @id(:id)",
            operation=operation,
            id=queue_id,
        )

    def rows(self, sql: str, **parameters: Any) -> list[dict[str, Any]]:
        """The rows of a SELECT with macros; the parameter `id` has 32 digits."""
        if "id" in parameters:
            parameters["id"] = dashed(parameters["id"])
        with reading(self.database) as connection:
            result = connection.execute(text(self.dialect(sql)), parameters)
            return [dict(row) for row in result.mappings()]

    def change(self, sql: str, **parameters: Any) -> int:
        """Run a statement with macros, whatever states it writes; the number of changed rows."""
        if "id" in parameters:
            parameters["id"] = dashed(parameters["id"])
        with writing(self.database) as connection, unguarded(connection):
            return connection.execute(text(self.dialect(sql)), parameters).rowcount

    def delivery(self, queue_id: str, number: int = 1) -> dict[str, Any]:
        """The row of a delivery, with `due_in` and `expires_in` in seconds from now."""
        sql = """SELECT d.*, -@since(d.due_at) AS due_in, -@since(d.expires_at) AS expires_in
            FROM deliveries d WHERE d.queue_id = @id(:id) AND d.number = :number"""
        (row,) = self.rows(sql, id=queue_id, number=number)
        return row

    def state(self, queue_id: str, number: int = 1) -> str:
        return str(self.delivery(queue_id, number)["state"])

    def states_of(self, ids: Iterable[str]) -> list[str]:
        """The state of the first delivery of each message."""
        return [self.state(queue_id) for queue_id in ids]

    def states(self) -> set[str]:
        """The states of all deliveries."""
        return {row["state"] for row in self.rows("SELECT DISTINCT state FROM deliveries")}

    def attempts(self, queue_id: str) -> list[tuple[str | None, str]]:
        """Server and outcome of each attempt, in order."""
        return [(server, outcome) for _, _, server, outcome in self._attempts(queue_id)]

    def numbered_attempts(self, queue_id: str) -> list[tuple[int, int, str]]:
        """Claim, index and outcome of each attempt, in order."""
        return [(claim, index, outcome) for claim, index, _, outcome in self._attempts(queue_id)]

    def _attempts(self, queue_id: str) -> list[tuple[int, int, str | None, str]]:
        sql = """SELECT claim, attempt_index, server, outcome FROM attempts
            WHERE queue_id = @id(:id) ORDER BY delivery, claim, attempt_index"""
        return [
            (row["claim"], row["attempt_index"], row["server"], row["outcome"])
            for row in self.rows(sql, id=queue_id)
        ]

    def pass_time(self, seconds: float, *, only: Sequence[str] = ()) -> None:
        """Move the times of deliveries and leases back; of these messages only, or of all."""
        chosen = "WHERE queue_id IN (SELECT queue_id FROM @rows(:ids; queue_id uuid))"
        earlier = "- CAST(:s * 1000000 AS INTEGER)"
        if self.dialect.postgresql:
            earlier = "- :s * interval '1 second'"
        statements = [
            f"""UPDATE deliveries SET due_at = due_at {earlier}, expires_at = expires_at {earlier},
                warn_at = warn_at {earlier} {chosen if only else ""}"""
        ]
        if not only:
            statements.append(f"UPDATE workers SET lease_expires_at = lease_expires_at {earlier}")
        ids = json.dumps([{"queue_id": dashed(queue_id)} for queue_id in only])
        with writing(self.database) as connection:
            for sql in statements:
                connection.execute(text(self.dialect(sql)), {"s": seconds, "ids": ids})


class EngineHarness(QueueHarness):
    """A queue with a spool, and engines of workers. The settings are so short that no test waits
    for a default."""

    def __init__(self, database_url: str, spool: Spool, directory: Path, **given: Any) -> None:
        quick: dict[str, Any] = {
            "lease": 20.0,
            "grace": 0.2,
            "retry_min": 0.05,
            "retry_max": 0.2,
            "uncertain_delay": 0.1,
            "connect_timeout": 5.0,
            "reply_timeout": 5.0,
            "drain_timeout": 5.0,
            # As many as RELAY_SERVER_CONNECTIONS: a poll that is under way has reserved all of
            # them, and a delivery that goes on to the next server must find a slot there.
            "worker_connections": 50,
            "queue_lifetime": 5 * 86400.0,
            "state_dir": directory,
            "spool_dir": spool.directory,
        }
        super().__init__(database_url, registered=False, **(quick | given))
        self.spool = spool
        self.spool.prepare(self.database, unsafe=True)

    def accept(
        self,
        *addresses: str,
        body: bytes = BODY,
        stored: bool = True,
        has_lock: bool = False,
        queue_id: str = "",
        **more: Any,
    ) -> str:
        """Accept a message with a body, by the routes of the settings; its queue id.

        `stored`: whether its body is in the spool. `has_lock`: the caller has the write lock.
        """
        queue_id, route_for = queue_id or new_id(), Routes.load(self.settings).route_for
        if stored:
            self.spool.store(queue_id, [body])
        message = new_message(
            *(f"{route_for(address)}:{address}" for address in addresses or ("b@example.org",)),
            queue_id=queue_id,
            size=len(body),
            **more,
        )
        if has_lock:
            with self.database.begin() as connection:
                self.acceptor.insert(
                    connection, [message], delay_warning=self.settings.delay_warning
                )
        else:
            self.insert([message])
        return queue_id

    def engine(self, *, servers: ServerPool | None = None) -> Engine:
        routes = Routes.load(self.settings)
        return Engine(self.settings, self.worker_queue, self.spool, routes, servers=servers)

    @contextmanager
    def working(self, **options: Any) -> Iterator[Engine]:
        """An engine with a registered worker; drained at the end."""
        engine = self.engine(**options)
        engine.start()
        try:
            assert engine.lease.registered.wait(10)
            yield engine
        finally:
            assert engine.drain(5)


@contextmanager
def opened(database_url: str, **given: Any) -> Iterator[QueueHarness]:
    """A harness that is closed at the end."""
    queue = QueueHarness(database_url, **given)
    try:
        yield queue
    finally:
        queue.close()
