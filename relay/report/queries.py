"""Reads the queue for operators, from the same views that they can read.

The statements are in `queries.<database>.sql`. The listing alone is made here, because its `Filter`
is known only when a command runs. Its rows are streamed, so that a list of a hundred thousand rows
is never held in memory.

What must stay true: reading changes nothing and locks nothing; times are aware datetimes on both
databases; an id may be given with or without dashes, or as its last digits if they are unique.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import batched, chain
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import CursorResult, Engine, text

from relay.db.engine import reading
from relay.db.sql import Queries
from relay.ids import dashed
from relay.queue.states import UNFINISHED, State
from relay.report.filters import SPELLINGS, Filter, spelled
from relay.report.masking import masked
from relay.report.rows import Row, SegmentPosition

if TYPE_CHECKING:
    # A list needs none of them, and to make the classes takes a while.
    from relay.report.records import DsnRow, MessageRow, PauseRow, WorkerRow

_FEW = 1000  # rows that are sorted, or held in memory, at once
LIST_TIMEOUT = 3600  # seconds for the reader of a list, so that no snapshot stays open for good
ENDED_WORKERS = 50  # workers that have ended and are still listed
SCAN_LIMIT = 100_000  # messages that a page scans where no index finds the rows
# What a list can be counted by, and the column of `mail_history` (v), or of `route_servers` (s).
COUNT_KEYS = {
    "reason": "v.reason",
    "sender": "v.sender",
    "domain": "v.domain",
    "server": "coalesce(s.server, v.server)",
    "route": "v.route",
    "client": "v.client_address",
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_ID, _LAST_ID = "0" * 32, "f" * 32


class NoSuchMessage(LookupError):
    """No message, or more than one, has an id like that."""


def as_rows(result: CursorResult[Any]) -> Iterator[dict[str, Any]]:
    """Rows of either database with times (`..._at`) as aware datetimes and ids as text."""
    names = tuple(result.keys())
    times = [name for name in names if name.endswith("_at")]
    ids = [name for name in names if name in ("queue_uuid", "worker")]
    for values in chain.from_iterable(result.partitions(1000)):
        row = dict(zip(names, values, strict=True))
        for name in times:
            if row[name] is not None:
                row[name] = _moment(row[name])
        for name in ids:
            if type(row[name]) is UUID:
                row[name] = str(row[name])
        yield row


def _moment(value: datetime | str | int) -> datetime:
    """A time as PostgreSQL, a view of SQLite or a table of SQLite has it."""
    if isinstance(value, int):
        return _EPOCH + timedelta(microseconds=value)
    if isinstance(value, str):
        return datetime.fromisoformat(value)
    return value.astimezone(UTC)


class Reader:
    """Reads by the statements of the module in which its subclass is. Those that need no Python,
    such as `servers`, are only read by their name."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._queries = Queries(engine, type(self).__module__)

    def read(self, name: str, **parameters: Any) -> list[Row]:
        """All rows of a named statement."""
        with reading(self.engine) as connection:
            return list(as_rows(self._queries.run(connection, name, **parameters)))


