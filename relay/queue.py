"""Looking at the queue: what operators ask of it, from the views that everybody else reads too.

How it works: a `Filter` becomes a WHERE over `mail_queue` or `mail_history`, and rows are streamed, so that a hundred
thousand of them are listed without being held. What must stay true: looking changes nothing and locks nothing; times
come out as aware datetimes on both databases; an id may be given with or without dashes, or as any unique end of it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Engine

from relay.database import Statements, reading
from relay.ids import dashed
from relay.schema import UNFINISHED

type Row = dict[str, Any]
_TIMES = ("_at", "until")


class NoSuchMessage(LookupError):
    """No message, or more than one, has an id like that."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which deliveries are meant; everything that is given must hold. `sender` and `recipient` take `*`."""

    states: tuple[str, ...] = ()
    sender: str | None = None
    recipient: str | None = None
    route: str | None = None
    server: str | None = None
    older_than: float | None = None  # seconds since it was received
    id: str | None = None  # 32 digits
    reply: str | None = None  # a part of the server's words
    header_message_id: str | None = None

    def where(self) -> tuple[str, dict[str, Any]]:
        """The condition over the columns of `mail_history`, and its parameters."""
        parts: list[str] = []
        given: dict[str, Any] = {}
        if self.states:
            given |= {f"state{n}": state for n, state in enumerate(self.states)}
            parts.append(f"state IN ({', '.join(f':state{n}' for n in range(len(self.states)))})")
        for column in ("sender", "recipient", "route", "server", "header_message_id"):
            value: str | None = getattr(self, column)
            if value is not None:
                parts.append(f"{column} LIKE :{column} ESCAPE '\\'" if "*" in value else f"{column} = :{column}")
                given[column] = _like(value) if "*" in value else value
        if self.reply is not None:
            parts.append("reason LIKE :reply ESCAPE '\\'")
            given["reply"] = _like(f"*{self.reply}*")
        if self.older_than is not None:
            parts.append("message_id < @id(:oldest)")
            given["oldest"] = _id_at(self.older_than)
        if self.id is not None:
            parts.append("message_id = @id(:id)")
            given["id"] = dashed(self.id)
        return " AND ".join(parts) or "1 = 1", given

    def shown(self) -> str:
        """The filter as an operator would type it; empty for everything."""
        fields = {f: getattr(self, f) for f in self.__dataclass_fields__}
        return " ".join(
            f"--{name.replace('_', '-')} {','.join(value) if isinstance(value, tuple) else value}"
            for name, value in fields.items()
            if value not in (None, ())
        )


def _like(pattern: str) -> str:
    return re.sub(r"([\\%_])", r"\\\1", pattern).replace("*", "%")


def _id_at(seconds_ago: float) -> str:
    """The smallest id that a message received then could have: ids begin with milliseconds."""
    stamp = int((datetime.now(UTC).timestamp() - seconds_ago) * 1000)
    return dashed(f"{max(stamp, 0):012x}" + "0" * 20)


def _plain(row: Any) -> Row:
    """A row with its times as aware datetimes and its numbers as numbers, whatever the database made of them."""
    made: Row = dict(row._mapping)
    for name, value in made.items():
        if isinstance(value, str) and name.endswith(_TIMES):
            made[name] = datetime.fromisoformat(value).replace(tzinfo=UTC)
        elif isinstance(value, datetime):
            made[name] = value.astimezone(UTC)
        elif isinstance(value, Decimal):
            made[name] = int(value)
        elif isinstance(value, UUID):
            made[name] = str(value)
    return made


