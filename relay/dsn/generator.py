"""Debts: notices that are owed, each made exactly once.

A debt is made by the transaction that makes a delivery `bounced` or `expired`: its `due_at` stays
until the notice exists. Whoever settles one locks the deliveries, writes the notice's body, and in
the same transaction inserts the notice as a message like any other and clears the debt.

Once is what the debt says, not the file. Every attempt at a notice has an id of its own, and so a
file of its own that nobody else ever opens, replaces or removes: not another sweeper, not one that
stood still for so long that its session and its locks are gone and somebody else has made the
notice meanwhile. Wherever an attempt ends, that is enough:

- before the COMMIT, by an error: nothing is committed, and the attempt removes its own file;
- before the COMMIT, killed, or without a session when it wakes up: nothing is committed, the debt
  is there for the next one. What a kill leaves is a file without a row; housekeeping puts it aside,
  as it does after smtpd;
- in the COMMIT, and nobody knows: the file stays. If it came through, it is a message's body. If
  not, it is as above;
- after the COMMIT: the debt is gone, and the original's body, if nobody needs it, is housekeeping's
  to remove.

The size in the row is that of the attempt's own file, whatever another one was able to read of the
original.

Recipients of one message that failed together stand in one notice: while another delivery of it is
about to be decided, its debt waits a little.

A warning about late mail is owed by whatever is unfinished, not held, and older than DELAY_WARNING
by the database's clock, and was not warned of (`warned_at`, set in the transaction that inserts the
warning): no occasion for it can be missed. To find it, every sweep looks at the next LOOKED_AT
deliveries of the queue, state by state in the order of its index: a long queue makes warnings
later, not sweeps. A round that found nothing late also found out when the next delivery becomes
late. The next round begins then, or after a quarter of DELAY_WARNING, for what operators release.

A notice that fails has a `due_at` too, and is settled in the same way. If a server refused it and
it encloses something of the original, another notice with less is made from its text: the server
may have refused what it encloses (header_checks, body_checks, a virus filter), and the sender knows
that text already. Otherwise it is given up, and the log says so. No notice is made about a notice.

A client may name any address as the sender, so a notice about mail from a client that the policy
does not trust may go to a victim. It carries the header only; a sender gets at most one in LIMIT
seconds; and none is made about mail to our own postmaster, which every client may send (RFC 5321
4.5.1). `deliveries.dsn_withheld` says why a sender is not told.

What must stay true: the debt (or the mark) and the notice change in one transaction; nobody removes
a file but the attempt that made it, and only while its transaction cannot have been committed; the
original's body stays until then; nothing is owed to the null sender; a message that fails here (a
defect of ours, say) is put off and holds up no other.
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
from relay.queue.split import can_carry
from relay.queue.states import Outcome, ReasonSource, State
from relay.settings import Settings, unwanted
from relay.spool.retention import deletable_bodies
from relay.spool.store import BodyUnsendable, Spool

log = get_logger(__name__)
# How long a debt waits for the other deliveries of its message to be decided (seconds).
GATHER = 30
# Longer originals are returned as their header alone, unless RET=HDRS asked for that anyway
# (bytes).
LONGEST_RETURNED = 50_000
# How long a sender gets no second notice about mail from clients that are not trusted (seconds).
LIMIT = 60
# How long this process leaves a message alone that it could not make a notice about (seconds).
PUT_OFF = 60.0
# How many deliveries of the queue a sweep looks at for mail that is late.
LOOKED_AT = 1000

# One that is due far ahead was made before the database's clock was set back.
_DEBTORS = """SELECT queue_id FROM deliveries d
    WHERE d.state IN ('bounced', 'expired') AND d.due_at IS NOT NULL
      AND (d.due_at <= @now OR d.due_at > @later(:gather))
      AND (d.due_at <= @ago(:gather) OR NOT EXISTS (SELECT 1 FROM deliveries o
           WHERE o.queue_id = d.queue_id AND o.state IN ('queued', 'sending')))
      AND d.queue_id NOT IN (SELECT queue_id FROM @rows(:put_off; queue_id uuid))
    ORDER BY d.due_at LIMIT :most"""
# The message is locked too: its deliveries may wait for different sweepers.
_LOCK = """SELECT d.number FROM deliveries d JOIN messages m ON m.id = d.queue_id
    WHERE d.queue_id = @id(:id) AND {} ORDER BY d.number @skip_locked"""
_OWED = "state IN ('bounced', 'expired') AND due_at IS NOT NULL"
_WAITING = "state IN ('queued', 'sending', 'deferred')"
_WARNED = "(SELECT max(o.warned_at) FROM deliveries o WHERE o.queue_id = {}) IS NOT NULL"
# The next of the queue, how old each is, whether it is late and its sender wants to know and does
# not yet. A mark is on one delivery and speaks for the message: also for those that it is cut into
# later. These are scalar subqueries because PostgreSQL would answer EXISTS with a hash of whole
# tables.
_LOOK = f"""SELECT {{keys}}, d.age, d.age >= :late AND NOT {_WARNED.format("d.queue_id")}
        AND (SELECT m.sender NOT IN ('', '#@[]') FROM messages m WHERE m.id = d.queue_id)
        AND (SELECT count(*) FROM recipients r WHERE r.queue_id = d.queue_id AND r.delivery = d.number
             AND (r.notify IS NULL OR r.notify @like '%DELAY%')) > 0 AS late
    FROM (SELECT {{keys}}, (SELECT @since(m.received_at) FROM messages m WHERE m.id = queue_id) AS age
        FROM deliveries WHERE state = '{{state}}' {{behind}} ORDER BY {{keys}} LIMIT :most) d
    ORDER BY {{keys}}"""
# The states in which a delivery may be late, and the columns of the index of each.
_WALK = {State.DEFERRED: "due_at", State.QUEUED: "route, due_at", State.SENDING: "worker, due_at"}
_ABOUT = """SELECT @hex(m.id) AS id, m.sender, m.size, m.header_message_id, m.envid, m.ret,
        @micros(m.received_at) AS received_at, r.address, r.orcpt, r.notify, d.number, d.state, d.last_reply, d.reason_source,
        d.last_server, d.last_outcome, m.client_trusted, m.dsn_content, @hex(m.dsn_of) AS dsn_of,
        @micros(d.expires_at) AS expires_at,
        (SELECT @micros(max(a.finished_at)) FROM attempts a
         WHERE a.queue_id = d.queue_id AND a.delivery = d.number AND a.server IS NOT NULL) AS attempted_at
    FROM deliveries d JOIN messages m ON m.id = d.queue_id
    JOIN recipients r ON r.queue_id = d.queue_id AND r.delivery = d.number
    WHERE d.queue_id = @id(:id) ORDER BY r.position"""

# Which deliveries a server may have in spite of what else is said. Of a malformed reply it is known
# by what was sent whether it came after all of the request.
_DOUBTS = """SELECT d.number, d.parent, d.last_outcome = 'uncertain' OR EXISTS (SELECT 1 FROM attempts a
        WHERE a.queue_id = d.queue_id AND a.delivery = d.number
        AND (a.outcome = 'uncertain' OR (a.outcome = 'malformed' AND a.bytes_sent >= m.size)))
    FROM deliveries d JOIN messages m ON m.id = d.queue_id WHERE d.queue_id = @id(:id) ORDER BY d.number"""

# Whether a sender may get a notice now, which uses it up. The row is locked until the notice is
# committed, so that two workers do not both say yes. A time that lies ahead is one of a clock that
# has stepped back.
_LIMITED = """INSERT INTO dsn_limits (sender, last_at) VALUES (:sender, @now)
    ON CONFLICT (sender) DO UPDATE SET last_at = @now
    WHERE dsn_limits.last_at <= @ago(:limit) OR dsn_limits.last_at > @later(:limit)"""


class DsnGenerator:
    """Settles what is owed to senders. Used by one thread.

    `refused` is told of each D that was about us and not about the mail: the server's name and its
    words.
    """

    def __init__(
        self,
        engine: Engine,
        spool: Spool,
        settings: Settings,
        route_for: Callable[[str], str],
        refused: Callable[[str, str], None] = lambda server, reply: None,
    ) -> None:
        self._engine, self._spool, self._settings, self._route_for = (
            engine,
            spool,
            settings,
            route_for,
        )
        self._refused = refused
        self._sql = Statements(engine, gather=GATHER, limit=LIMIT)
        self._postmaster = {"postmaster", f"postmaster@{settings.hostname}".lower()}
        self._not_wanted = unwanted(settings)
        self._intake = Acceptor(engine, lifetime=settings.queue_lifetime, grace=settings.grace)
        # Where the round of `warn` is: the states that it has still to go through, the key of the
        # last delivery seen.
        self._states, self._behind = list(_WALK), tuple[Any, ...]()
        self._next_late = (
            math.inf
        )  # when the first delivery of this round becomes late, by `time.monotonic`
        self._next_round = 0.0
        self._put_off: dict[
            str, float
        ] = {}  # messages that failed here, until when by `time.monotonic`

    def settle(self, most: int) -> list[str]:
        """Make notices for at most `most` deliveries that owe one; the ids of the notices.

        Raises what hinders all of them: an outage of the database, a spool that takes nothing.
        """
        put_off = json.dumps([{"queue_id": dashed(queue_id)} for queue_id in self._left_alone()])
        with writing(self._engine) as connection:
            owing = self._sql.run(connection, _DEBTORS, most=most, put_off=put_off).scalars().all()
        return self._each(owing, Kind.BOUNCED)

    def warn(self, most: int) -> list[str]:
        """Warn the senders of at most `most` messages that are late; the ids of the warnings.
        Raises as `settle`."""
        limit = self._settings.delay_warning
        if limit is None or self._settings.bounces == "off" or time.monotonic() < self._next_round:
            return []
        late, left_alone = self._late(limit, most), self._left_alone()
        return self._each([key for key in late if _plain(key) not in left_alone], Kind.DELAYED)

    def _late(self, limit: float, most: int) -> dict[Any, None]:
        """Go on with the round; at most so many messages that are late, as the database spells
        their ids."""
        late: dict[Any, None] = {}
        left = LOOKED_AT
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
                self._behind = tuple(key)
            left -= len(rows)
            if left and self._state_done(limit):
                break
        return late

    def _next_rows(self, limit: float, most: int) -> Sequence[Any]:
        """The next deliveries of the round: a row is the columns of its key, its age, and whether
        it is late."""
        keys = f"{_WALK[self._states[0]]}, queue_id, number"
        given = {f"key{n}": value for n, value in enumerate(self._behind)}
        behind = f"AND ({keys}) > ({', '.join(f':{name}' for name in given)})" if given else ""
        sql = _LOOK.format(keys=keys, state=self._states[0], behind=behind)
        with reading(self._engine) as connection:
            rows: Sequence[Any] = self._sql.run(
                connection, sql, late=limit, most=most, **given
            ).all()
        return rows

    def _state_done(self, limit: float) -> bool:
        """Go on with the next state. True after the last one: then rest until something is late."""
        self._states, self._behind = self._states[1:], ()
        if self._states:
            return False
        self._next_round = min(self._next_late, time.monotonic() + limit / 4)
        self._states, self._next_late = list(_WALK), math.inf
        return True

    def _left_alone(self) -> set[str]:
        """Messages that failed here a moment ago: they would fail again, and others have not had
        their turn."""
        now = time.monotonic()
        self._put_off = {
            queue_id: until for queue_id, until in self._put_off.items() if until > now
        }
        return set(self._put_off)

    def _each(self, keys: Iterable[Any], kind: Kind) -> list[str]:
        """Make the notices about these messages, as the database spells their ids, each for itself;
        their ids."""
        made: list[str] = []
        for queue_id in dict.fromkeys(map(_plain, keys)):
            try:
                notice = self._about(queue_id, kind)
            except Exception as error:
                self._put_off[queue_id] = time.monotonic() + PUT_OFF
                if is_outage(error):
                    raise
                log.error("notice not made", id=queue_id, reason=first_line(error))
            else:
                made += [notice] if notice else []
        return made

    def _about(self, queue_id: str, kind: Kind) -> str | None:
        """Make the notice about one message, if nobody else is at it; its id, or None if there is
        nothing to say."""
        notice, committing = new_id(), False
        try:
            with writing(self._engine) as connection:
                tell = self._warn if kind is Kind.DELAYED else self._settle
                told = tell(connection, queue_id, notice)
                committing = True
        except Exception:
            if not committing:
                self._spool.remove(notice)
            raise
        # Not in the same transaction: whoever ends another delivery of it right now would not be
        # seen, nor see us.
        if kind is not Kind.DELAYED and deletable_bodies(self._engine, self._sql, [queue_id]):
            self._spool.remove(queue_id)
        if told:
            log.info("notice made", id=notice, **told)
        return notice if told else None

    def _settle(self, connection: Connection, queue_id: str, notice: str) -> dict[str, Any]:
        """Clear what is owed about a message, with a notice if somebody wants one; what the log
        says of it."""
        numbers = self._lock(connection, queue_id, _OWED)
        rows = [row for row in self._rows(connection, queue_id) if row["number"] in numbers]
        if not numbers or self._forgive(connection, queue_id, rows):
            return {}
        made: dict[str, Any] = {}
        wanted = (
            [row for row in rows if _wants(row, "FAILURE")]
            if self._settings.bounces != "off"
            else []
        )
        if wanted:
            told, withheld = self._allowed(connection, wanted)
            if told:
                self._make(connection, notice, told, kind=Kind.BOUNCED)
                made = {"about": queue_id, "recipients": len(told), "kind": str(Kind.BOUNCED)}
            if withheld:
                log.warning(
                    "notice withheld", id=queue_id, reason=str(withheld), kind=str(Kind.BOUNCED)
                )
            if silent := {row["number"] for row in wanted} - {row["number"] for row in told}:
                self._set(connection, queue_id, silent, f"dsn_withheld = '{withheld}'")
        elif rows and rows[0]["dsn_content"] and self._settings.bounces != "off":
            made = self._make_again(connection, notice, rows[0])
        self._set(connection, queue_id, numbers, "due_at = NULL")
        return made

    def _warn(self, connection: Connection, queue_id: str, notice: str) -> dict[str, Any]:
        """Warn of what is unfinished of a message; what the log says of it."""
        numbers = self._lock(connection, queue_id, _WAITING)
        warned = f"SELECT {_WARNED.format('@id(:id)')}"
        if not numbers or self._sql.run(connection, warned, id=dashed(queue_id)).scalar():
            return {}
        # Also what a worker has locked at this moment: there will be no second warning.
        rows = [
            row
            for row in self._rows(connection, queue_id)
            if row["state"] in ("queued", "sending", "deferred")
        ]
        wanted = [row for row in rows if _wants(row, "DELAY")]
        if not wanted:
            return {}
        told, withheld = self._allowed(connection, wanted)
        if withheld:
            log.warning(
                "notice withheld", id=queue_id, reason=str(withheld), kind=str(Kind.DELAYED)
            )
        # A warning that is withheld is not made later either, or every sweep would ask about it
        # again.
        self._set(connection, queue_id, numbers, "warned_at = @now")
        if not told:
            return {}
        self._make(connection, notice, told, kind=Kind.DELAYED)
        return {"about": queue_id, "recipients": len(told), "kind": str(Kind.DELAYED)}

    def _lock(self, connection: Connection, queue_id: str, which: str) -> set[int]:
        """Lock such deliveries of a message, and the message; the numbers of what nobody else has
        locked."""
        return set(self._sql.run(connection, _LOCK.format(which), id=dashed(queue_id)).scalars())

    def _rows(self, connection: Connection, queue_id: str) -> Sequence[Any]:
        """What can be told of each recipient of a message."""
        found: Sequence[Any] = (
            self._sql.run(connection, _ABOUT, id=dashed(queue_id)).mappings().all()
        )
        return found

    def _allowed(
        self, connection: Connection, rows: Sequence[Any]
    ) -> tuple[Sequence[Any], Withheld | None]:
        """Those of these recipients of a message that its sender may be told of now, and why not of
        the others."""
        sender = rows[0]["sender"]
        if not can_carry(sender):
            return [], Withheld.ADDRESS
        if not _is_strangers(rows[0]):
            return rows, None
        told = [row for row in rows if row["address"].lower() not in self._postmaster]
        if not told:
            return [], Withheld.POSTMASTER
        if not self._sql.run(connection, _LIMITED, sender=sender.lower()).rowcount:
            return [], Withheld.RATE
        return told, Withheld.POSTMASTER if len(told) < len(rows) else None

    def _forgive(self, connection: Connection, queue_id: str, rows: Sequence[Any]) -> bool:
        """Defer again what a server refused for our sake and not the mail's; True if there was
        any."""
        about_us = {
            row["number"]: row for row in rows
            if _is_refused(row) and self._not_wanted.search(row["last_reply"] or "")
        }  # fmt: skip
        for number, row in sorted(about_us.items()):
            self._sql.run(
                connection,
                """-- event: reclassified
                UPDATE deliveries SET state = 'deferred', due_at = @later(:gather), finished_at = NULL
                WHERE queue_id = @id(:id) AND number = :number AND state = 'bounced'""",
                id=dashed(queue_id),
                number=number,
            )
            log.critical(
                "refused for our sake, deferred again", id=queue_id, reply=row["last_reply"]
            )
            if row["last_server"]:
                self._refused(row["last_server"], row["last_reply"])
        return bool(about_us)

    def _make(
        self, connection: Connection, notice: str, rows: Sequence[Any], *, kind: Kind
    ) -> None:
        """Make a notice about these recipients of a message."""
        first, delayed = rows[0], kind is Kind.DELAYED
        original = Original(
            first["id"],
            first["sender"],
            _moment(first["received_at"]),
            first["header_message_id"],
            first["envid"],
        )
        doubtful = self._doubtful(connection, first["id"])
        failures = [
            Failure(
                row["address"], row["orcpt"], Kind.DELAYED if delayed else Kind(row["state"]), row["last_reply"] or "",
                row["last_server"], _moment(row["attempted_at"]) if row["attempted_at"] else None,
                _moment(row["expires_at"]), row["last_outcome"], row["reason_source"], row["number"] in doubtful,
            )
            for row in rows
        ]  # fmt: skip
        whole = not delayed and first["ret"] != "HDRS"  # is what the sender may expect
        full = whole and first["size"] <= LONGEST_RETURNED and not _is_strangers(first)
        content = self._content(first["id"], first["size"], full=full)
        left_out = ""
        if content is None:
            left_out = "Your message could not be read again, and is not returned."
        elif whole and first["size"] > LONGEST_RETURNED:
            left_out = f"Only its header is returned: the message is longer than {LONGEST_RETURNED:,} bytes."
        text = compose(
            notice,
            self._settings.hostname,
            datetime.now(UTC),
            original,
            failures,
            content,
            full=full,
            left_out=left_out,
        )
        enclosed = (
            Enclosure.NONE if content is None else Enclosure.FULL if full else Enclosure.HEADER
        )
        self._put(connection, notice, text, first["sender"], about=first["id"], content=enclosed)

    def _make_again(self, connection: Connection, notice: str, failed: Any) -> dict[str, Any]:
        """A notice failed: make it again with less of the original, or give it up; what the log
        says of the new one."""
        text, less = None, Enclosure(failed["dsn_content"]).less
        if _is_refused(failed) and less:
            try:
                with os.fdopen(self._spool.open(failed["id"], failed["size"]), "rb") as body:
                    text = reduced(body.read(), failed["id"], notice, less)
            except (
                BodyUnsendable
            ) as error:  # a fault of the disk is no reason: it is raised, and the attempt repeated
                log.warning("notice not read", id=failed["id"], reason=str(error))
        if text is None or less is None:
            log.error(
                "notice given up",
                id=failed["id"],
                about=failed["dsn_of"],
                reply=failed["last_reply"],
            )
            return {}
        self._put(connection, notice, text, failed["address"], about=failed["dsn_of"], content=less)
        return {"about": failed["dsn_of"], "instead_of": failed["id"], "content": str(less)}

    def _put(
        self,
        connection: Connection,
        notice: str,
        text: bytes,
        address: str,
        *,
        about: str,
        content: Enclosure,
    ) -> None:
        """Write the body, then insert the message; the caller's transaction makes both true or
        neither."""
        size = self._spool.store(notice, [text])
        recipient = NewRecipient(address, notify="NEVER", route=self._route_for(address))
        message = NewMessage(
            notice, "", size, [recipient], "", self._settings.hostname, "NOTICE",
            header_message_id=f"<{notice}@{self._settings.hostname}>", dsn_of=about,
            body_type="7BIT" if text.isascii() else "8BITMIME", dsn_content=content,
        )  # fmt: skip
        self._intake.insert(connection, [message])

    def _doubtful(self, connection: Connection, queue_id: str) -> set[int]:
        """Deliveries of a message that may have arrived, themselves or as a part of what they were
        cut from."""
        found: set[int] = set()
        for number, parent, doubt in self._sql.run(connection, _DOUBTS, id=dashed(queue_id)):
            if doubt or parent in found:  # a parent has the smaller number
                found.add(number)
        return found

    def _content(self, queue_id: str, size: int, *, full: bool) -> bytes | None:
        """The original or its header, bounded; None if the body is not there."""
        try:
            with os.fdopen(self._spool.open(queue_id, size), "rb") as body:
                text = body.read(LONGEST_RETURNED)
        except (BodyUnsendable, OSError) as error:
            log.warning("original not returned", id=queue_id, reason=str(error))
            return None
        if full:
            return text
        header = text.partition(b"\n\n")[0]
        return (
            header[: header.rfind(b"\n") + 1] if len(header) == LONGEST_RETURNED else header + b"\n"
        )

    def _set(self, connection: Connection, queue_id: str, numbers: set[int], what: str) -> None:
        """Clear the debt of deliveries that we have locked, or mark them as warned of."""
        listed = ", ".join(str(int(number)) for number in sorted(numbers))
        sql = f"UPDATE deliveries SET {what} WHERE queue_id = @id(:id) AND number IN ({listed})"
        self._sql.run(connection, sql, id=dashed(queue_id))


def _wants(row: Any, what: str) -> bool:
    """Whether the sender asked to hear of this recipient's FAILURE or DELAY (RFC 3461 4.1), and can
    be told."""
    asked = row["notify"] is None or what in row["notify"].upper().split(",")
    return asked and row["sender"] not in ("", "#@[]")


def _is_refused(row: Any) -> bool:
    """Whether it bounced because a server replied D. An operator or a bad envelope is not that."""
    found = (row["state"], row["last_outcome"], row["reason_source"])
    return found == (State.BOUNCED, Outcome.REJECTED, ReasonSource.SERVER)


def _is_strangers(row: Any) -> bool:
    """Whether the message came from a client that the policy does not trust; older rows do not
    say."""
    return row["client_trusted"] is not None and not row["client_trusted"]


def _plain(key: object) -> str:
    """An id as the database spells it, in 32 digits."""
    return str(key).replace("-", "")


def _moment(micros: Any) -> datetime:
    return datetime.fromtimestamp(int(micros) / 1e6, UTC)
