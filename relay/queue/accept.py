"""Acceptance: the statement that makes the rows of messages.

`encode` turns a message into its rows, as JSON, once. The journal keeps these octets as the
envelope of the message, and `accept` in the SQL files reads them, so a replay needs no other code.
One statement inserts a batch and moves `segments.committed_to` over it (on SQLite four statements
in one transaction).

What must stay true: the rows of a batch and the position behind it are one COMMIT, and a batch
counts only if the position stood at its start. So a batch may run again after a COMMIT of unknown
outcome, and another process may replay the same segment: no row comes twice.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine

from relay.db.engine import is_outage, reading, writing
from relay.db.schema import LONGEST_INDEXED
from relay.db.single import SingleTransactions
from relay.db.sql import Queries
from relay.ids import dashed, lock_key
from relay.log import escaped, first_line, get_logger
from relay.queue.states import ReasonSource

log = get_logger(__name__)


class NewRecipient(NamedTuple):
    """One RCPT: the address as QMQP wants it, its DSN parameters (RFC 3461) and its route."""

    address: str
    notify: str | None = None
    orcpt: str | None = None
    route: str = "default"


class NewMessage(NamedTuple):
    """A message whose body is safe on disk. `size` is that body's, in bytes.

    `client_trusted`: whether the policy trusts the client (None: no policy). `dsn_content`:
    what a DSN encloses. `tls`: protocol and cipher of the connection. `prefix`: the fields that
    plugins have added, which stand before the body and are not part of its size. `hold_reason`: why
    it is held (None: it is not).
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
    prefix: str | None = None
    hold_reason: str | None = None


class EncodedMessage(NamedTuple):
    """A message as `accept` reads it. `position`: where its body begins in the segment of the
    batch; None if a file has it."""

    rows: bytes
    position: int | None = None


class SegmentSpan(NamedTuple):
    """The octets of a segment whose messages a transaction inserts."""

    segment: str
    start: int
    end: int


class PositionMoved(Exception):
    """The segment's position is not where this process left it: another process replays it, or the
    database crashed and lost rows that it had not synced."""


