"""Looking at the queue: what operators ask of it, from the views that everybody else reads too.

How it works: a `Filter` becomes a WHERE over `mail_queue` or `mail_history`, and rows are streamed, so that a hundred
thousand of them are listed without being held. What must stay true: looking changes nothing and locks nothing; times
come out as aware datetimes on both databases; an id may be given with or without dashes, or as any unique end of it.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, CursorResult, Engine

from relay.database import Statements, reading
from relay.ids import dashed
from relay.schema import UNFINISHED, VIEWS

type Row = dict[str, Any]
_TIMES = ("_at", "until")
_IDS = ("message_id", "worker")
AGES = {"under_5m": 300.0, "under_20m": 1200.0, "under_1h": 3600.0, "under_4h": 14400.0, "under_1d": 86400.0}
# What stands behind the last @: one expression that both databases understand.
DOMAIN = "lower(substr(recipient, length(rtrim(recipient, replace(recipient, '@', ''))) + 1))"


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
                parts.append(f"{column} @like :{column} ESCAPE '\\'" if "*" in value else f"{column} = :{column}")
                given[column] = _like(value) if "*" in value else value
        if self.reply is not None:
            parts.append("reason @like :reply ESCAPE '\\'")
            given["reply"] = _like(f"*{self.reply}*")
        if self.older_than is not None:
            parts.append("message_id < @id(:oldest)")
            given["oldest"] = _id_at(self.older_than)
        if self.id is not None:
            parts.append("message_id = @id(:id)")
            given["id"] = dashed(self.id)
        return " AND ".join(parts) or "1 = 1", given

    def selective(self) -> bool:
        """Whether an index finds the few rows that are meant."""
        exact = [value for value in (self.sender, self.recipient) if value is not None and "*" not in value]
        return bool(exact or self.id or self.header_message_id)

    def shown(self) -> str:
        """The filter as an operator would type it; empty for everything."""
        words = [f"--state {state}" for state in self.states]
        for name in (field for field in self.__dataclass_fields__ if field != "states"):
            value = getattr(self, name)
            if value is not None:
                option = name.removeprefix("header_").replace("_", "-")
                words.append(f"--{option} {shlex.quote(f'{value:g}s' if name == 'older_than' else value)}")
        return " ".join(words)


def bracketed(message_id: str) -> str:
    """A Message-ID as headers spell it, whether or not it was given with its <>; `*` stands for them too."""
    head = "" if message_id.startswith(("<", "*")) else "<"
    return head + message_id + ("" if message_id.endswith((">", "*")) else ">")


def _like(pattern: str) -> str:
    return re.sub(r"([\\%_])", r"\\\1", pattern).replace("*", "%")


def _id_at(seconds_ago: float) -> str:
    """The smallest id that a message received then could have: ids begin with milliseconds."""
    stamp = int((datetime.now(UTC).timestamp() - seconds_ago) * 1000)
    return dashed(f"{max(stamp, 0):012x}" + "0" * 20)


def _plain(found: CursorResult[Any]) -> Iterator[Row]:
    """Rows with their times as aware datetimes and their ids as text, whatever the database made of them."""
    names = tuple(found.keys())
    times = [name for name in names if name.endswith(_TIMES)]
    ids = [name for name in names if name in _IDS]
    for values in found:
        row = dict(zip(names, values, strict=True))
        for name in times:
            if (value := row[name]) is not None:
                when = datetime.fromisoformat(value) if type(value) is str else value.astimezone(UTC)
                row[name] = when.replace(tzinfo=UTC)
        for name in ids:
            if type(row[name]) is UUID:
                row[name] = str(row[name])
        yield row


class Queue:
    """The queue as an operator looks at it."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._sql = engine, Statements(engine)

    def _all(self, sql: str, **given: Any) -> list[Row]:
        with reading(self._engine) as connection:
            rows = list(_plain(self._sql.run(connection, sql, **given)))
        for row in rows:  # PostgreSQL's sum of integers
            row |= {name: int(value) for name, value in row.items() if type(value) is Decimal}
        return rows

    def rows(
        self, wanted: Filter, *, limit: int | None = None, finished: bool = False, newest: bool = False,
        after: tuple[str, int] | None = None,
    ) -> Iterator[Row]:  # fmt: skip
        """Rows of `mail_queue` (or of `mail_history`), a recipient each, oldest first or `newest`, streamed.

        `after`: go on behind the row with this queue id and position.
        """
        where, given = wanted.where()
        finished = finished or bool(set(wanted.states) - set(UNFINISHED))
        view = "mail_history" if finished else "mail_queue"
        behind, order = ("<", "DESC") if newest else (">", "ASC")
        if after is not None:
            where += (
                f" AND message_id {behind}= @id(:after) AND (message_id, position) {behind} (@id(:after), :position)"
            )
            given |= {"after": dashed(after[0]), "position": after[1]}
        if limit is not None and self._in_order(wanted):
            view = f"({VIEWS[view].replace('JOIN', 'CROSS JOIN')})"
        sql = f"SELECT * FROM {view} WHERE {where} ORDER BY message_id {order}, position {order}"
        if limit is not None:
            sql, given = sql + " LIMIT :most", given | {"most": limit}
        return self.select(sql, given)

    def _in_order(self, wanted: Filter) -> bool:
        """Whether to tell SQLite to go through all messages in order until enough are found.

        Left alone it finds all that match, joins and sorts them, which is better only where those are few.
        """
        if self._sql.postgresql or wanted.selective():
            return False
        where, given = Filter(states=wanted.states).where()
        many = f"SELECT count(*) AS n FROM (SELECT 1 FROM deliveries WHERE {where} LIMIT 1000)"
        return bool(self._all(many, **given)[0]["n"] == 1000)

    def select(self, sql: str, given: dict[str, Any]) -> Iterator[Row]:
        """Rows of a query with our macros, streamed."""
        with reading(self._engine) as connection:
            streaming = connection.execution_options(stream_results=True, max_row_buffer=1000)
            with self._sql.run(streaming, sql, **given) as found:
                yield from _plain(found)

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

    def rates(self) -> list[Row]:
        """Tries of the last hour by outcome: how many, how many of them in the last minute, bytes, mean seconds."""
        return self._all(
            """SELECT outcome, count(*) AS last_hour, sum(CASE WHEN finished_at > @ago(60) THEN 1 ELSE 0 END) AS
                last_minute, sum(bytes_sent) AS bytes_sent, CAST(avg(@micros(finished_at) - @micros(started_at)) AS
                float8) / 1e6 AS seconds
            FROM attempts WHERE finished_at > @ago(3600) AND hop > 0 GROUP BY outcome ORDER BY outcome"""
        )

    def slowest(self, most: int = 5) -> list[Row]:
        """The tries of the last hour that took longest."""
        return self._all(
            """SELECT @hex(message_id) AS queue_id, server, outcome, bytes_sent, reply,
                (@micros(finished_at) - @micros(started_at)) / CAST(1e6 AS float8) AS seconds
            FROM attempts WHERE finished_at > @ago(3600) AND hop > 0 ORDER BY seconds DESC LIMIT :most""",
            most=most,
        )

    def ages(self, most: int = 20) -> list[Row]:
        """How long unfinished mail has waited, by the recipients' domain, the longest queues first.

        A row has `domain`, `waiting`, and how many of those are younger than each of AGES and than all of them:
        `under_5m` ... `older`; the name of a column is its upper end.
        """
        ids = [_id_at(seconds) for seconds in AGES.values()]
        bounds = {f"bound{n}": bound for n, bound in enumerate(ids)}
        columns, above = list[str](), "1 = 1"
        for n, name in enumerate(AGES):
            columns.append(f"sum(CASE WHEN {above} AND message_id >= @id(:bound{n}) THEN 1 ELSE 0 END) AS {name}")
            above = f"message_id < @id(:bound{n})"
        columns.append(f"sum(CASE WHEN {above} THEN 1 ELSE 0 END) AS older")
        return self._all(
            f"""SELECT {DOMAIN} AS domain, count(*) AS waiting, {", ".join(columns)}
            FROM mail_queue GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT :most""",
            most=most, **bounds,
        )  # fmt: skip

    def history(self, seconds: int, step: int) -> tuple[int, list[Row]]:
        """Tries by outcome in steps of so many seconds: (the number of the step now, rows).

        A row has `step` (counted since 1970), `outcome`, `tries`, and `seconds`, their mean length.
        """
        rows = self._all(
            """SELECT @micros(finished_at) / CAST(:step AS bigint) AS step, outcome, count(*) AS tries,
                CAST(avg(@micros(finished_at) - @micros(started_at)) AS float8) / 1e6 AS seconds
            FROM attempts WHERE finished_at > @ago(:seconds) AND hop > 0 GROUP BY 1, 2 ORDER BY 1, 2""",
            step=step * 1_000_000, seconds=seconds,
        )  # fmt: skip
        (now,) = self._all("SELECT @micros(@now) / CAST(:step AS bigint) AS step", step=step * 1_000_000)
        return int(now["step"]), rows

    def notices(self, message_id: str) -> list[Row]:
        """Notices about a message: `queue_id` and `received_at`. Found by their recipient, which has an index."""
        return self._all(
            """SELECT DISTINCT @hex(n.id) AS queue_id, @when(n.received_at) AS received_at
            FROM messages m JOIN recipients r ON r.address = m.sender JOIN messages n ON n.id = r.message_id
            WHERE m.id = @id(:id) AND n.notice_of = m.id ORDER BY 1""",
            id=dashed(message_id),
        )

    def spool_id(self) -> str | None:
        """The identity of the spool that this database knows; None before smtpd or a worker has run."""
        found = self._all("SELECT @hex(id) AS id FROM spool")
        return str(found[0]["id"]) if found else None

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
