"""Acceptance: the statement that makes the relay responsible for a message.

One statement (`accept` in the SQL files) inserts the messages, recipients and deliveries of a
batch. On SQLite it is three statements in one transaction. The bodies are synced before it begins.
After its COMMIT smtpd may say 250.

What must stay true: every insert says ON CONFLICT DO NOTHING and the relay chooses every key. After
a COMMIT of unknown outcome the same batch runs again: the repeat waits for the first transaction
and then changes nothing.
"""

import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine

from relay.db.engine import TooLate, writing_once
from relay.db.schema import LONGEST_INDEXED
from relay.db.sql import Queries
from relay.ids import dashed
from relay.log import escaped


class NewRecipient(NamedTuple):
    """One RCPT: the address as QMQP wants it, its DSN parameters (RFC 3461) and its route."""

    address: str
    notify: str | None = None
    orcpt: str | None = None
    route: str = "default"


class NewMessage(NamedTuple):
    """A message whose body is safe on disk. `size` is that body's, in bytes.

    `client_trusted`: whether the policy trusts the client (None: no policy). `dsn_content`:
    what a DSN encloses. `tls`: protocol and cipher of the connection.
    """

    id: str
    sender: str
    size: int
    recipients: list[NewRecipient]
    client_address: str
    helo: str
    protocol: str
    auth_user: str | None = None
    header_message_id: str | None = None
    body_type: str | None = None
    ret: str | None = None
    envid: str | None = None
    dsn_of: str | None = None
    client_trusted: bool | None = None
    dsn_content: str | None = None
    tls: str | None = None


class Acceptor:
    """Accepts messages; a `group_commit.GroupCommitter` runs `commit`. `delay_warning`: after
    so many seconds the sender is warned; None: never."""

    def __init__(
        self, engine: Engine, *, lifetime: float, grace: float, delay_warning: float | None = None
    ) -> None:
        self._engine = engine
        self._delay_warning = delay_warning
        self._queries = Queries(engine, __name__, lifetime=lifetime, grace=grace)

    def commit(self, messages: Sequence[NewMessage], begin_by: float = float("inf")) -> list[None]:
        """Insert a batch of messages in one transaction; raises the database's errors.

        Raises TooLate if a connection and the turn to write come only after `begin_by`
        (monotonic).
        """
        with writing_once(self._engine) as connection:
            if time.monotonic() > begin_by:
                raise TooLate("no connection or no turn to write in time")
            self.insert(connection, messages)
        return [None] * len(messages)

    def insert(self, connection: Connection, messages: Sequence[NewMessage]) -> None:
        """Insert messages in the caller's transaction."""
        rows: list[dict[str, object]] = []
        recipients: list[dict[str, object]] = []
        deliveries: list[dict[str, object]] = []
        for message in messages:
            key, header_id = dashed(message.id), message.header_message_id
            rows.append(
                {
                    "id": key,
                    "sender": message.sender,
                    "size": message.size,
                    "client_address": message.client_address,
                    "helo": escaped(message.helo, 255),
                    "protocol": message.protocol,
                    "auth_user": message.auth_user,
                    "header_message_id": escaped(header_id, LONGEST_INDEXED) if header_id else None,
                    "body_type": message.body_type,
                    "ret": message.ret,
                    "envid": message.envid,
                    "dsn_of": dashed(message.dsn_of) if message.dsn_of else None,
                    "client_trusted": message.client_trusted,
                    "dsn_content": message.dsn_content,
                    "tls": message.tls,
                }
            )
            numbers: dict[str, int] = {}
            recipients += [
                {
                    "queue_id": key,
                    "position": position,
                    "address": recipient.address,
                    "delivery": numbers.setdefault(recipient.route, len(numbers) + 1),
                    "notify": recipient.notify,
                    "orcpt": recipient.orcpt,
                }
                for position, recipient in enumerate(message.recipients, 1)
            ]
            late = _routes_to_warn_of(message) if self._delay_warning is not None else ()
            for route, number in numbers.items():
                delivery: dict[str, Any] = {"queue_id": key, "number": number, "route": route}
                if route in late:
                    delivery["warn_after"] = self._delay_warning
                deliveries.append(delivery)
        self._queries.run(
            connection,
            "accept",
            messages=json.dumps(rows),
            recipients=json.dumps(recipients),
            deliveries=json.dumps(deliveries),
        )


def _routes_to_warn_of(message: NewMessage) -> set[str]:
    """The routes of recipients about whom the sender wants a delay warning (RFC 3461 4.1)."""
    if message.sender in ("", "#@[]"):
        return set()
    return {
        recipient.route
        for recipient in message.recipients
        if recipient.notify is None or "DELAY" in recipient.notify.upper()
    }
