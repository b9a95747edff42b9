"""Generates the DSNs that are pending and the delay warnings, each exactly once.

The transaction that makes a delivery `bounced` or `expired` sets its `due_at`: a DSN is pending.
Acceptance sets `warn_at`. The generator locks the deliveries, writes the body of the DSN, and in
the same transaction inserts the DSN as a message and clears `due_at` or `warn_at`. Each attempt has
a queue id, and so a file, of its own. Before the COMMIT a failed attempt removes its file. After an
uncertain COMMIT the file stays: it is the body of a message, or an orphan.

What must stay true: `due_at` (or `warn_at`) and the DSN change in one transaction; only the attempt
that made a file removes it, and only while its transaction cannot have been committed; no DSN goes
to the null sender; a message that fails here delays no other message.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Engine

from relay.db.engine import is_outage, reading, writing
from relay.db.sql import Queries
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
from relay.queue.accept import Acceptor, NewMessage, NewRecipient, encode
from relay.queue.outcome import Outcome
from relay.queue.split import can_carry
from relay.queue.states import ReasonSource
from relay.settings import Settings, unauthorized_pattern
from relay.spool.bodies import Bodies, BodyMisplaced
from relay.spool.damaged_bodies import DamagedBodies
from relay.spool.journal.format import Place
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

# Builds the DSN about a message: (connection, id of the DSN, numbers of the deliveries that the
# transaction has locked, message, all its recipients) -> fields for the log, empty without a DSN.
type Build = Callable[[Connection, str, set[int], Original, list[Failure]], dict[str, Any]]


class DsnGenerator:
    """Generates DSNs and delay warnings. Used by one thread.

    `unauthorized` is called with the server's name and reply for each D that was about this relay
    and not about the mail.
    """

    def __init__(
        self,
        engine: Engine,
        spool: Spool,
        settings: Settings,
        route_for: Callable[[str], str],
        unauthorized: Callable[[str, str], None] = lambda server, reply: None,
    ) -> None:
        self._engine = engine
        self._spool = spool
        self._bodies = Bodies(spool, engine)
        self._settings = settings
        self._route_for = route_for
        self._report_unauthorized = unauthorized
        self._queries = Queries(engine, __name__, gather=GATHER, limit=LIMIT)
        self._postmaster = {"postmaster", f"postmaster@{settings.hostname}".lower()}
        self._unauthorized = unauthorized_pattern(settings)
        self._acceptor = Acceptor(engine, lifetime=settings.queue_lifetime, grace=settings.grace)
        self._damaged_bodies = DamagedBodies()
        # Messages that failed here, each with the time of its next try (`time.monotonic`).
        self._put_off: dict[str, float] = {}

    def generate(self, most: int) -> list[str]:
        """Generate the DSNs of at most `most` deliveries; the queue ids of the DSNs.

        Raises the errors that stop all of them: an outage of the database, a spool that cannot be
        written.
        """
        return self._generate_each("pending", "lock_pending", most, self._bounce)

    def warn(self, most: int) -> list[str]:
        """Warn the senders of at most `most` late messages; the queue ids of the warnings.

        Late is a delivery that is unfinished, not held, and past its `warn_at` by the database's
        clock. Raises as `generate`.
        """
        if self._settings.delay_warning is None or self._settings.bounces == "off":
            return []
        return self._generate_each("late", "lock_unfinished", most, self._warning)

    def _generate_each(self, select: str, lock: str, most: int, build: Build) -> list[str]:
        """Generate a DSN about each message that the statement `select` gives, in a transaction
        each; their queue ids. Deliveries that another worker has locked are left to it."""
        # Without a pause the messages that failed a moment ago would take the turn of others.
        now = time.monotonic()
        self._put_off = {key: until for key, until in self._put_off.items() if until > now}
        put_off = json.dumps([dashed(queue_id) for queue_id in self._put_off])
        with reading(self._engine) as connection:
            selected = self._queries.run(connection, select, most=most, put_off=put_off)
            ids = dict.fromkeys(selected.scalars())
        generated: list[str] = []
        for queue_id in ids:
            dsn_id = new_id()
            committing = False
            try:
                with writing(self._engine) as connection:
                    locked = self._queries.run(connection, lock, id=dashed(queue_id)).scalars()
                    fields: dict[str, Any] = {}
                    if numbers := set(locked):
                        message = self._read(connection, queue_id)
                        fields = build(connection, dsn_id, numbers, *message)
                    committing = True
                # Two transactions that finish the last two deliveries cannot see each other, so the
                # rows are checked again after the COMMIT.
                if deletable_bodies(self._engine, [queue_id]):
                    self._spool.remove(queue_id)
            except Exception as error:
                self._put_off[queue_id] = time.monotonic() + PUT_OFF
                if not committing:
                    self._spool.remove(dsn_id)
                if is_outage(error):
                    raise
                log.error("dsn failed", id=queue_id, reason=first_line(error))
            else:
                if fields:
                    log.info("dsn generated", id=dsn_id, **fields)
                    generated.append(dsn_id)
        return generated

    def _read(self, connection: Connection, queue_id: str) -> tuple[Original, list[Failure]]:
        """A message, and each of its recipients with the delivery that it has now."""
        key = dashed(queue_id)
        row = {**self._queries.run(connection, "original", id=key).mappings().one()}
        segment, position = row.pop("segment"), row.pop("position")
        place = Place(segment, position) if segment else None
        original = Original(**{**row, "received_at": _utc(row["received_at"]), "place": place})
        recipients = []
        for row in self._queries.run(connection, "recipients", id=key).mappings():
            kind = Kind(row["kind"]) if row["kind"] else None
            times = {name: row[name] and _utc(row[name]) for name in ("attempted_at", "expires_at")}
            recipients.append(Failure(**{**row, "kind": kind, **times}))
        return original, recipients

    def _bounce(
        self,
        connection: Connection,
        dsn_id: str,
        numbers: set[int],
        original: Original,
        recipients: list[Failure],
    ) -> dict[str, Any]:
        """Build the DSN that is pending about a message, if its sender wants one."""
        failed = [one for one in recipients if one.number in numbers]
        if self._reclassify(connection, original, failed):
            return {}
        fields: dict[str, Any] = {}
        if failed and self._settings.bounces != "off":
            if wanted := [one for one in failed if _wants(original, one, "FAILURE")]:
                fields = self._build(connection, dsn_id, original, wanted, Kind.BOUNCED)
            elif original.dsn_content:
                enclosed = Enclosure(original.dsn_content)
                fields = self._rebuild(connection, dsn_id, original, failed[0], enclosed)
        self._change(connection, "clear_pending", original.id, numbers)
        return fields

    def _warning(
        self,
        connection: Connection,
        dsn_id: str,
        numbers: set[int],
        original: Original,
        recipients: list[Failure],
    ) -> dict[str, Any]:
        """Build the delay warning about a message, if it is the first and its sender wants it.

        Deliveries that another worker has locked belong to it too: there is no second warning. One
        that is withheld is not due again either, but its deliveries are not marked as warned.
        """
        waiting = [one for one in recipients if one.kind is Kind.DELAYED]
        wanted = [one for one in waiting if _wants(original, one, "DELAY")]
        due = bool(wanted) and not any(one.warned for one in recipients)
        fields: dict[str, Any] = {}
        if due:
            fields = self._build(connection, dsn_id, original, wanted, Kind.DELAYED)
        self._change(connection, "clear_warning", original.id, numbers, warned=bool(fields))
        return fields

    def _allowed(
        self, connection: Connection, original: Original, recipients: Sequence[Failure]
    ) -> tuple[Sequence[Failure], Withheld | None]:
        """The recipients that a DSN may report to the sender now, and why the others are left out.

        Every client may write to the relay's own postmaster (RFC 5321 4.5.1), so an untrusted
        client gets no DSN about that.
        """
        # `list-@host-@[]` stands for a sender for each recipient, which a server of qmail makes.
        if not can_carry(original.sender) or original.sender.endswith("-@[]"):
            return [], Withheld.ADDRESS
        if not original.from_untrusted_client:
            return recipients, None
        reported = [one for one in recipients if one.address.lower() not in self._postmaster]
        if not reported:
            return [], Withheld.POSTMASTER
        sender = original.sender.lower()
        if not self._queries.run(connection, "take_turn", sender=sender).rowcount:
            return [], Withheld.RATE
        return reported, Withheld.POSTMASTER if len(reported) < len(recipients) else None

    def _reclassify(
        self, connection: Connection, original: Original, failed: Sequence[Failure]
    ) -> bool:
        """Defer deliveries again whose D was about this relay and not about the mail; whether there
        were any."""
        about_us = {
            one.number: one
            for one in failed
            if _is_rejected(one) and self._unauthorized.search(one.reply)
        }
        if about_us:
            self._change(connection, "reclassify", original.id, about_us)
        for _, one in sorted(about_us.items()):
            log.critical("unauthorized reply reclassified", id=original.id, reply=one.reply)
            if one.server:
                self._report_unauthorized(one.server, one.reply)
        return bool(about_us)

    def _build(
        self,
        connection: Connection,
        dsn_id: str,
        original: Original,
        recipients: Sequence[Failure],
        kind: Kind,
    ) -> dict[str, Any]:
        """Build a DSN about these recipients of a message, as far as it may report them."""
        reported, withheld = self._allowed(connection, original, recipients)
        if withheld:
            log.warning("dsn withheld", id=original.id, reason=str(withheld), kind=str(kind))
        unreported = {one.number for one in recipients} - {one.number for one in reported}
        if unreported and kind is not Kind.DELAYED:
            self._change(connection, "withhold", original.id, unreported, withheld=withheld)
        if not reported:
            return {}
        enclosure, content, left_out = self._enclosed(original, kind)
        text = compose(
            dsn_id,
            self._settings.hostname,
            datetime.now(UTC),
            original,
            reported,
            content,
            full=enclosure is Enclosure.FULL,
            left_out=left_out,
        )
        self._insert(connection, dsn_id, text, original.sender, original.id, enclosure)
        return {"about": original.id, "recipients": len(reported), "kind": str(kind)}

    def _enclosed(self, original: Original, kind: Kind) -> tuple[Enclosure, bytes | None, str]:
        """The part of the original that a DSN encloses, its bytes (None if it cannot be read), and
        a sentence that says what is missing and why."""
        # The sender expects the whole message, unless it asked for less (RET=HDRS, RFC 3461 4.3).
        whole = kind is not Kind.DELAYED and original.ret != "HDRS"
        too_long = whole and original.size > LONGEST_RETURNED
        enclosure = Enclosure.HEADER
        if whole and not too_long and not original.from_untrusted_client:
            enclosure = Enclosure.FULL
        content = self._content(original, enclosure)
        if content is None:
            text = "Your message could not be read again, and is not returned."
            return Enclosure.NONE, None, text
        if too_long:
            text = (
                "Only its header is returned: the message is longer than"
                f" {LONGEST_RETURNED:,} bytes."
            )
            return enclosure, content, text
        return enclosure, content, ""

    def _rebuild(
        self,
        connection: Connection,
        dsn_id: str,
        failed: Original,
        failure: Failure,
        enclosed: Enclosure,
    ) -> dict[str, Any]:
        """Build a DSN again after it failed.

        A server may have rejected it for the part of the original that it encloses (header_checks,
        body_checks, a virus filter), so it is built again with less of that. If nothing is left to
        leave out, or it failed for another reason, it is given up. So is one that the disk could
        not read, if it cannot read it a minute later: BodyMisplaced means that it is tried again.
        """
        text = None
        about = str(failed.dsn_of)
        less = enclosed.less
        if _is_rejected(failure) and less:
            try:
                body = self._bodies.read(failed.id, failed.size, failed.place)
                text = reduced(body, failed.id, dsn_id, less)
            except BodyUnsendable as error:
                if isinstance(error, BodyMisplaced) and not self._damaged_bodies.confirmed(
                    failed.id, error.place
                ):
                    raise
                log.warning("rejected dsn not readable", id=failed.id, reason=str(error))
        if text is None or less is None:
            log.error("dsn given up", id=failed.id, about=about, reply=failure.reply)
            return {}
        self._insert(connection, dsn_id, text, failure.address, about, less)
        return {"about": about, "instead_of": failed.id, "content": str(less)}

    def _insert(
        self,
        connection: Connection,
        dsn_id: str,
        text: bytes,
        address: str,
        about: str,
        content: Enclosure,
    ) -> None:
        """Store the body with its envelope, then insert the message in the caller's transaction."""
        message = NewMessage(
            dsn_id,
            "",
            len(text),
            [NewRecipient(address, notify="NEVER", route=self._route_for(address))],
            "",
            self._settings.hostname,
            "DSN",
            header_message_id=f"<{dsn_id}@{self._settings.hostname}>",
            dsn_of=about,
            body_type="7BIT" if text.isascii() else "8BITMIME",
            dsn_content=content,
        )
        self._spool.store(dsn_id, [text], encode(message))
        self._acceptor.insert(connection, [message])

    def _content(self, original: Original, enclosure: Enclosure) -> bytes | None:
        """The original or its header, at most LONGEST_RETURNED bytes; None if it cannot be read."""
        try:
            with self._bodies.stream(original.id, original.size, original.place) as body:
                prefix = (original.prefix or "").encode()
                text = prefix + body.read(LONGEST_RETURNED - len(prefix))
        except (BodyUnsendable, OSError) as error:
            log.warning("original not returned", id=original.id, reason=str(error))
            return None
        if enclosure is Enclosure.FULL:
            return text
        header = text.partition(b"\n\n")[0]
        if len(header) == LONGEST_RETURNED:  # cut at the last whole line
            return header[: header.rfind(b"\n") + 1]
        return header + b"\n"

    def _change(
        self, connection: Connection, name: str, queue_id: str, numbers: Iterable[int], **more: Any
    ) -> None:
        """Run an UPDATE of deliveries that this transaction has locked."""
        listed = json.dumps(sorted(numbers))
        self._queries.run(connection, name, id=dashed(queue_id), numbers=listed, **more)


def _wants(original: Original, recipient: Failure, event: str) -> bool:
    """Whether the sender asked for DSNs of this kind about this recipient (RFC 3461 4.1)."""
    asked = recipient.notify is None or event in recipient.notify.upper().split(",")
    return asked and original.sender not in ("", "#@[]")


def _is_rejected(failure: Failure) -> bool:
    """Whether it bounced because a server replied D; not an operator, and not an address that
    cannot be sent."""
    found = (failure.kind, failure.outcome, failure.reason_source)
    return found == (Kind.BOUNCED, Outcome.REJECTED, ReasonSource.SERVER)


def _utc(micros: int) -> datetime:
    return datetime.fromtimestamp(micros / 1e6, UTC)
