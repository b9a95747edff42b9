"""The queue without its processes: what smtpd, workers, sweepers and operators do to the database,
called by hand.

Time does not pass here by waiting: `Office.pass_time` moves every time that the database holds
back.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from relay.settings import WorkerSettings, load
from tests.dialect import dialect_of
from tests.state_guard import unguarded

OUTCOME_POLICY = {
    Outcome.DELIVERED: State.DELIVERED, Outcome.DEFERRED: State.DEFERRED, Outcome.REJECTED: State.BOUNCED,
    Outcome.UNREACHABLE: State.DEFERRED, Outcome.INTERRUPTED: State.DEFERRED, Outcome.UNCERTAIN: State.DEFERRED,
    Outcome.MALFORMED: State.DEFERRED, Outcome.UNSENDABLE: State.HELD,
}  # fmt: skip
PLENTY = {"default": 1000}


def new_message(
    *addresses: str, queue_id: str | None = None, sender: str = "a@example.com", **more: Any
) -> NewMessage:
    """A message to `b@example.org`, or to these addresses; `route:address` says which way."""
    ways = [address.rpartition(":") for address in addresses or ("b@example.org",)]
    recipients = [NewRecipient(address, route=route or "default") for route, _, address in ways]
    given = {
        "client_address": "192.0.2.1",
        "helo": "client.example.com",
        "protocol": "ESMTP",
    } | more
    return NewMessage(queue_id or new_id(), sender, 100, recipients, **given)


class QueueHarness:
    """One database, and everybody who works on it."""

    def __init__(self, database_url: str, **given: Any) -> None:
        quick: dict[str, Any] = {
            "grace": 5.0,
            "lease": 60.0,
            "queue_lifetime": 1000.0,
            "uncertain_delay": 15.0,
        }
        self.settings = load(WorkerSettings, **(quick | given))
        self.engine = connect(database_url, hot=True, pool=8)
        self.dialect = dialect_of(self.engine)
        self.acceptor = Acceptor(
            self.engine,
            lifetime=self.settings.queue_lifetime,
            grace=self.settings.grace,
            delay_warning=self.settings.delay_warning,
        )
        self.worker_queue = self.another_worker_queue()
        self.rescuer = Rescuer(self.engine, self.settings)
        self.worker = self.register_worker()

    def another_worker_queue(self) -> WorkerQueue:
        """The ledger of another process."""
        return WorkerQueue(self.engine, self.settings)

    def register_worker(self) -> str:
        """Another worker."""
        worker = new_id()
        self.worker_queue.register(worker, "host", 1)
        return worker

    def accept(self, *addresses: str, **more: Any) -> str:
        message = new_message(*addresses, **more)
        self.acceptor.commit([message])
        return message.id

    def claim(
        self,
        *ids: str,
        worker: str = "",
        room: Mapping[str, int] = PLENTY,
        worker_queue: WorkerQueue | None = None,
    ) -> list[Claim]:
        """Claim deliveries of these messages, or without any what is overdue."""
        (claims,) = (worker_queue or self.worker_queue).commit(
            [ClaimRequest(worker or self.worker, list(ids) or None, room)]
        )
        assert isinstance(claims, list)
        return claims

    def note(self, claim: Claim, outcome: Outcome, *, worker: str = "", **more: Any) -> Completion:
        """What a worker says became of a claim: one try, and the state that follows."""
        tried = Attempt(1, "qmqp.example.net:628", outcome, "its words", 90, 0.5, 0.1)
        given: dict[str, Any] = {
            "state": OUTCOME_POLICY[outcome], "reply": "its words", "server": tried.server, "delay": 30.0,
            "tries": [tried],
        }  # fmt: skip
        who = (worker or self.worker, claim.queue_id, claim.number, claim.claim)
        return Completion(*who, outcome=outcome, **(given | more))

    def record(
        self,
        claim: Claim,
        outcome: Outcome,
        *,
        worker: str = "",
        worker_queue: WorkerQueue | None = None,
        **more: Any,
    ) -> CompletionResult:
        (recorded,) = (worker_queue or self.worker_queue).commit(
            [self.note(claim, outcome, worker=worker, **more)]
        )
        assert isinstance(recorded, CompletionResult)
        return recorded

    def renew(self, worker: str = "") -> bool:
        (renewed,) = self.worker_queue.commit([Renewal(worker or self.worker)])
        return renewed is True

    def expire_worker(self, worker: str) -> int | None:
        """Declare a worker dead whose lease has run out."""
        return self.rescuer.expire_worker(worker, dict(self.rescuer.expired_leases())[worker])

    def rows(self, sql: str, **given: Any) -> list[Mapping[str, Any]]:
        """What a SELECT with macros finds; `id` is given as 32 digits."""
        if "id" in given:
            given["id"] = dashed(given["id"])
        with reading(self.engine) as connection:
            return [
                dict(row._mapping) for row in connection.execute(text(self.dialect(sql)), given)
            ]

    def change(self, sql: str, **given: Any) -> int:
        """Run what an operator or a fault would do; how many rows that changed."""
        if "id" in given:
            given["id"] = dashed(given["id"])
        with writing(self.engine) as connection, unguarded(connection):
            return connection.execute(text(self.dialect(sql)), given).rowcount

    def ask(self, queue_id: str, verb: str) -> None:
        """What an operator's verb does to a delivery that is being sent."""
        self.change(
            "UPDATE deliveries SET pending_operation = :verb WHERE queue_id = @id(:id)",
            verb=verb,
            id=queue_id,
        )

    def delivery(self, queue_id: str, number: int = 1) -> Mapping[str, Any]:
        """A delivery's row, with `due_in` and `expires_in` in seconds from now."""
        sql = """SELECT d.*, -@since(d.due_at) AS due_in, -@since(d.expires_at) AS expires_in FROM deliveries d
            WHERE d.queue_id = @id(:id) AND d.number = :number"""
        (row,) = self.rows(sql, id=queue_id, number=number)
        return row

    def state(self, queue_id: str, number: int = 1) -> str:
        return str(self.delivery(queue_id, number)["state"])

    def states(self, ids: Iterable[str]) -> list[str]:
        return [self.state(queue_id) for queue_id in ids]

    def attempts(self, queue_id: str) -> list[tuple[int, int, str]]:
        """Claim, hop and outcome of each try, in order."""
        sql = "SELECT claim, attempt_index, outcome FROM attempts WHERE queue_id = @id(:id) ORDER BY delivery, claim, attempt_index"
        return [
            (row["claim"], row["attempt_index"], row["outcome"])
            for row in self.rows(sql, id=queue_id)
        ]

    def pass_time(self, seconds: float, *, only: Sequence[str] = ()) -> None:
        """Move what the database knows of time back by so much; of these messages alone, or of
        everything."""
        these = (
            "WHERE queue_id IN (SELECT queue_id FROM @rows(:ids; queue_id uuid))" if only else ""
        )
        ids = json.dumps([{"queue_id": dashed(i)} for i in only])
        ago = (
            "- :s * interval '1 second'"
            if self.dialect.postgresql
            else "- CAST(:s * 1000000 AS INTEGER)"
        )
        with writing(self.engine) as connection:
            sql = f"""UPDATE deliveries SET due_at = due_at {ago}, expires_at = expires_at {ago},
                warn_at = warn_at {ago} {these}"""
            connection.execute(text(self.dialect(sql)), {"s": seconds, "ids": ids})
            if not only:
                connection.execute(
                    text(f"UPDATE workers SET lease_expires_at = lease_expires_at {ago}"),
                    {"s": seconds},
                )


@contextmanager
def opened(database_url: str, **given: Any) -> Iterator[QueueHarness]:
    """A harness that is closed at the end."""
    queue = QueueHarness(database_url, **given)
    try:
        yield queue
    finally:
        queue.engine.dispose()