class Queue:
    """The queue as an operator looks at it."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._sql = engine, Statements(engine)

    def _all(self, sql: str, **given: Any) -> list[Row]:
        with reading(self._engine) as connection:
            return [_plain(row) for row in self._sql.run(connection, sql, **given)]

    def rows(self, wanted: Filter, *, limit: int | None = None, finished: bool = False) -> Iterator[Row]:
        """Rows of `mail_queue` (or of `mail_history`), a recipient each, oldest first, streamed."""
        where, given = wanted.where()
        finished = finished or bool(set(wanted.states) - set(UNFINISHED))
        view = "mail_history" if finished else "mail_queue"
        sql = f"SELECT * FROM {view} WHERE {where} ORDER BY message_id, position"
        if limit is not None:
            sql, given = sql + " LIMIT :most", given | {"most": limit}
        with reading(self._engine) as connection:
            streaming = connection.execution_options(stream_results=True, max_row_buffer=1000)
            yield from (_plain(row) for row in self._sql.run(streaming, sql, **given))

    def resolve(self, text: str) -> str:
        """The id that is meant by all of it or any unique end of it, dashes or not; raises NoSuchMessage."""
        digits = text.replace("-", "").lower()
        if not re.fullmatch(r"[0-9a-f]{4,32}", digits):
            raise NoSuchMessage(f"{text!r} is no queue id: write its 32 hex digits, or at least the last 4")
        with reading(self._engine) as connection:
            found = self._like_id(connection, digits)
        if not found:
            raise NoSuchMessage(f"no message has an id that is or ends in {digits}")
        if len(found) > 1:
            raise NoSuchMessage(f"more than one id ends in {digits}: {', '.join(found)}")
        return found[0]

    def _like_id(self, connection: Connection, digits: str) -> list[str]:
        if len(digits) == 32:
            sql, given = "SELECT @hex(id) FROM messages WHERE id = @id(:id)", {"id": dashed(digits)}
        else:
            sql, given = (
                "SELECT @hex(id) FROM messages WHERE @hex(id) LIKE :end ORDER BY id LIMIT 5",
                {"end": f"%{digits}"},
            )
        return [row[0] for row in self._sql.run(connection, sql, **given)]

    def message(self, message_id: str) -> Row | None:
        """Everything about one message: its row with `recipients`, `deliveries` and `attempts`, oldest first."""
        key = {"id": dashed(message_id)}
        found = self._all(
            "SELECT @hex(id) AS queue_id, sender, size, @when(received_at) AS received_at, client_address, helo,"
            " protocol, auth_user, header_message_id, body_type, ret, envid, @hex(notice_of) AS notice_of"
            " FROM messages WHERE id = @id(:id)",
            **key,
        )
        if not found:
            return None
        of = "FROM {} WHERE message_id = @id(:id) ORDER BY"
        return found[0] | {
            "recipients": self._all(
                f"SELECT position, address, delivery, notify, orcpt {of.format('recipients')} position", **key
            ),
            "deliveries": self._all(
                "SELECT number, parent, route, state, @when(due_at) AS due_at, @when(expires_at) AS expires_at, claims,"
                " @hex(worker) AS worker, backoff_step, vanished, wanted, last_outcome, last_reply, last_server,"
                f" @when(finished_at) AS finished_at {of.format('deliveries')} number",
                **key,
            ),
            "attempts": self._all(
                "SELECT delivery, claim, hop, @hex(worker) AS worker, server, @when(started_at) AS started_at,"
                " @when(finished_at) AS finished_at, outcome, reply, bytes_sent"
                f" {of.format('attempts')} delivery, claim, hop",
                **key,
            ),
        }

    def summary(self) -> list[Row]:
        """Rows of `queue_summary`: counts, bytes and oldest by state and route."""
        return self._all("SELECT * FROM queue_summary ORDER BY state, route")

    def servers(self) -> list[Row]:
        """Rows of `server_health`: outcomes by server in the last hour."""
        return self._all("SELECT * FROM server_health ORDER BY server")

    def pauses(self) -> list[Row]:
        """Routes and servers that nothing is sent to for now."""
        return self._all("SELECT subject, @when(since) AS since_at, actor, reason FROM pauses ORDER BY subject")

    def workers(self) -> list[Row]:
        """Workers, the living first: id, host, pid, started_at, until, ended_at, ending, and what they are sending."""
        return self._all(
            "SELECT @hex(w.id) AS id, w.host, w.pid, @when(w.started_at) AS started_at, @when(w.until) AS until,"
            " @when(w.ended_at) AS ended_at, w.ending, (w.ended_at IS NULL AND w.until > @now) AS alive,"
            " (SELECT count(*) FROM deliveries d WHERE d.state = 'sending' AND d.worker = w.id"
            " AND d.due_at IS NOT NULL) AS sending"
            " FROM workers w ORDER BY w.ended_at IS NOT NULL, w.started_at DESC LIMIT 50"
        )