class QueueReader(Reader):
    """Reads the queue for operators."""

    def rows(
        self,
        filter_: Filter,
        *,
        limit: int | None = None,
        finished: bool = False,
        newest: bool = False,
        after: tuple[str, int] | None = None,
        down_to: str | None = None,
        columns: str = "*",
    ) -> Iterator[Row]:
        """Rows of `mail_queue` (or of `mail_history`), one for each recipient, oldest first or
        `newest`; many are streamed.

        `after`: start after the row with this queue id and position. `down_to`: skip messages that
        are older than this id. `columns`: read these alone.
        """
        sql, parameters = self.listing(
            columns, filter_, limit, finished, newest=newest, after=after, down_to=down_to
        )
        if limit is None or limit > _FEW or down_to is not None:
            yield from self.select(sql, parameters)
            return
        # PostgreSQL plans a cursor as if a tenth of its rows were filter_. Where few rows match, it
        # would scan all messages.
        with reading(self.engine) as connection:
            rows = list(as_rows(connection.execute(text(sql), parameters)))
        yield from rows

    def listing(
        self,
        columns: str,
        filter_: Filter,
        limit: int | None,
        finished: bool,
        *,
        newest: bool = False,
        after: tuple[str, int] | None = None,
        down_to: str | None = None,
    ) -> tuple[str, dict[str, Any]]:
        """The statement that reads these columns as `rows` does, and its parameters."""
        view, where, parameters = self._selected(
            filter_, finished, newest=newest, after=after, down_to=down_to
        )
        order = "DESC" if newest else "ASC"
        sql = f"SELECT {columns} FROM {view} WHERE {where}"
        sql += f" ORDER BY queue_uuid {order}, position {order}"
        if limit is None:
            return sql, parameters
        return f"{sql} LIMIT :most", parameters | {"most": limit}

    def _selected(
        self,
        filter_: Filter,
        finished: bool,
        *,
        newest: bool = False,
        after: tuple[str, int] | None = None,
        down_to: str | None = None,
    ) -> tuple[str, str, dict[str, Any]]:
        """The view, as the database reads it best, the condition, and its parameters."""
        database = self.engine.dialect.name
        where, parameters = filter_.where(database)
        view = "mail_history" if finished or filter_.is_history() else "mail_queue"
        behind = "<" if newest else ">"
        if after is not None:
            # The first condition is for the index.
            where += f" AND queue_uuid {behind}= :after"
            where += f" AND (queue_uuid, position) {behind} (:after, :position)"
            parameters |= {"after": dashed(after[0]), "position": after[1]}
        if down_to is not None:
            where += " AND queue_uuid >= :down_to"
            parameters["down_to"] = dashed(down_to)
        if database == "postgresql" and after is not None:
            # PostgreSQL starts there only in the tables that the condition names.
            inner = self._definition(view)
            more = "AND" if "WHERE" in inner else "WHERE"
            view = f"({inner} {more} r.queue_id {behind}= :after AND m.id {behind}= :after) AS v"
        elif database == "sqlite" and not self.few(filter_):
            view = f"({_in_order(self._definition(view), filter_)})"
        return view, where, parameters

    def counted_by(self, key: str, filter_: Filter, *, finished: bool = False) -> list[Row]:
        """How many deliveries and recipients have each value of a key of COUNT_KEYS, most first.

        A row has the key's name, `deliveries`, `recipients` and `oldest_at`. Unfinished mail counts
        under each server of its route, finished mail under its last one. Reasons are masked, but
        not those of pauses, which name an operator.
        """
        view, where, parameters = self._selected(filter_, finished)
        column, source = COUNT_KEYS[key], f"(SELECT * FROM {view} AS v WHERE {where}) AS v"
        if key == "server":
            source += " LEFT JOIN route_servers s ON s.route = v.route AND v.finished_at IS NULL"
        sql = f"""SELECT {column} AS counted, v.paused_at IS NOT NULL AS paused,
                count(*) AS recipients,
                count(DISTINCT CAST(v.queue_uuid AS text) || '.' || v.delivery) AS deliveries,
                min(v.received_at) AS oldest_at
            FROM {source} GROUP BY 1, 2"""
        groups: dict[str, dict[str, Any]] = {}
        for row in self.select(sql, parameters):
            value = str(row["counted"] or "")
            value = masked(value) if key == "reason" and not row["paused"] else value
            group = groups.setdefault(
                value, {key: value, "deliveries": 0, "recipients": 0, "oldest_at": row["oldest_at"]}
            )
            group["deliveries"] += row["deliveries"]
            group["recipients"] += row["recipients"]
            group["oldest_at"] = min(group["oldest_at"], row["oldest_at"])
        return sorted(groups.values(), key=lambda row: (-row["deliveries"], row[key]))

    def totals(
        self, filter_: Filter, *, finished: bool = False, down_to: str | None = None, most: int
    ) -> list[Row]:
        """How many deliveries and recipients match, by state: of the newest recipients, `most` of
        them. `down_to`: skip messages that are older than this id."""
        listed, parameters = self.listing(
            "state, queue_uuid, delivery", filter_, most, finished, newest=True, down_to=down_to
        )
        sql = f"""SELECT state, count(*) AS recipients,
                count(DISTINCT CAST(queue_uuid AS text) || '.' || delivery) AS deliveries
            FROM ({listed}) AS l GROUP BY state ORDER BY state"""
        return list(self.select(sql, parameters))

    def columns(self) -> tuple[str, ...]:
        """The names of the columns of `mail_queue` and `mail_history`."""
        with reading(self.engine) as connection:
            return tuple(self._queries.run(connection, "listed_columns").keys())

    def _definition(self, view: str) -> str:
        with reading(self.engine) as connection:
            return str(self._queries.run(connection, "view_definition", view=view).scalar())

    def lines(
        self,
        filter_: Filter,
        *,
        limit: int | None = None,
        finished: bool = False,
        newest: bool = False,
        objects: bool = False,
        columns: Sequence[str] = (),
    ) -> Iterator[Sequence[str]]:
        """The same rows as lines in batches: the names of the columns, then values, between tabs.

        `objects`: each line is a JSON object, without a line of names. `columns`: these alone. The
        database makes the lines: in Python each column costs more than finding the row.
        """
        names = columns or self.columns()
        database = self.engine.dialect.name
        time = SPELLINGS[database].time
        values = [time.format(name) if name.endswith("_at") else name for name in names]
        named = list(zip(names, values, strict=True))
        if not objects:
            yield ["\t".join(names)]
            line = f"format('{'\t'.join(['%s'] * len(values))}', {', '.join(values)})"
        elif database == "postgresql":  # json_build_object takes 1.5 times as long
            row = ", ".join(f"{value} AS {name}" for name, value in named)
            line = f"CAST((SELECT row_to_json(o) FROM (SELECT {row}) AS o) AS text)"
        else:
            line = f"json_object({', '.join(f"'{name}', {value}" for name, value in named)})"
        sql, parameters = self.listing(line, filter_, limit, finished, newest=newest)
        if database == "postgresql":
            yield from batched(self._copied(sql, parameters), 1000)
        else:
            with self._streamed(sql, parameters) as result:
                yield from result.scalars().partitions(1000)

    def _copied(self, sql: str, parameters: dict[str, Any]) -> Iterator[str]:
        """The only column of a query, streamed by COPY: the server goes on while we work, where a
        cursor waits for each batch to be asked for."""
        with reading(self.engine) as connection:
            # COPY is one statement, so the limit for statements would end it.
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{LIST_TIMEOUT}s'")
            query = f"COPY ({text(sql).compile(dialect=connection.dialect)}) TO STDOUT"
            cursor: Any = connection.connection.cursor()
            # psycopg reads %% as % only when it gets parameters.
            with cursor, cursor.copy(query, parameters or {"unused": None}) as copy:
                for (value,) in copy.rows():
                    yield value

    def few(self, filter_: Filter) -> bool:
        """Whether an index finds the rows, and they are few."""
        if filter_.id is not None or "*" not in (filter_.header_message_id or "*"):
            return True
        return any(
            address is not None and "*" not in address and self._count(name, address) < _FEW
            for name, address in (
                ("count_from_sender", filter_.sender),
                ("count_to_recipient", filter_.recipient),
            )
        )

    def _count(self, name: str, address: str) -> int:
        whole, least, beyond = spelled(address)
        rows = self.read(name, address=whole, address_from=least, address_to=beyond, most=_FEW)
        return int(rows[0]["count"])

    def horizon(self, filter_: Filter, after: tuple[str, int] | None = None) -> str | None:
        """The queue id down to which to scan SCAN_LIMIT messages; None where an index finds what
        is meant."""
        if self.few(filter_) or (filter_.states and set(filter_.states) <= set(UNFINISHED)):
            return None
        newest = dashed(after[0] if after else _LAST_ID)
        rows = self.read("message_below", after=newest, skip=SCAN_LIMIT)
        return str(rows[0]["id"]) if rows else None

    def select(self, sql: str, parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Rows of a query, streamed."""
        with self._streamed(sql, parameters) as result:
            yield from as_rows(result)

    @contextmanager
    def _streamed(self, sql: str, parameters: dict[str, Any]) -> Iterator[CursorResult[Any]]:
        with reading(self.engine) as connection:
            streaming = connection.execution_options(stream_results=True, max_row_buffer=1000)
            with streaming.execute(text(sql), parameters) as result:
                yield result

    def resolve(self, end: str) -> str:
        """The queue id that is or ends in this text, with or without dashes; raises
        NoSuchMessage."""
        digits = end.replace("-", "").lower()
        if not re.fullmatch(r"[0-9a-f]{4,32}", digits):
            raise NoSuchMessage(
                f"{end!r} is not a queue id: write its 32 hex digits, or at least the last 4"
            )
        bounds = (digits, digits) if len(digits) == 32 else (_FIRST_ID, _LAST_ID)
        least, greatest = map(dashed, bounds)
        rows = self.read("queue_ids", digits=digits, least=least, greatest=greatest)
        ids = [str(row["id"]) for row in rows]
        if not ids:
            raise NoSuchMessage(f"no message has an id that is or ends in {digits}")
        if len(ids) > 1:
            raise NoSuchMessage(f"more than one id ends in {digits}: {', '.join(ids)}")
        return ids[0]

    def message(self, queue_id: str) -> "MessageRow":
        """One message with its recipients, deliveries and attempts; raises NoSuchMessage."""
        from relay.report.records import AttemptRow, DeliveryRow, MessageRow, RecipientRow

        key = dashed(queue_id)
        rows = self.read("message", id=key)
        if not rows:
            raise NoSuchMessage("the message was removed a moment ago")
        return MessageRow(
            **rows[0],
            recipients=[RecipientRow(**row) for row in self.read("recipients", id=key)],
            deliveries=[DeliveryRow(**row) for row in self.read("deliveries", id=key)],
            attempts=[AttemptRow(**row) for row in self.read("attempts", id=key)],
        )

    def dsns(self, queue_id: str) -> "list[DsnRow]":
        """The DSNs about a message, oldest first."""
        from relay.report.records import DsnRow

        return [DsnRow(**row) for row in self.read("dsns", id=dashed(queue_id))]

    def operations_on(self, queue_id: str) -> list[Row]:
        """The operations on a message, oldest first: `delivery`, `acted_at`, `actor`,
        `operation`, `reason`, `filter`.

        Operations on its routes and servers while it was unfinished have no `delivery`.
        """
        return self.read("operations", id=dashed(queue_id))

    def segments(self) -> dict[str, SegmentPosition]:
        """Up to where the messages of each segment have rows, by its id."""
        return {
            str(row["id"]): SegmentPosition(row["committed_to"], bool(row["sealed"]))
            for row in self.read("segments")
        }

    def mark(self) -> int:
        """The mark of the spool in this database."""
        rows = self.read("mark")
        return int(rows[0]["mark"]) if rows else 0

    def spool_id(self) -> str | None:
        """The identity of the spool in this database; None before smtpd or a worker has run."""
        rows = self.read("spool_id")
        return str(rows[0]["id"]) if rows else None

    def pauses(self) -> "list[PauseRow]":
        """Paused routes and servers."""
        from relay.report.records import PauseRow

        return [PauseRow(**row) for row in self.read("pauses")]

    def workers(self) -> "list[WorkerRow]":
        """Workers: first all that have not ended, then the last that have."""
        from relay.report.records import WorkerRow

        return [
            # SQLite has neither booleans nor JSON.
            WorkerRow(
                **{
                    **row,
                    "alive": bool(row["alive"]),
                    "routes": json.loads(row["routes"] or "null"),
                }
            )
            for row in self.read("workers", most=ENDED_WORKERS)
        ]


def _in_order(view: str, filter_: Filter) -> str:
    """A view that SQLite reads from the deliveries on, all or those of an index: its planner would
    choose worse."""
    view = re.sub(r"(?<!LEFT )JOIN", "CROSS JOIN", view)
    if filter_.states == (State.HELD,):
        return f"{view} WHERE d.state = 'held'"  # SQLite does not see that IN means the same
    if filter_.states == (State.SENDING,):  # few; other states may have many
        indexed = view.replace("deliveries d", "deliveries d INDEXED BY deliveries_sending")
        return f"{indexed} WHERE d.state = 'sending'"
    return view
