"""Debts: notices that are owed, each made exactly once.

A debt is made by the transaction that makes a delivery `bounced` or `expired`: its `due_at` stays until the notice
exists. Whoever settles one locks the deliveries, writes the notice's body, and in the same transaction inserts the
notice as a message like any other and clears the debt. The notice's id is derived from what it is about: after a kill
-9 anywhere the next one to come finds the debt, makes the same id again, and replaces the file that was left.

Recipients of one message that failed together stand in one notice: while another delivery of it is about to be
decided, its debt waits a little. A warning about delayed mail is no debt and is made once a message, when it is retried
after DELAY_WARNING.

What must stay true: the debt and the notice change in one transaction; the original's body stays until then; nothing is
owed to the null sender.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Engine

from relay.bodies import BodyUnsendable, Spool
from relay.database import Statements, writing
from relay.ids import dashed
from relay.intake import Intake, NewMessage, NewRecipient
from relay.log import get_logger
from relay.needs import unneeded
from relay.notices import BY_OPERATOR, Failure, Kind, Original, compose
from relay.settings import Settings, unwanted

log = get_logger(__name__)
# How long a debt waits for the other deliveries of its message to be decided (seconds).
GATHER = 30
# Longer originals are returned as their header alone, unless RET=HDRS asked for that anyway (bytes).
LONGEST_RETURNED = 50_000

_DEBTORS = """SELECT message_id FROM deliveries d
    WHERE d.state IN ('bounced', 'expired') AND d.due_at <= @now
      AND (d.due_at <= @ago(:gather) OR NOT EXISTS (SELECT 1 FROM deliveries o
           WHERE o.message_id = d.message_id AND o.state IN ('queued', 'sending')))
    ORDER BY d.due_at LIMIT :most"""
# The message is locked too: its deliveries may wait for different sweepers, and a warning has one id for all of them.
_LOCK = """SELECT d.number FROM deliveries d JOIN messages m ON m.id = d.message_id
    WHERE d.message_id = @id(:id) AND {} ORDER BY d.number @skip_locked"""
_OWED = "state IN ('bounced', 'expired') AND due_at IS NOT NULL"
_ABOUT = """SELECT @hex(m.id) AS id, m.sender, m.size, m.header_message_id, m.envid, m.ret,
        @micros(m.received_at) AS received_at, r.address, r.orcpt, r.notify, d.number, d.state, d.last_reply,
        d.last_server,
        @micros(d.expires_at) AS expires_at, @micros(coalesce(d.finished_at, @now)) AS finished_at,
        (SELECT @micros(max(a.finished_at)) FROM attempts a
         WHERE a.message_id = d.message_id AND a.delivery = d.number AND a.server IS NOT NULL) AS attempted_at
    FROM deliveries d JOIN messages m ON m.id = d.message_id
    JOIN recipients r ON r.message_id = d.message_id AND r.delivery = d.number
    WHERE d.message_id = @id(:id) ORDER BY r.position"""


class Debts:
    """Settles what is owed to senders. Used by one thread.

    `refused` is told of each D that was about us and not about the mail: the server's name and its words.
    """

    def __init__(
        self,
        engine: Engine,
        spool: Spool,
        settings: Settings,
        route_for: Callable[[str], str],
        refused: Callable[[str, str], None] = lambda server, reply: None,
    ) -> None:
        self._engine, self._spool, self._settings, self._route_for = engine, spool, settings, route_for
        self._refused = refused
        self._sql = Statements(engine, gather=GATHER)
        self._not_wanted = unwanted(settings)
        self._intake = Intake(engine, lifetime=settings.queue_lifetime, grace=settings.grace)

    def settle(self, most: int) -> list[str]:
        """Make notices for at most `most` messages; the ids of the notices."""
        with writing(self._engine) as connection:
            owing = list(dict.fromkeys(row[0] for row in self._sql.run(connection, _DEBTORS, most=most)))
        made = [self._about(str(message_id).replace("-", ""), Kind.BOUNCED) for message_id in owing]
        return [notice for notice in made if notice]

    def warn(self, ids: Iterable[str]) -> list[str]:
        """Make warnings for those of these messages that are old enough and have none yet; the ids of the warnings."""
        if self._settings.delay_warning is None or self._settings.bounces == "off":
            return []
        oldest = (datetime.now(UTC).timestamp() - self._settings.delay_warning) * 1000
        late = [message_id for message_id in ids if int(message_id[:12], 16) <= oldest]
        made = [self._about(message_id, Kind.DELAYED) for message_id in late]
        return [notice for notice in made if notice]

    def _about(self, message_id: str, kind: Kind) -> str | None:
        """Make the notice about one message, if nobody else is at it; its id, or None if there is nothing to say."""
        delayed = kind is Kind.DELAYED
        with writing(self._engine) as connection:
            which = "state IN ('queued', 'sending', 'deferred')" if delayed else _OWED
            numbers = {row[0] for row in self._sql.run(connection, _LOCK.format(which), id=dashed(message_id))}
            rows = [
                r for r in self._sql.run(connection, _ABOUT, id=dashed(message_id)).mappings() if r["number"] in numbers
            ]
            if not rows:
                return None
            if not delayed and self._forgive(connection, message_id, rows):
                return None
            told = [row for row in rows if _wants(row["notify"], delayed=delayed)]
            notice = _derived(message_id, "delay" if delayed else sorted(numbers), rows)
            nobody = rows[0]["sender"] in ("", "#@[]") or self._settings.bounces == "off"
            making = told and not nobody and not (delayed and self._exists(connection, notice))
            if making:
                self._make(connection, notice, told, delayed=delayed)
            if not delayed:
                self._clear(connection, message_id, numbers)
        # Not in the same transaction: whoever ends another delivery of it right now would not be seen, nor see us.
        if not delayed and unneeded(self._engine, self._sql, [message_id]):
            self._spool.remove(message_id)
        if making:
            log.info("notice made", id=notice, about=message_id, recipients=len(told), kind=str(kind))
        return notice if making else None

    def _forgive(self, connection: Connection, message_id: str, rows: Sequence[Any]) -> bool:
        """Defer again what a server refused for our sake and not the mail's; True if there was any."""
        about_us = {
            row["number"]: row for row in rows
            if row["state"] == "bounced" and self._about_us(row["last_reply"] or "")
        }  # fmt: skip
        for number, row in sorted(about_us.items()):
            self._sql.run(
                connection,
                """UPDATE deliveries SET state = 'deferred', due_at = @later(:gather), finished_at = NULL
                WHERE message_id = @id(:id) AND number = :number AND state = 'bounced'""",
                id=dashed(message_id),
                number=number,
            )
            log.critical("refused for our sake, deferred again", id=message_id, reply=row["last_reply"])
            if row["last_server"]:
                self._refused(row["last_server"], row["last_reply"])
        return bool(about_us)

    def _about_us(self, reply: str) -> bool:
        return not reply.startswith(BY_OPERATOR) and self._not_wanted.search(reply) is not None

    def _exists(self, connection: Connection, message_id: str) -> bool:
        sql = "SELECT 1 FROM messages WHERE id = @id(:id)"
        return self._sql.run(connection, sql, id=dashed(message_id)).first() is not None

    def _make(self, connection: Connection, notice: str, rows: Sequence[Any], *, delayed: bool) -> None:
        """Write the body, then insert the message; the caller's transaction makes both true or neither."""
        first = rows[0]
        original = Original(
            first["id"], first["sender"], _moment(first["received_at"]), first["header_message_id"], first["envid"]
        )
        failures = [
            Failure(
                row["address"], row["orcpt"], Kind.DELAYED if delayed else Kind(row["state"]), row["last_reply"] or "",
                row["last_server"], _moment(row["attempted_at"]) if row["attempted_at"] else None,
                _moment(row["expires_at"]),
            )
            for row in rows
        ]  # fmt: skip
        full = not delayed and first["ret"] != "HDRS" and first["size"] <= LONGEST_RETURNED
        content = self._content(first["id"], first["size"], full=full)
        text = compose(notice, self._settings.hostname, datetime.now(UTC), original, failures, content, full=full)
        self._spool.remove(notice)  # left by somebody who was killed here: nobody else has the debt
        size = self._spool.store(notice, [text])
        recipient = NewRecipient(first["sender"], notify="NEVER", route=self._route_for(first["sender"]))
        message = NewMessage(
            notice, "", size, [recipient], "", self._settings.hostname, "NOTICE",
            header_message_id=f"<{notice}@{self._settings.hostname}>", notice_of=first["id"],
            body_type="7BIT" if text.isascii() else "8BITMIME",
        )  # fmt: skip
        self._intake.insert(connection, [message])

    def _content(self, message_id: str, size: int, *, full: bool) -> bytes | None:
        """The original or its header, bounded; None if the body is not there."""
        try:
            handle = self._spool.open(message_id, size)
        except (BodyUnsendable, OSError) as error:
            log.warning("original not returned", id=message_id, reason=str(error))
            return None
        with os.fdopen(handle, "rb") as body:
            text = body.read(LONGEST_RETURNED)
        if full:
            return text
        header = text.partition(b"\n\n")[0]
        return header[: header.rfind(b"\n") + 1] if len(header) == LONGEST_RETURNED else header + b"\n"

    def _clear(self, connection: Connection, message_id: str, numbers: set[int]) -> None:
        """Clear the debt."""
        listed = ", ".join(str(int(number)) for number in sorted(numbers))
        self._sql.run(
            connection,
            f"UPDATE deliveries SET due_at = NULL WHERE message_id = @id(:id) AND number IN ({listed})",
            id=dashed(message_id),
        )


def _wants(notify: str | None, *, delayed: bool) -> bool:
    """Whether the sender asked to hear of this recipient's failure or delay (RFC 3461 4.1)."""
    return notify is None or ("DELAY" if delayed else "FAILURE") in notify.upper().split(",")


def _derived(message_id: str, about: object, rows: Sequence[Any]) -> str:
    """The only id that this notice can have: a UUIDv7 of when it came about and a hash of what it is about."""
    when = rows[0]["received_at"] if about == "delay" else max(row["finished_at"] for row in rows)
    chance = int.from_bytes(hashlib.sha256(f"{message_id} {about}".encode()).digest()[:10])
    stamp = int(when) // 1000
    value = stamp << 80 | 0x7 << 76 | (chance >> 68) << 64 | 0b10 << 62 | chance & (1 << 62) - 1
    return f"{value:032x}"


def _moment(micros: Any) -> datetime:
    return datetime.fromtimestamp(int(micros) / 1e6, UTC)
