"""Looking at the queue: what operators ask of it, from the views that everybody else reads too.

How it works: a `Filter` becomes a WHERE over `mail_queue` or `mail_history`, and rows are streamed,
so that a hundred thousand of them are listed without being held. Where text is wanted the database
makes it (`lines`): what Python does for each of many columns costs more than finding the row. What
must stay true: looking changes nothing and locks nothing; times come out as aware datetimes on both
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

from sqlalchemy import Connection, CursorResult, Engine

from relay.db.engine import reading
from relay.db.schema import UNFINISHED, VIEWS, State, words
from relay.db.sql import Statements
from relay.ids import dashed
from relay.report.filters import Filter, address_is

type Row = dict[str, Any]
_TIMES = ("_at",)
_IDS = ("queue_uuid", "worker")
_FEW = 1000  # rows that an index may find and that are then sorted, or that are held at once
PATIENCE = 3600  # seconds that whoever reads a list may take: no snapshot must stay open for good
ENDED = 50  # workers that have ended and are looked up still
LOOKED_AT = 100_000  # messages that a page looks at for what no index finds


class NoSuchMessage(LookupError):
    """No message, or more than one, has an id like that."""


def _plain(found: CursorResult[Any]) -> Iterator[Row]:
    """Rows with their times as aware datetimes and their ids as text, whatever the database made of
    them."""
    names = tuple(found.keys())
    times = [name for name in names if name.endswith(_TIMES)]
    ids = [name for name in names if name in _IDS]
    for values in chain.from_iterable(found.partitions(1000)):
        row = dict(zip(names, values, strict=True))
        for name in times:
            if (value := row[name]) is not None:
                when = (
                    datetime.fromisoformat(value) if type(value) is str else value.astimezone(UTC)
                )
                row[name] = when.replace(tzinfo=UTC)
        for name in ids:
            if type(row[name]) is UUID:
                row[name] = str(row[name])
        yield row


def _in_order(view: str, wanted: Filter) -> str:
    """A view of which SQLite, which knows no better, goes through the deliveries first, all or
    those of an index."""
    view = view.replace("JOIN", "CROSS JOIN")
    if wanted.states == (State.HELD,):
        return f"{view} WHERE d.state = 'held'"  # it does not see that IN means the same
    if wanted.states == (State.SENDING,):  # few; of the others many may be
        return (
            view.replace("deliveries d", "deliveries d INDEXED BY deliveries_sending")
            + " WHERE d.state = 'sending'"
        )
    return view


class QueueReader:
    """The queue as an operator looks at it."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._sql = engine, Statements(engine)

    def all(self, sql: str, **given: Any) -> list[Row]:
        """All rows of a query with our macros."""
        with reading(self._engine) as connection:
            rows = list(_plain(self._sql.run(connection, sql, **given)))
        for row in rows:  # PostgreSQL's sum of integers
            row |= {name: int(value) for name, value in row.items() if type(value) is Decimal}
        return rows

    def rows(
        self, wanted: Filter, *, limit: int | None = None, finished: bool = False, newest: bool = False,
        after: tuple[str, int] | None = None, down_to: str | None = None, columns: str = "*",
    ) -> Iterator[Row]:  # fmt: skip
        """Rows of `mail_queue` (or of `mail_history`), a recipient each, oldest first or `newest`;
        streamed, if many.

        `after`: go on behind the row with this queue id and position. `down_to`: look at no message
        older than this. `columns`: these alone; what is not asked for need not be made.
        """
        sql, given = self._listing(columns, wanted, limit, finished, newest, after, down_to)
        # PostgreSQL plans a cursor as if a tenth of its rows were wanted. Where few are like that,
        # and nothing ends the search before the last message, it goes through all of them.
        at_once = limit is not None and limit <= _FEW and down_to is None
        return iter(self.all(sql, **given)) if at_once else self.select(sql, given)

    def _listing(
        self, columns: str, wanted: Filter, limit: int | None, finished: bool, newest: bool = False,
        after: tuple[str, int] | None = None, down_to: str | None = None,
    ) -> tuple[str, dict[str, Any]]:  # fmt: skip
        where, given = wanted.where()
        view = "mail_history" if finished or wanted.is_history() else "mail_queue"
        behind, order = ("<", "DESC") if newest else (">", "ASC")
        if after is not None:
            where += f" AND queue_uuid {behind}= @id(:after) AND (queue_uuid, position) {behind} (@id(:after), :position)"
            given |= {"after": dashed(after[0]), "position": after[1]}
        if down_to is not None:
            where, given = (
                where + " AND queue_uuid >= @id(:down_to)",
                given | {"down_to": dashed(down_to)},
            )
        if (
            self._sql.postgresql and after is not None
        ):  # it begins there only in tables of which it is told so
            more = "AND" if "WHERE" in VIEWS[view] else "WHERE"
            view = f"({VIEWS[view]} {more} r.queue_id {behind}= @id(:after) AND m.id {behind}= @id(:after)) AS v"
        elif not self._sql.postgresql and not self.few(wanted):
            view = f"({_in_order(VIEWS[view], wanted)})"
        sql = f"SELECT {columns} FROM {view} WHERE {where} ORDER BY queue_uuid {order}, position {order}"
        return (sql, given) if limit is None else (f"{sql} LIMIT :most", given | {"most": limit})

    def lines(
        self,
        wanted: Filter,
        *,
        limit: int | None = None,
        finished: bool = False,
        objects: bool = False,
    ) -> Iterator[Sequence[str]]:
        """The same rows as lines that the database makes, many at once: names of columns, then
        values, between tabs.

        `objects`: no names, and each line is a JSON object.
        """
        with self._streamed("SELECT * FROM mail_queue LIMIT 0", {}) as found:
            names = tuple(found.keys())
        values = [f"@iso({name})" if name.endswith(_TIMES) else name for name in names]
        if objects and self._sql.postgresql:  # json_build_object takes half as long again
            named = ", ".join(
                f"{value} AS {name}" for name, value in zip(names, values, strict=True)
            )
            line = f"CAST((SELECT row_to_json(o) FROM (SELECT {named}) AS o) AS text)"
        elif objects:
            line = f"json_object({', '.join(f"'{name}', {value}" for name, value in zip(names, values, strict=True))})"
        else:
            yield ["\t".join(names)]
            line = f"format('{'\t'.join(['%s'] * len(values))}', {', '.join(values)})"
        sql, given = self._listing(line, wanted, limit, finished)
        if self._sql.postgresql:
            with reading(self._engine) as connection:
                self._sql.run(
                    connection, f"SET LOCAL statement_timeout = '{PATIENCE}s'"
                )  # COPY is one statement
                yield from batched(self._sql.copied(connection, sql, **given), 1000)
        else:
            with self._streamed(sql, given) as found:
                yield from found.scalars().partitions(1000)

    def few(self, wanted: Filter) -> bool:
        """Whether an index finds what is meant, and that is not much."""
        if wanted.id is not None or "*" not in (wanted.header_message_id or "*"):
            return True
        for table, column, value in (
            ("messages", "sender", wanted.sender),
            ("recipients", "address", wanted.recipient),
        ):
            if value is not None and "*" not in value:
                where, given = address_is(column, value)
                some = f"SELECT count(*) AS n FROM (SELECT 1 FROM {table} WHERE {where} LIMIT {_FEW}) AS x"
                if self.all(some, **given)[0]["n"] < _FEW:
                    return True
        return False

    def horizon(self, wanted: Filter, after: tuple[str, int] | None = None) -> str | None:
        """The queue id down to which to look at LOOKED_AT messages; None where an index finds what
        is meant."""
        if self.few(wanted) or (wanted.states and set(wanted.states) <= set(UNFINISHED)):
            return None
        where, given = (
            ("WHERE id <= @id(:after)", {"after": dashed(after[0])}) if after else ("", {})
        )
        nth = f"SELECT id FROM messages {where} ORDER BY id DESC LIMIT 1 OFFSET {LOOKED_AT}"
        found = self.all(f"SELECT @hex(id) AS id FROM ({nth}) AS x", **given)
        return str(found[0]["id"]) if found else None

    def select(self, sql: str, given: dict[str, Any]) -> Iterator[Row]:
        """Rows of a query with our macros, streamed."""
        with self._streamed(sql, given) as found:
            yield from _plain(found)

    @contextmanager
    def _streamed(self, sql: str, given: dict[str, Any]) -> Iterator[CursorResult[Any]]:
        with reading(self._engine) as connection:
            streaming = connection.execution_options(stream_results=True, max_row_buffer=1000)
            with self._sql.run(streaming, sql, **given) as found:
                yield found

    def resolve(self, text: str) -> str:
        """The id that is meant by all of it or any unique end of it, dashes or not; raises
        NoSuchMessage."""
        digits = text.replace("-", "").lower()
        if not re.fullmatch(r"[0-9a-f]{4,32}", digits):
            raise NoSuchMessage(
                f"{text!r} is no queue id: write its 32 hex digits, or at least the last 4"
            )
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
            return [row[0] for row in self._sql.run(connection, sql, **given)]
        end = dashed(digits.rjust(32)).lstrip(" -")
        sql = f"SELECT @hex(id) FROM messages WHERE substr(CAST(id AS text), {37 - len(end)}) = :end ORDER BY id LIMIT 5"
        return [row[0] for row in self._sql.run(connection, sql, end=end)]

    def message(self, queue_id: str) -> Row | None:
        """Everything about one message: its row with `recipients`, `deliveries` and `attempts`,
        oldest first."""
        key = {"id": dashed(queue_id)}
        found = self.all(
            "SELECT @hex(id) AS queue_id, sender, size, @when(received_at) AS received_at, client_address, helo,"
            " protocol, auth_user, header_message_id, body_type, ret, envid, @hex(dsn_of) AS dsn_of, dsn_content"
            " FROM messages WHERE id = @id(:id)",
            **key,
        )
        if not found:
            return None
        of = "FROM {} WHERE queue_id = @id(:id) ORDER BY"
        return found[0] | {
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

    def notices(self, queue_id: str) -> list[Row]:
        """Notices about a message, oldest first: `queue_id`, `received_at`, `dsn_content` and what
        of their delivery `commands.ops.explain` needs. Found by their recipient, which has an
        index."""
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
        """What operators did to a message, oldest first: `delivery`, `acted_at`, `actor`, `verb`,
        `reason`, `filter`.

        What they did while it was under way to its routes, and to servers that it was tried at, has
        no `delivery`.
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
        """The identity of the spool that this database knows; None before smtpd or a worker has
        run."""
        found = self.all("SELECT @hex(id) AS id FROM spool")
        return str(found[0]["id"]) if found else None

    def pauses(self) -> list[Row]:
        """Routes and servers that nothing is sent to for now."""
        return self.all(
            "SELECT subject, @when(since) AS since_at, actor, reason FROM pauses ORDER BY subject"
        )

    def workers(self) -> list[Row]:
        """Workers, first all that have not ended, then the last that have.

        A row has id, host, pid, started_at, until, ended_at, ending, alive, how many deliveries it
        is `sending`, claim_seconds, and `routes`: the servers of each route that it knows (None: it
        has not said).
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
            most=ENDED,
        )
        return [
            row | {"routes": json.loads(row["routes"]) if row["routes"] else None} for row in rows
        ]

    def rests(self) -> list[Row]:
        """Which servers living workers leave alone for now: worker, server, why."""
        return self.all(
            "SELECT @hex(r.worker) AS worker, r.server, r.why FROM open_circuits r JOIN workers w ON w.id = r.worker"
            " WHERE w.ended_at IS NULL AND w.lease_expires_at > @now ORDER BY r.server, r.worker"
        )
