"""Acceptance: the statement that makes the relay responsible for a message.

One statement inserts the messages, recipients and deliveries of a batch (on SQLite three statements
in one transaction). The bodies are synced before it begins. After its COMMIT smtpd may say 250.

What must stay true: every insert says ON CONFLICT DO NOTHING and the relay chooses every key. After
a COMMIT of unknown outcome the same batch runs again: the repeat waits for the first transaction
and then changes nothing.
"""

import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, text

from relay.db.engine import TooLate, writing_once
from relay.db.schema import LONGEST_INDEXED
from relay.db.sql import dialect_of
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
    what a DSN encloses.
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


_MESSAGE_COLUMNS = (
    "sender text, size bigint, client_address text, helo text, protocol text, auth_user text,"
    " header_message_id text, body_type text, ret text, envid text, dsn_of uuid, client_trusted boolean,"
    " dsn_content text"
)
_MESSAGE_NAMES = ", ".join(column.split()[0] for column in _MESSAGE_COLUMNS.split(","))

_INSERTS = (
    f"""INSERT INTO messages (id, received_at, {_MESSAGE_NAMES})
    SELECT id, @now, {_MESSAGE_NAMES} FROM @rows(:messages; id uuid, {_MESSAGE_COLUMNS}) WHERE true
    ON CONFLICT DO NOTHING""",
    """INSERT INTO recipients (queue_id, position, address, delivery, notify, orcpt)
    SELECT queue_id, position, address, delivery, notify, orcpt FROM @rows(:recipients; queue_id uuid, position int,
        address text, delivery int, notify text, orcpt text) WHERE true
    ON CONFLICT DO NOTHING""",
    """-- event: accepted
    INSERT INTO deliveries (queue_id, number, route, state, due_at, expires_at, warn_at)
    SELECT queue_id, number, route, 'queued', @later(:grace), @later(:lifetime), @later(warn_after)
    FROM @rows(:deliveries; queue_id uuid, number int, route text, warn_after float8) WHERE true
    ON CONFLICT DO NOTHING""",
)


class Acceptor:
    """Accepts messages; `commit` is what `group_commit.GroupCommitter` runs."""

    def __init__(
        self, engine: Engine, *, lifetime: float, grace: float, delay_warning: float | None = None
    ) -> None:
        dialect = dialect_of(engine)
        self._delay_warning = delay_warning
        self._engine, self._lifetime, self._grace = engine, lifetime, grace
        if dialect.postgresql:
            one = f"WITH m AS ({_INSERTS[0]}), r AS ({_INSERTS[1]}) {_INSERTS[2]}"
            self._statements = [text(dialect(one))]
        else:
            self._statements = [text(dialect(part)) for part in _INSERTS]

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
        parameters = self._parameters(messages)
        for statement in self._statements:
            connection.execute(statement, parameters)

    def _parameters(self, messages: Sequence[NewMessage]) -> dict[str, object]:
        rows: list[dict[str, object]] = []
        recipients: list[dict[str, object]] = []
        deliveries: list[dict[str, Any]] = []
        for message in messages:
            key = dashed(message.id)
            rows.append(_message_row(key, message))
            numbers: dict[str, int] = {}
            for position, recipient in enumerate(message.recipients, 1):
                number = numbers.setdefault(recipient.route, len(numbers) + 1)
                recipients.append({
                    "queue_id": key, "position": position, "address": recipient.address, "delivery": number,
                    "notify": recipient.notify, "orcpt": recipient.orcpt,
                })  # fmt: skip
            added = {
                number: {"queue_id": key, "number": number, "route": route}
                for route, number in numbers.items()
            }
            if self._delay_warning is not None and message.sender not in ("", "#@[]"):
                for recipient in message.recipients:
                    if recipient.notify is None or "DELAY" in recipient.notify.upper():
                        number = numbers[recipient.route]
                        added[number]["warn_after"] = self._delay_warning
            deliveries += added.values()
        return {
            "messages": json.dumps(rows), "recipients": json.dumps(recipients), "deliveries": json.dumps(deliveries),
            "grace": self._grace, "lifetime": self._lifetime,
        }  # fmt: skip


def _message_row(key: str, message: NewMessage) -> dict[str, object]:
    header_id = message.header_message_id
    return {
        "id": key, "sender": message.sender, "size": message.size, "client_address": message.client_address,
        "helo": escaped(message.helo, 255), "protocol": message.protocol, "auth_user": message.auth_user,
        "header_message_id": escaped(header_id, LONGEST_INDEXED) if header_id else None,
        "body_type": message.body_type, "ret": message.ret, "envid": message.envid,
        "dsn_of": dashed(message.dsn_of) if message.dsn_of else None,
        "client_trusted": message.client_trusted, "dsn_content": message.dsn_content,
    }  # fmt: skip