def encode(message: NewMessage, *, delay_warning: float | None = None) -> bytes:
    """The rows of a message: three lines of JSON (the message, its recipients, its deliveries).

    `delay_warning`: after so many seconds the sender is warned; None: never. A line holds the
    objects of an array without its brackets.
    """
    key, header_id = dashed(message.id), message.header_message_id
    row = {
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
    if message.prefix is not None:
        row["prefix"] = message.prefix
    held = {} if message.hold_reason is None else {"hold_reason": message.hold_reason}
    numbers: dict[str, int] = {}
    recipients = [
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
    late = _routes_to_warn_of(message) if delay_warning is not None else ()
    deliveries = [
        {"queue_id": key, "number": number, "route": route}
        | ({"warn_after": delay_warning} if route in late else {})
        | held
        for route, number in numbers.items()
    ]
    lines = (json.dumps([row])[1:-1], json.dumps(recipients)[1:-1], json.dumps(deliveries)[1:-1])
    return "\n".join(lines).encode()


class StoredEnvelope(NamedTuple):
    """What people ask about a message that has no rows yet."""

    queue_id: str
    sender: str
    size: int
    recipients: tuple[str, ...]
    deliveries: tuple[int, ...]


def decode(rows: bytes) -> StoredEnvelope:
    """The envelope of a message that is encoded."""
    (message,), recipients, deliveries = (
        json.loads(f"[{line}]") for line in rows.decode().split("\n")
    )
    return StoredEnvelope(
        message["id"].replace("-", ""),
        message["sender"],
        message["size"],
        tuple(one["address"] for one in recipients),
        tuple(one["number"] for one in deliveries),
    )


def routes_of(rows: bytes) -> tuple[str, ...]:
    """The routes of a message that is encoded."""
    deliveries = rows.rpartition(b"\n")[2]
    return tuple(one["route"] for one in json.loads(b"[%b]" % deliveries))


def held_rows(rows: bytes, reason: str) -> bytes:
    """The same rows, with deliveries that are held for a reason."""
    message, recipients, deliveries = rows.split(b"\n")
    held = [one | {"hold_reason": reason} for one in json.loads(b"[%b]" % deliveries)]
    return b"\n".join((message, recipients, json.dumps(held)[1:-1].encode()))


def _bounded(text: str) -> str:
    return escaped(text, LONGEST_INDEXED)


def _printable_fields(prefix: str) -> str:
    """Header fields in printable ASCII; they keep their lines, and have no index."""
    return "".join(c if c in "\t\n" or " " <= c <= "~" else "?" for c in prefix)


_ESCAPED = {"prefix": _printable_fields}


def _escape_rows(rows: bytes) -> bytes:
    """The same rows in printable ASCII, and short enough for every index."""
    lines = (json.loads(f"[{line}]") for line in rows.decode().split("\n"))
    escaped_lines = (
        [
            {
                key: _ESCAPED.get(key, _bounded)(value) if isinstance(value, str) else value
                for key, value in row.items()
            }
            for row in line
        ]
        for line in lines
    )
    return "\n".join(json.dumps(line)[1:-1] for line in escaped_lines).encode()


class Acceptor:
    """Inserts messages; one thread calls `commit`. The deliveries of a message expire `lifetime`
    seconds after its arrival, and any worker may claim them after `grace` seconds."""

    def __init__(self, engine: Engine, *, lifetime: float, grace: float) -> None:
        self._engine = engine
        self._queries = Queries(engine, __name__, lifetime=lifetime, grace=grace)
        self._single = SingleTransactions(engine, self._queries)

    def commit(
        self,
        messages: Sequence[EncodedMessage],
        span: SegmentSpan,
        *,
        age: float = 0.0,
        announced: str | None = None,
    ) -> None:
        """Insert messages that arrived `age` seconds ago, in one transaction.

        `announced`: the id of a message whose hint is published already. A claim for it waits until
        this transaction has ended. On PostgreSQL the next COMMIT that is synced syncs this one: a
        crash of the database may lose it, and `position` is then before the span.

        Raises the database's errors, and PositionMoved if the segment's position was neither at the
        start of the span nor behind it.
        """
        parameters = _parameters(messages, span, age=age, announced=announced)
        moved = self._single.run(("accept", parameters))
        if not moved and not self.is_committed(span):
            raise PositionMoved(f"segment {span.segment} at {span.start}")

    def insert(
        self,
        connection: Connection,
        messages: Sequence[NewMessage],
        *,
        delay_warning: float | None = None,
    ) -> None:
        """Insert messages whose bodies are files, in the caller's transaction."""
        encoded = [
            EncodedMessage(encode(message, delay_warning=delay_warning)) for message in messages
        ]
        self.insert_batch(connection, encoded)

    def commit_each(
        self, messages: Sequence[EncodedMessage], span: SegmentSpan, *, age: float = 0.0
    ) -> None:
        """As `commit`, for a batch that the database refused: one message at a time. A message that
        is refused alone gets escaped rows that are held."""
        with writing(self._engine) as connection:
            if self.insert_batch(connection, [], span):
                for message in messages:
                    self._insert_or_hold(connection, message, span.segment, age)
                return
        if not self.is_committed(span):
            raise PositionMoved(f"segment {span.segment} at {span.start}")

    def insert_held(
        self,
        connection: Connection,
        messages: Sequence[EncodedMessage],
        segment: str | None,
        *,
        age: float,
        reason: str,
    ) -> None:
        """Insert messages that are held, in the caller's transaction; their bodies stand in a
        segment, or in files. What the database refuses gets escaped rows."""
        try:
            with connection.begin_nested():
                self.insert_batch(
                    connection, messages, segment=segment, age=age, hold_reason=reason
                )
        except Exception as error:
            if is_outage(error):
                raise
            for message in messages:
                self._insert_or_hold(connection, message, segment, age, reason)

    def _insert_or_hold(
        self,
        connection: Connection,
        message: EncodedMessage,
        segment: str | None,
        age: float,
        reason: str | None = None,
    ) -> None:
        for escaped_already in (False, True):
            try:
                with connection.begin_nested():
                    self.insert_batch(
                        connection, [message], segment=segment, age=age, hold_reason=reason
                    )
                return
            except Exception as error:
                if is_outage(error) or escaped_already:
                    raise
                reason = f"refused by the database: {first_line(error)}"
                log.critical("message refused by the database", rows=message.rows, reason=reason)
                message = message._replace(rows=_escape_rows(message.rows))

    def open_segment(self, segment: str, start: int) -> None:
        """Insert the row of a segment whose messages begin at `start`, unless it is there."""
        with writing(self._engine) as connection:
            self._queries.run(connection, "open_segment", segment=dashed(segment), start=start)

    def close_segment(self, segment: str, start: int) -> None:
        """Remove the row that `open_segment` inserted, unless messages were inserted since."""
        with writing(self._engine) as connection:
            self._queries.run(connection, "close_segment", segment=dashed(segment), start=start)

    def seal_segment(self, segment: str, end: int, count: int, least: str, greatest: str) -> None:
        """Every message of the segment up to `end` has its rows, and nothing more is written to it.
        Raises PositionMoved if its position is another one, and the database's errors."""
        with writing(self._engine) as connection:
            sealed = self._queries.run(
                connection,
                "seal_segment",
                segment=dashed(segment),
                end=end,
                count=count,
                least=dashed(least) if least else None,
                greatest=dashed(greatest) if greatest else None,
            ).all()
        if not sealed and not self.position(segment)[1]:
            raise PositionMoved(f"segment {segment} at {end}")

    def sealed_segments(self) -> set[str]:
        """The segments that need no replay."""
        with reading(self._engine) as connection:
            return {*self._queries.run(connection, "sealed_segments").scalars()}

    def position(self, segment: str) -> tuple[int | None, bool]:
        """Up to where the messages of a segment have their rows (None: the segment has no row), and
        whether it is sealed."""
        with reading(self._engine) as connection:
            row = self._queries.run(
                connection, "committed_to", segment=dashed(segment)
            ).one_or_none()
        return (row.committed_to, bool(row.sealed)) if row else (None, False)

    def is_committed(self, span: SegmentSpan) -> bool:
        """Whether the messages of a span have their rows."""
        position, sealed = self.position(span.segment)
        return sealed or (position is not None and position >= span.end)

    def insert_batch(
        self,
        connection: Connection,
        messages: Sequence[EncodedMessage],
        span: SegmentSpan | None = None,
        *,
        segment: str | None = None,
        age: float = 0.0,
        hold_reason: str | None = None,
        announced: str | None = None,
    ) -> bool:
        """Insert messages in the caller's transaction, which arrived `age` seconds ago: those of a
        span of a segment, whose position must stand at the start of the span; or those of a
        `segment` (None: their bodies are files). With a `hold_reason` they are held; `announced` as
        in `commit`. Returns whether the position of the span was moved."""
        parameters = _parameters(
            messages,
            span,
            segment=segment,
            age=age,
            hold_reason=hold_reason,
            announced=announced,
        )
        return bool(self._queries.run(connection, "accept", **parameters).all())


def _routes_to_warn_of(message: NewMessage) -> set[str]:
    """The routes of recipients about whom the sender wants a delay warning (RFC 3461 4.1)."""
    if message.sender in ("", "#@[]"):
        return set()
    return {
        recipient.route
        for recipient in message.recipients
        if recipient.notify is None or "DELAY" in recipient.notify.upper()
    }


def _parameters(
    messages: Sequence[EncodedMessage],
    span: SegmentSpan | None,
    *,
    segment: str | None = None,
    age: float,
    hold_reason: str | None = None,
    announced: str | None = None,
) -> dict[str, Any]:
    """The parameters of `accept`."""
    lines = [message.rows.decode().split("\n") for message in messages]
    rows = ",".join(
        f'{{"position":{"null" if message.position is None else message.position},{line[0][1:]}'
        for message, line in zip(messages, lines, strict=True)
    )
    at = span.segment if span else segment
    return {
        "messages": f"[{rows}]",
        "recipients": f"[{','.join(line[1] for line in lines if line[1])}]",
        "deliveries": f"[{','.join(line[2] for line in lines if line[2])}]",
        "segment": dashed(at) if at else None,
        "start": span.start if span else None,
        "end": span.end if span else None,
        "age": age,
        "hold_reason": hold_reason,
        "announced": lock_key(announced) if announced else None,
        "hold_source": ReasonSource.RELAY,
    }
