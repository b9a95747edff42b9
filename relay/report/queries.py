"""Reads the queue for operators, from the same views that they can read.

A `Filter` becomes a WHERE over `mail_queue` or `mail_history`, and rows are streamed, so that a
list of a hundred thousand rows is never held in memory.

What must stay true: reading changes nothing and locks nothing; times are aware datetimes on both
databases; an id may be given with or without dashes, or as any unique end of it.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from itertools import batched, chain
from typing import Any
from uuid import UUID

from sqlalchemy import CursorResult, Engine

from relay.db.engine import reading
from relay.db.schema import words
from relay.db.sql import Statements, named_statements
from relay.ids import dashed
from relay.queue.states import UNFINISHED, State
from relay.report.filters import Filter, address_is

type Row = dict[str, Any]
_TIMES = ("_at",)
_IDS = ("queue_uuid", "worker")
_FEW = 1000  # rows that are sorted, or held in memory, at once
LIST_TIMEOUT = 3600  # seconds for the reader of a list, so that no snapshot stays open for good
ENDED_WORKERS = 50  # workers that have ended and are still listed
SCAN_LIMIT = 100_000  # messages that a page scans where no index finds the rows


class NoSuchMessage(LookupError):
    """No message, or more than one, has an id like that."""


def _plain(result: CursorResult[Any]) -> Iterator[Row]:
    """Rows with times as aware datetimes and ids as text, from either database."""
    names = tuple(result.keys())
    times = [name for name in names if name.endswith(_TIMES)]
    ids = [name for name in names if name in _IDS]
    for values in chain.from_iterable(result.partitions(1000)):
        row = dict(zip(names, values, strict=True))
        for name in times:
            if (value := row[name]) is not None:
                aware = (
                    datetime.fromisoformat(value) if type(value) is str else value.astimezone(UTC)
                )
                row[name] = aware.replace(tzinfo=UTC)
        for name in ids:
            if type(row[name]) is UUID:
                row[name] = str(row[name])
        yield row


def _view(engine: Engine, view: str) -> str:
    """The SELECT of a view."""
    made = named_statements("migrations.views", engine.dialect.name)["create_views"]
    texts = (statement.text.partition(f"CREATE VIEW {view} AS\n")[2] for statement in made)
    return next(filter(None, texts))


def _in_order(view: str, wanted: Filter) -> str:
    """A view that SQLite reads from the deliveries on, all or those of an index: its planner would
    choose worse."""
    view = view.replace("JOIN", "CROSS JOIN")
    if wanted.states == (State.HELD,):
        return f"{view} WHERE d.state = 'held'"  # SQLite does not see that IN means the same
    if wanted.states == (State.SENDING,):  # few; other states may have many
        return (
            view.replace("deliveries d", "deliveries d INDEXED BY deliveries_sending")
            + " WHERE d.state = 'sending'"
        )
    return view


class QueueReader:
    """Reads the queue for operators."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sql = Statements(engine)

    def all(self, sql: str, **parameters: Any) -> list[Row]:
        """All rows of a query with our macros."""
        with reading(self._engine) as connection:
            rows = list(_plain(self._sql.run(connection, sql, **parameters)))
        for row in rows:  # PostgreSQL's sum of integers
            row |= {name: int(value) for name, value in row.items() if type(value) is Decimal}
        return rows

    def rows(
        self, wanted: Filter, *, limit: int | None = None, finished: bool = False, newest: bool = False,
        after: tuple[str, int] | None = None, down_to: str | None = None, columns: str = "*",
    ) -> Iterator[Row]:  # fmt: skip
        """Rows of `mail_queue` (or of `mail_history`), one for each recipient, oldest first or
        `newest`; many are streamed.

        `after`: start after the row with this queue id and position. `down_to`: skip messages that
        are older than this id. `columns`: read these alone.
        """
        sql, parameters = self._listing(columns, wanted, limit, finished, newest, after, down_to)
        # PostgreSQL plans a cursor as if a tenth of its rows were wanted. Where few rows match, it
        # would scan all messages.
        at_once = limit is not None and limit <= _FEW and down_to is None
        return iter(self.all(sql, **parameters)) if at_once else self.select(sql, parameters)

    def _listing(
        self, columns: str, wanted: Filter, limit: int | None, finished: bool, newest: bool = False,
        after: tuple[str, int] | None = None, down_to: str | None = None,
    ) -> tuple[str, dict[str, Any]]:  # fmt: skip
        where, parameters = wanted.where()
        view = "mail_history" if finished or wanted.is_history() else "mail_queue"
        behind, order = ("<", "DESC") if newest else (">", "ASC")
        if after is not None:
            where += f" AND queue_uuid {behind}= @id(:after) AND (queue_uuid, position) {behind} (@id(:after), :position)"
            parameters |= {"after": dashed(after[0]), "position": after[1]}
        if down_to is not None:
            where += " AND queue_uuid >= @id(:down_to)"
            parameters["down_to"] = dashed(down_to)
        if self._sql.postgresql and after is not None:
            # PostgreSQL starts there only in the tables that the condition names.
            more = "AND" if "WHERE" in _view(self._engine, view) else "WHERE"
            view = f"({_view(self._engine, view)} {more} r.queue_id {behind}= @id(:after) AND m.id {behind}= @id(:after)) AS v"
        elif not self._sql.postgresql and not self.few(wanted):
            view = f"({_in_order(_view(self._engine, view), wanted)})"
        sql = f"SELECT {columns} FROM {view} WHERE {where} ORDER BY queue_uuid {order}, position {order}"
        if limit is None:
            return sql, parameters
        return f"{sql} LIMIT :most", parameters | {"most": limit}

    def lines(
        self,
        wanted: Filter,
        *,
        limit: int | None = None,
        finished: bool = False,
        objects: bool = False,
    ) -> Iterator[Sequence[str]]:
        """The same rows as lines in batches: the names of the columns, then values, between tabs.

        `objects`: each line is a JSON object, without a line of names. The database makes the lines:
        in Python each column costs more than finding the row.
        """
        with self._streamed("SELECT * FROM mail_queue LIMIT 0", {}) as result:
            names = tuple(result.keys())
        values = [f"@iso({name})" if name.endswith(_TIMES) else name for name in names]
        if objects and self._sql.postgresql:  # json_build_object takes 1.5 times as long
            named = ", ".join(
                f"{value} AS {name}" for name, value in zip(names, values, strict=True)
            )
            line = f"CAST((SELECT row_to_json(o) FROM (SELECT {named}) AS o) AS text)"
        elif objects:
            line = f"json_object({', '.join(f"'{name}', {value}" for name, value in zip(names, values, strict=True))})"
        else:
            yield ["\t".join(names)]
            line = f"format('{'\t'.join(['%s'] * len(values))}', {', '.join(values)})"
        sql, parameters = self._listing(line, wanted, limit, finished)
        if self._sql.postgresql:
            with reading(self._engine) as connection:
                self._sql.run(
                    connection, f"SET LOCAL statement_timeout = '{LIST_TIMEOUT}s'"
                )  # COPY is one statement
                yield from batched(self._sql.copied(connection, sql, **parameters), 1000)
        else:
            with self._streamed(sql, parameters) as result:
                yield from result.scalars().partitions(1000)

    def few(self, wanted: Filter) -> bool:
        """Whether an index finds the rows, and they are few."""
        if wanted.id is not None or "*" not in (wanted.header_message_id or "*"):
            return True
        for table, column, value in (
            ("messages", "sender", wanted.sender),
            ("recipients", "address", wanted.recipient),
        ):
            if value is not None and "*" not in value:
                where, parameters = address_is(column, value)
                some = f"SELECT count(*) AS n FROM (SELECT 1 FROM {table} WHERE {where} LIMIT {_FEW}) AS x"
                if self.all(some, **parameters)[0]["n"] < _FEW:
                    return True
        return False

    def horizon(self, wanted: Filter, after: tuple[str, int] | None = None) -> str | None:
        """The queue id down to which to scan SCAN_LIMIT messages; None where an index finds what
        is meant."""
        if self.few(wanted) or (wanted.states and set(wanted.states) <= set(UNFINISHED)):
            return None
        where = "WHERE id <= @id(:after)" if after else ""
        parameters = {"after": dashed(after[0])} if after else {}
        nth = f"SELECT id FROM messages {where} ORDER BY id DESC LIMIT 1 OFFSET {SCAN_LIMIT}"
        rows = self.all(f"SELECT @hex(id) AS id FROM ({nth}) AS x", **parameters)
        return str(rows[0]["id"]) if rows else None

    def select(self, sql: str, parameters: dict[str, Any]) -> Iterator[Row]:
        """Rows of a query with our macros, streamed."""
        with self._streamed(sql, parameters) as result:
            yield from _plain(result)

    @contextmanager
    def _streamed(self, sql: str, parameters: dict[str, Any]) -> Iterator[CursorResult[Any]]:
        with reading(self._engine) as connection:
            streaming = connection.execution_options(stream_results=True, max_row_buffer=1000)
            with self._sql.run(streaming, sql, **parameters) as result:
                yield result

    def resolve(self, text: str) -> str:
        """The queue id that is or ends in this text, with or without dashes; raises NoSuchMessage."""
        digits = text.replace("-", "").lower()
        if not re.fullmatch(r"[0-9a-f]{4,32}", digits):
            raise NoSuchMessage(
                f"{text!r} is not a queue id: write its 32 hex digits, or at least the last 4"
            )
        end = dashed(digits.rjust(32)).lstrip(" -")
        where = f"substr(CAST(id AS text), {37 - len(end)}) = :end"
        if len(digits) == 32:
            where = "id = @id(:end)"
        sql = f"SELECT @hex(id) AS id FROM messages WHERE {where} ORDER BY id LIMIT 5"
        ids = [str(row["id"]) for row in self.all(sql, end=end)]
        if not ids:
            raise NoSuchMessage(f"no message has an id that is or ends in {digits}")
        if len(ids) > 1:
            raise NoSuchMessage(f"more than one id ends in {digits}: {', '.join(ids)}")
        return ids[0]

    def message(self, queue_id: str) -> Row | None:
        """The row of one message with its `recipients`, `deliveries` and `attempts`, oldest first."""
        key = {"id": dashed(queue_id)}
        rows = self.all(
            "SELECT @hex(id) AS queue_id, sender, size, @when(received_at) AS received_at, client_address, helo,"
            " protocol, auth_user, header_message_id, body_type, ret, envid, @hex(dsn_of) AS dsn_of, dsn_content"
            " FROM messages WHERE id = @id(:id)",
            **key,
        )
        if not rows:
            return None
        of = "FROM {} WHERE queue_id = @id(:id) ORDER BY"
        return rows[0] | {
            "recipients": self.all(
                f"SELECT position, address, delivery, notify, orcpt {of.format('recipients')} position",
                **key,
            ),
            "deliveries": self.all(
                "SELECT number, parent, route, state, @when(due_at) AS due_at, @when(expires_at) AS expires_at, claim_count,"
                " @hex(worker) AS worker, backoff_step, crash_count, pending_operation, last_outcome, last_reply,"
                " reason_source, last_server,"
                f" dsn_withheld, @when(finished_at) AS finished_at {of.format('deliveries')} number",
                **key,
            ),
            "attempts": self.all(
                "SELECT delivery, claim, attempt_index, @hex(worker) AS worker, server, @when(started_at) AS started_at,"
                " @when(finished_at) AS finished_at, outcome, reply, bytes_sent"
                f" {of.format('attempts')} delivery, claim, attempt_index",
                **key,
            ),
        }

    def summary(self) -> list[Row]:
        """Rows of `queue_summary`: counts, bytes and oldest by state and route."""
        return self.all("SELECT * FROM queue_summary ORDER BY state, route")

    def servers(self) -> list[Row]:
        """Rows of `server_health`: outcomes by server in the last hour."""
        return self.all("SELECT * FROM server_health ORDER BY server")

    def dsns(self, queue_id: str) -> list[Row]:
        """The DSNs about a message with their delivery, oldest first. They are found by their
        recipient, which has an index."""
        return self.all(
            """SELECT @hex(n.id) AS queue_id, @when(n.received_at) AS received_at, n.dsn_content, d.state,
                @when(d.due_at) AS due_at, @when(d.finished_at) AS finished_at, d.last_outcome, d.last_reply,
                d.reason_source, d.last_server
            FROM messages m JOIN recipients r ON r.address = m.sender JOIN messages n ON n.id = r.queue_id
            JOIN deliveries d ON d.queue_id = r.queue_id AND d.number = r.delivery
            WHERE m.id = @id(:id) AND n.dsn_of = m.id ORDER BY 1""",
            id=dashed(queue_id),
        )

    def actions_on(self, queue_id: str) -> list[Row]:
        """The actions of operators on a message, oldest first: `delivery`, `acted_at`, `actor`,
        `verb`, `reason`, `filter`.

        Actions on its routes and servers while it was unfinished have no `delivery`.
        """
        return self.all(
            f"""WITH d AS (SELECT * FROM deliveries WHERE queue_id = @id(:id)),
                s AS (SELECT 'route:' || route AS subject FROM d UNION SELECT 'server:' || server FROM attempts
                    WHERE queue_id = @id(:id) AND server IS NOT NULL),
                found AS (SELECT t.delivery, a.* FROM audit_deliveries t JOIN audit a ON a.id = t.action
                    WHERE t.queue_id = @id(:id)
                    UNION ALL SELECT NULL, a.* FROM audit a
                    WHERE a.verb IN (SELECT 'pause ' || subject FROM s UNION SELECT 'resume ' || subject FROM s)
                        AND a.at > (SELECT received_at FROM messages WHERE id = @id(:id))
                        AND a.at < (SELECT max(CASE WHEN state IN ({words(UNFINISHED)}) THEN @now ELSE finished_at END)
                            FROM d))
            SELECT delivery, @when(at) AS acted_at, actor, verb, reason, filter FROM found ORDER BY at, id, delivery""",
            id=dashed(queue_id),
        )

    def spool_id(self) -> str | None:
        """The identity of the spool in this database; None before smtpd or a worker has run."""
        rows = self.all("SELECT @hex(id) AS id FROM spool")
        return str(rows[0]["id"]) if rows else None

    def pauses(self) -> list[Row]:
        """Paused routes and servers."""
        return self.all(
            "SELECT subject, @when(since) AS since_at, actor, reason FROM pauses ORDER BY subject"
        )

    def workers(self) -> list[Row]:
        """Workers: first all that have not ended, then the last that have.

        `sending` is the number of deliveries; `routes` has the servers of each route in the
        worker's settings, and is None before the worker has written it.
        """
        rows = self.all(
            "SELECT @hex(w.id) AS id, w.host, w.pid, @when(w.started_at) AS started_at, @when(w.lease_expires_at) AS lease_expires_at,"
            " @when(w.ended_at) AS ended_at, w.end_reason, (w.ended_at IS NULL AND w.lease_expires_at > @now) AS alive,"
            " coalesce(d.sending, 0) AS sending, w.claim_seconds, w.routes"
            " FROM workers w LEFT JOIN (SELECT worker, count(*) AS sending"
            " FROM deliveries WHERE state = 'sending' GROUP BY worker) AS d ON d.worker = w.id"
            " WHERE w.ended_at IS NULL OR w.id IN"
            " (SELECT id FROM workers WHERE ended_at IS NOT NULL ORDER BY started_at DESC LIMIT :most)"
            " ORDER BY w.ended_at IS NOT NULL, w.started_at DESC, w.id DESC",
            most=ENDED_WORKERS,
        )
        return [
            row | {"routes": json.loads(row["routes"]) if row["routes"] else None} for row in rows
        ]

    def open_circuits(self) -> list[Row]:
        """The open circuits of living workers: worker, server, why."""
        return self.all(
            "SELECT @hex(r.worker) AS worker, r.server, r.why FROM open_circuits r JOIN workers w ON w.id = r.worker"
            " WHERE w.ended_at IS NULL AND w.lease_expires_at > @now ORDER BY r.server, r.worker"
        )
