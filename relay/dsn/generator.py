"""Generates the DSNs that are pending and the delay warnings, each exactly once.

The transaction that makes a delivery `bounced` or `expired` sets its `due_at`: a DSN is pending.
The generator locks the deliveries, writes the DSN's body, and in the same transaction inserts the
DSN as a message and clears `due_at`. Each attempt has a queue id, and so a file, of its own. Before
the COMMIT a failed attempt removes its file. After an uncertain COMMIT the file stays: it is the
body of a message, or an orphan.

What must stay true: `due_at` (or `warned_at`) and the DSN change in one transaction; only the
attempt that made a file removes it, and only while its transaction cannot have been committed; no
DSN goes to the null sender; a message that fails here delays no other message.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Engine

from relay.db.engine import is_outage, reading, writing
from relay.db.sql import Statements
from relay.dsn.message import (
    Enclosure,
    Failure,
    Kind,
    Original,
    Withheld,
    compose,
    reduced,
)
from relay.ids import dashed, new_id
from relay.log import first_line, get_logger
from relay.queue.accept import Acceptor, NewMessage, NewRecipient
from relay.queue.outcome import Outcome
from relay.queue.split import can_carry
from relay.queue.states import ReasonSource, State
from relay.settings import Settings, unwanted
from relay.spool.retention import deletable_bodies
from relay.spool.store import BodyUnsendable, Spool

log = get_logger(__name__)
# A pending DSN waits so long for the other deliveries of its message, because recipients that fail
# together are reported in one DSN (seconds).
GATHER = 30
# Of a longer original only the header is returned (bytes).
LONGEST_RETURNED = 50_000
# A sender gets at most one DSN in this time about mail from untrusted clients, which may have named
# a victim as the sender (seconds).
LIMIT = 60
# A message whose DSN could not be generated is not tried again before this time (seconds).
PUT_OFF = 60.0
# So many deliveries are checked for lateness in each sweep.
LATE_CHECKS = 1000

# A `due_at` far ahead was set before the database's clock was set back.
_PENDING_IDS = """SELECT queue_id FROM deliveries d
    WHERE d.state IN ('bounced', 'expired') AND d.due_at IS NOT NULL
      AND (d.due_at <= @now OR d.due_at > @later(:gather))
      AND (d.due_at <= @ago(:gather) OR NOT EXISTS (SELECT 1 FROM deliveries o
           WHERE o.queue_id = d.queue_id AND o.state IN ('queued', 'sending')))
      AND d.queue_id NOT IN (SELECT queue_id FROM @rows(:put_off; queue_id uuid))
    ORDER BY d.due_at LIMIT :most"""
# The message is locked too: two sweepers may each hold some of its deliveries.
_LOCK = """SELECT d.number FROM deliveries d JOIN messages m ON m.id = d.queue_id
    WHERE d.queue_id = @id(:id) AND {} ORDER BY d.number @skip_locked"""
_PENDING = "state IN ('bounced', 'expired') AND due_at IS NOT NULL"
_DELAYED = "state IN ('queued', 'sending', 'deferred')"
_WARNED = "(SELECT max(o.warned_at) FROM deliveries o WHERE o.queue_id = {}) IS NOT NULL"
# The next deliveries of the queue: the age of each, and whether it is late and its sender asked for
# a warning and has none. `warned_at` of one delivery counts for the whole message, also after a
# split. These are scalar subqueries because PostgreSQL would answer EXISTS with a hash of whole
# tables.
_NEXT = f"""SELECT {{keys}}, d.age, d.age >= :late AND NOT {_WARNED.format("d.queue_id")}
        AND (SELECT m.sender NOT IN ('', '#@[]') FROM messages m WHERE m.id = d.queue_id)
        AND (SELECT count(*) FROM recipients r WHERE r.queue_id = d.queue_id AND r.delivery = d.number
             AND (r.notify IS NULL OR r.notify @like '%DELAY%')) > 0 AS late
    FROM (SELECT {{keys}}, (SELECT @since(m.received_at) FROM messages m WHERE m.id = queue_id) AS age
        FROM deliveries WHERE state = '{{state}}' {{after}} ORDER BY {{keys}} LIMIT :most) d
    ORDER BY {{keys}}"""
# The states in which a delivery may be late, and the columns of the index of each.
_SCANNED = {
    State.DEFERRED: "due_at",
    State.QUEUED: "route, due_at",
    State.SENDING: "worker, due_at",
}
_RECIPIENTS = """SELECT @hex(m.id) AS id, m.sender, m.size, m.header_message_id, m.envid, m.ret,
        @micros(m.received_at) AS received_at, r.address, r.orcpt, r.notify, d.number, d.state, d.last_reply,
        d.reason_source,
        d.last_server, d.last_outcome, m.client_trusted, m.dsn_content, @hex(m.dsn_of) AS dsn_of,
        @micros(d.expires_at) AS expires_at,
        (SELECT @micros(max(a.finished_at)) FROM attempts a
         WHERE a.queue_id = d.queue_id AND a.delivery = d.number AND a.server IS NOT NULL) AS attempted_at
    FROM deliveries d JOIN messages m ON m.id = d.queue_id
    JOIN recipients r ON r.queue_id = d.queue_id AND r.delivery = d.number
    WHERE d.queue_id = @id(:id) ORDER BY r.position"""

# Deliveries that a server may have accepted. After a malformed reply, `bytes_sent` tells whether the
# whole request had been sent.
_POSSIBLY_DELIVERED = """SELECT d.number, d.parent, d.last_outcome = 'uncertain' OR EXISTS (SELECT 1 FROM attempts a
        WHERE a.queue_id = d.queue_id AND a.delivery = d.number
        AND (a.outcome = 'uncertain' OR (a.outcome = 'malformed' AND a.bytes_sent >= m.size)))
    FROM deliveries d JOIN messages m ON m.id = d.queue_id WHERE d.queue_id = @id(:id) ORDER BY d.number"""

# Takes the sender's turn, if the last one is LIMIT ago. The row is locked until the DSN is
# committed, so that two workers do not both take it. A time ahead comes from a clock that was set
# back.
_TAKE_TURN = """INSERT INTO dsn_limits (sender, last_at) VALUES (:sender, @now)
    ON CONFLICT (sender) DO UPDATE SET last_at = @now
    WHERE dsn_limits.last_at <= @ago(:limit) OR dsn_limits.last_at > @later(:limit)"""


class DsnGenerator:
    """Generates DSNs and delay warnings. Used by one thread.

    `refused` is called with the server's name and reply for each D that was about this relay and
    not about the mail.
    """

    def __init__(
        self,
        engine: Engine,
        spool: Spool,
        settings: Settings,
        route_for: Callable[[str], str],
        refused: Callable[[str, str], None] = lambda server, reply: None,
    ) -> None:
        self._engine = engine
        self._spool = spool
        self._settings = settings
        self._route_for = route_for
        self._refused = refused
        self._sql = Statements(engine, gather=GATHER, limit=LIMIT)
        self._postmaster = {"postmaster", f"postmaster@{settings.hostname}".lower()}
        self._unauthorized = unwanted(settings)
        self._acceptor = Acceptor(engine, lifetime=settings.queue_lifetime, grace=settings.grace)
        # Messages that failed here, each with the time of its next try. Times are those of
        # `time.monotonic`.
        self._put_off: dict[str, float] = {}
        # The scan for late mail: states still to scan, the key of the last delivery, when the first
        # delivery of this round becomes late, when the next round begins.
        self._states = list(_SCANNED)
        self._cursor = tuple[Any, ...]()
        self._next_late = math.inf
        self._next_round = 0.0

    def generate(self, most: int) -> list[str]:
        """Generate the DSNs of at most `most` deliveries; the queue ids of the DSNs.

        Raises the errors that stop all of them: an outage of the database, a spool that cannot be
        written.
        """
        put_off = json.dumps([{"queue_id": dashed(queue_id)} for queue_id in self._not_yet()])
        with writing(self._engine) as connection:
            run = self._sql.run(connection, _PENDING_IDS, most=most, put_off=put_off)
            pending = run.scalars().all()
        return self._generate_each(pending, Kind.BOUNCED)

    def warn(self, most: int) -> list[str]:
        """Warn the senders of at most `most` late messages; the queue ids of the warnings.

        Late is a delivery that is unfinished, not held, and older than DELAY_WARNING by the
        database's clock. Every call checks the next LATE_CHECKS deliveries, state by state in the
        order of its index, so a long queue delays warnings and not sweeps. The next round begins
        when the next delivery becomes late, or after a quarter of DELAY_WARNING, for mail that
        operators release. Raises as `generate`.
        """
        limit = self._settings.delay_warning
        if limit is None or self._settings.bounces == "off" or time.monotonic() < self._next_round:
            return []
        return self._generate_each(self._late(limit, most), Kind.DELAYED)

    def _late(self, limit: float, most: int) -> dict[Any, None]:
        """Go on with the scan; at most `most` ids of late messages, as the database writes them."""
        late: dict[Any, None] = {}
        left = LATE_CHECKS
        while left:
            rows = self._next_rows(limit, left)
            for *key, age, is_late in rows:
                queue_id = key[-2]
                if is_late and len(late) == most and queue_id not in late:
                    return late
                if is_late:
                    late[queue_id] = None
                if is_late or age < limit:
                    self._next_late = min(self._next_late, time.monotonic() + max(0.0, limit - age))
                self._cursor = tuple(key)
            left -= len(rows)
            if left:  # this state is scanned
                self._cursor = ()
                self._states = self._states[1:]
                if not self._states:
                    self._next_round = min(self._next_late, time.monotonic() + limit / 4)
                    self._states = list(_SCANNED)
                    self._next_late = math.inf
                    break
        return late

    def _next_rows(self, limit: float, most: int) -> Sequence[Any]:
        """The next deliveries of the scan: the columns of the key, the age, whether it is late."""
        keys = f"{_SCANNED[self._states[0]]}, queue_id, number"
        parameters = {f"key{n}": value for n, value in enumerate(self._cursor)}
        names = ", ".join(f":{name}" for name in parameters)
        after = f"AND ({keys}) > ({names})" if parameters else ""
        sql = _NEXT.format(keys=keys, state=self._states[0], after=after)
        with reading(self._engine) as connection:
            rows: Sequence[Any] = self._sql.run(
                connection, sql, late=limit, most=most, **parameters
            ).all()
        return rows

    def _not_yet(self) -> set[str]:
        """Messages that failed a moment ago: without a pause they would take the turn of others."""
        now = time.monotonic()
        self._put_off = {key: until for key, until in self._put_off.items() if until > now}
        return set(self._put_off)

    def _generate_each(self, keys: Iterable[Any], kind: Kind) -> list[str]:
        """Generate a DSN about each of these messages, in a transaction each; their queue ids."""
        generated: list[str] = []
        put_off = self._not_yet()
        for queue_id in dict.fromkeys(key for key in map(_hex, keys) if key not in put_off):
            try:
                generated += self._generate(queue_id, kind)
            except Exception as error:
                self._put_off[queue_id] = time.monotonic() + PUT_OFF
                if is_outage(error):
                    raise
                log.error("dsn failed", id=queue_id, reason=first_line(error))
        return generated

    def _generate(self, queue_id: str, kind: Kind) -> list[str]:
        """Generate the DSN about one message, unless another worker has locked it; its queue id, or
        nothing if no DSN is wanted."""
        dsn_id = new_id()
        committing = False
        try:
            with writing(self._engine) as connection:
                build = self._warning if kind is Kind.DELAYED else self._bounce
                fields = build(connection, queue_id, dsn_id)
                committing = True
        except Exception:
            if not committing:
                self._spool.remove(dsn_id)
            raise
        # Two transactions that finish the last two deliveries cannot see each other, so the rows
        # are checked again after the COMMIT.
        if kind is not Kind.DELAYED and deletable_bodies(self._engine, self._sql, [queue_id]):
            self._spool.remove(queue_id)
        if not fields:
            return []
        log.info("dsn generated", id=dsn_id, **fields)
        return [dsn_id]

    def _bounce(self, connection: Connection, queue_id: str, dsn_id: str) -> dict[str, Any]:
        """Build the DSN that is pending about a message, if its sender wants one; fields for the
        log."""
        numbers, rows = self._locked(connection, queue_id, _PENDING)
        rows = [row for row in rows if row["number"] in numbers]
        if not numbers or self._reclassify(connection, queue_id, rows):
            return {}
        fields: dict[str, Any] = {}
        if rows and self._settings.bounces != "off":
            if wanted := [row for row in rows if _wants(row, "FAILURE")]:
                fields = self._build(connection, dsn_id, wanted, Kind.BOUNCED)
            elif rows[0]["dsn_content"]:
                fields = self._rebuild(connection, dsn_id, rows[0])
        self._update(connection, queue_id, numbers, "due_at = NULL")
        return fields

    def _warning(self, connection: Connection, queue_id: str, dsn_id: str) -> dict[str, Any]:
        """Build the delay warning about a message; fields for the log."""
        numbers, rows = self._locked(connection, queue_id, _DELAYED)
        warned = f"SELECT {_WARNED.format('@id(:id)')}"
        if not numbers or self._sql.run(connection, warned, id=dashed(queue_id)).scalar():
            return {}
        # Deliveries that a worker has locked belong to it too: there is no second warning.
        unfinished = [row for row in rows if row["state"] in _SCANNED]
        wanted = [row for row in unfinished if _wants(row, "DELAY")]
        if not wanted:
            return {}
        # A withheld warning is marked too, or every round would find it again.
        self._update(connection, queue_id, numbers, "warned_at = @now")
        return self._build(connection, dsn_id, wanted, Kind.DELAYED)

    def _locked(
        self, connection: Connection, queue_id: str, which: str
    ) -> tuple[set[int], Sequence[Any]]:
        """Lock the message and such deliveries of it; the numbers of those that no other worker has
        locked, and a row for each recipient of the message."""
        key = dashed(queue_id)
        numbers = set(self._sql.run(connection, _LOCK.format(which), id=key).scalars())
        rows = self._sql.run(connection, _RECIPIENTS, id=key).mappings().all() if numbers else []
        return numbers, rows

    def _allowed(
        self, connection: Connection, rows: Sequence[Any]
    ) -> tuple[Sequence[Any], Withheld | None]:
        """The recipients that a DSN may report to the sender now, and why the others are left out.

        Every client may write to our own postmaster (RFC 5321 4.5.1), so a stranger gets no DSN
        about that.
        """
        sender = rows[0]["sender"]
        if not can_carry(sender):
            return [], Withheld.ADDRESS
        if not _is_strangers(rows[0]):
            return rows, None
        reported = [row for row in rows if row["address"].lower() not in self._postmaster]
        if not reported:
            return [], Withheld.POSTMASTER
        if not self._sql.run(connection, _TAKE_TURN, sender=sender.lower()).rowcount:
            return [], Withheld.RATE
        return reported, Withheld.POSTMASTER if len(reported) < len(rows) else None

    def _reclassify(self, connection: Connection, queue_id: str, rows: Sequence[Any]) -> bool:
        """Defer deliveries again whose D was about this relay and not about the mail; whether there
        were any."""
        about_us = {
            row["number"]: row
            for row in rows
            if _is_refused(row) and self._unauthorized.search(row["last_reply"] or "")
        }
        if about_us:
            change = """-- event: reclassified
                state = 'deferred', due_at = @later(:gather), finished_at = NULL"""
            self._update(connection, queue_id, set(about_us), change)
        for _, row in sorted(about_us.items()):
            log.critical("unauthorized reply reclassified", id=queue_id, reply=row["last_reply"])
            if row["last_server"]:
                self._refused(row["last_server"], row["last_reply"])
        return bool(about_us)

    def _build(
        self, connection: Connection, dsn_id: str, rows: Sequence[Any], kind: Kind
    ) -> dict[str, Any]:
        """Build a DSN about these recipients of a message, as far as it may report them; fields for
        the log."""
        first = rows[0]
        reported, withheld = self._allowed(connection, rows)
        if withheld:
            log.warning("dsn withheld", id=first["id"], reason=str(withheld), kind=str(kind))
        unreported = {row["number"] for row in rows} - {row["number"] for row in reported}
        if unreported and kind is not Kind.DELAYED:
            self._update(connection, first["id"], unreported, f"dsn_withheld = '{withheld}'")
        if not reported:
            return {}
        possibly_delivered = self._possibly_delivered(connection, first["id"])
        failures = [
            Failure(
                row["address"],
                row["orcpt"],
                kind if kind is Kind.DELAYED else Kind(row["state"]),
                row["last_reply"] or "",
                row["last_server"],
                _utc(row["attempted_at"]) if row["attempted_at"] else None,
                _utc(row["expires_at"]),
                row["last_outcome"],
                row["reason_source"],
                row["number"] in possibly_delivered,
            )
            for row in reported
        ]
        # The sender expects the whole message, unless it asked for less (RET=HDRS, RFC 3461 4.3).
        whole = kind is not Kind.DELAYED and first["ret"] != "HDRS"
        too_long = whole and first["size"] > LONGEST_RETURNED
        enclosure = Enclosure.HEADER
        if whole and not too_long and not _is_strangers(first):
            enclosure = Enclosure.FULL
        content = self._content(first["id"], first["size"], enclosure)
        left_out = ""
        if content is None:
            enclosure = Enclosure.NONE
            left_out = "Your message could not be read again, and is not returned."
        elif too_long:
            left_out = f"Only its header is returned: the message is longer than {LONGEST_RETURNED:,} bytes."
        text = compose(
            dsn_id,
            self._settings.hostname,
            datetime.now(UTC),
            Original(
                first["id"],
                first["sender"],
                _utc(first["received_at"]),
                first["header_message_id"],
                first["envid"],
            ),
            failures,
            content,
            full=enclosure is Enclosure.FULL,
            left_out=left_out,
        )
        self._insert(
            connection, dsn_id, text, first["sender"], about=first["id"], content=enclosure
        )
        return {"about": first["id"], "recipients": len(reported), "kind": str(kind)}

    def _rebuild(self, connection: Connection, dsn_id: str, failed: Any) -> dict[str, Any]:
        """Build a DSN again after it failed; fields for the log.

        A server may have refused it for the part of the original that it encloses (header_checks,
        body_checks, a virus filter), so it is built again with less of that. If nothing is left to
        leave out, or it failed for another reason, it is given up.
        """
        text = None
        less = Enclosure(failed["dsn_content"]).less
        if _is_refused(failed) and less:
            try:
                with os.fdopen(self._spool.open(failed["id"], failed["size"]), "rb") as body:
                    text = reduced(body.read(), failed["id"], dsn_id, less)
            except BodyUnsendable as error:  # an error of the disk is raised, and tried again later
                log.warning("refused dsn not readable", id=failed["id"], reason=str(error))
        about = failed["dsn_of"]
        if text is None or less is None:
            log.error("dsn given up", id=failed["id"], about=about, reply=failed["last_reply"])
            return {}
        self._insert(connection, dsn_id, text, failed["address"], about=about, content=less)
        return {"about": about, "instead_of": failed["id"], "content": str(less)}

    def _insert(
        self,
        connection: Connection,
        dsn_id: str,
        text: bytes,
        address: str,
        *,
        about: str,
        content: Enclosure,
    ) -> None:
        """Write the body, then insert the message in the caller's transaction."""
        size = self._spool.store(dsn_id, [text])
        message = NewMessage(
            dsn_id,
            "",
            size,
            [NewRecipient(address, notify="NEVER", route=self._route_for(address))],
            "",
            self._settings.hostname,
            "NOTICE",
            header_message_id=f"<{dsn_id}@{self._settings.hostname}>",
            dsn_of=about,
            body_type="7BIT" if text.isascii() else "8BITMIME",
            dsn_content=content,
        )
        self._acceptor.insert(connection, [message])

    def _possibly_delivered(self, connection: Connection, queue_id: str) -> set[int]:
        """The deliveries of a message that a server may have accepted, before or after a split."""
        numbers: set[int] = set()
        rows = self._sql.run(connection, _POSSIBLY_DELIVERED, id=dashed(queue_id))
        for number, parent, uncertain in rows:
            if uncertain or parent in numbers:  # a parent has the smaller number
                numbers.add(number)
        return numbers

    def _content(self, queue_id: str, size: int, enclosure: Enclosure) -> bytes | None:
        """The original or its header, at most LONGEST_RETURNED bytes; None if it cannot be read."""
        try:
            with os.fdopen(self._spool.open(queue_id, size), "rb") as body:
                text = body.read(LONGEST_RETURNED)
        except (BodyUnsendable, OSError) as error:
            log.warning("original not returned", id=queue_id, reason=str(error))
            return None
        if enclosure is Enclosure.FULL:
            return text
        header = text.partition(b"\n\n")[0]
        if len(header) == LONGEST_RETURNED:  # cut at the last whole line
            return header[: header.rfind(b"\n") + 1]
        return header + b"\n"

    def _update(
        self, connection: Connection, queue_id: str, numbers: set[int], change: str
    ) -> None:
        """Change deliveries that this transaction has locked."""
        listed = ", ".join(str(int(number)) for number in sorted(numbers))
        sql = f"UPDATE deliveries SET {change} WHERE queue_id = @id(:id) AND number IN ({listed})"
        self._sql.run(connection, sql, id=dashed(queue_id))


def _wants(row: Any, what: str) -> bool:
    """Whether the sender asked for DSNs of this kind about this recipient (RFC 3461 4.1)."""
    asked = row["notify"] is None or what in row["notify"].upper().split(",")
    return asked and row["sender"] not in ("", "#@[]")


def _is_refused(row: Any) -> bool:
    """Whether it bounced because a server replied D; not an operator, and not an address that
    cannot be sent."""
    found = (row["state"], row["last_outcome"], row["reason_source"])
    return found == (State.BOUNCED, Outcome.REJECTED, ReasonSource.SERVER)


def _is_strangers(row: Any) -> bool:
    """Whether the policy does not trust the client that sent the message; rows of older versions
    have no `client_trusted`."""
    return row["client_trusted"] is not None and not row["client_trusted"]


def _hex(key: object) -> str:
    """The 32 hex digits of an id that the database wrote."""
    return str(key).replace("-", "")


def _utc(micros: Any) -> datetime:
    return datetime.fromtimestamp(int(micros) / 1e6, UTC)
