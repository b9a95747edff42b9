"""What commands answer about an id that has no rows: the journal may know the message.

`journal_answers` wraps what looks an id up. A message in the journal that has no rows yet becomes
`NotInDatabase`, whose text says what the journal knows; while the database is away, every message
of the journal does. What must stay true: an id that the journal does not know gives the error that
it gave without the journal.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from commands.errors import NOTHING_MATCHED, OUT_OF_REACH, CommandError, explanation
from commands.output import span
from relay.db.engine import connect, is_outage
from relay.queue.uncommitted import UncommittedMessage, uncommitted
from relay.report.queries import NoSuchMessage, QueueReader
from relay.report.rows import Row
from relay.settings import Settings
from relay.spool.store import Spool

NOT_YET = "accepted, not yet in the database"
IN_JOURNAL = "in the journal; only the database knows more, and it is out of reach"


class NotInDatabase(CommandError):
    """The journal has the message. `away`: the database is out of reach, and may know more."""

    def __init__(self, messages: list[UncommittedMessage], away: str) -> None:
        text = "\n".join(sentence(message, away=bool(away)) for message in messages)
        super().__init__(OUT_OF_REACH if away else NOTHING_MATCHED, f"{text}\n{away}".strip())
        self.rows = [as_row(message, away=bool(away)) for message in messages]
        self.away = away


@contextmanager
def journal_answers(settings: Settings, text: str | None) -> Iterator[None]:
    """Raise NotInDatabase for an id (its whole, or its end) that is only in the journal."""
    try:
        yield
    except NoSuchMessage:
        if found := _found(settings, text, away=False):
            raise NotInDatabase(found, "") from None
        raise
    except Exception as error:
        if is_outage(error) and (found := _found(settings, text, away=True)):
            raise NotInDatabase(found, explanation(error)[1]) from None
        raise


def _found(settings: Settings, text: str | None, *, away: bool) -> list[UncommittedMessage]:
    digits = (text or "").replace("-", "").lower()
    if not re.fullmatch(r"[0-9a-f]{4,32}", digits):
        return []
    with suppress(OSError):
        spool = Spool(settings.spool_dir)
        if not spool.identity:
            return []
        if away:
            return uncommitted(spool, digits, None)
        engine = connect(settings.database_url)
        try:
            return uncommitted(spool, digits, QueueReader(engine).segments())
        finally:
            engine.dispose()
    return []


def as_row(message: UncommittedMessage, *, away: bool) -> Row:
    """The message for --json."""
    envelope = message.envelope
    return {
        "queue_id": envelope.queue_id,
        "state": None if away else "accepted",
        "sender": envelope.sender,
        "recipients": list(envelope.recipients),
        "size": envelope.size,
        "seconds": round(max(0.0, time.time() - message.written_at), 3),
        "segment": message.segment,
        "position": message.position,
        "why": IN_JOURNAL if away else NOT_YET,
    }


def sentence(message: UncommittedMessage, *, away: bool) -> str:
    """The message for people."""
    envelope = message.envelope
    return (
        f"{envelope.queue_id}: {IN_JOURNAL if away else NOT_YET}."
        f" From {envelope.sender or '<>'} to {', '.join(envelope.recipients)},"
        f" {envelope.size} bytes, accepted {span(time.time() - message.written_at)} ago,"
        f" segment {message.segment} at {message.position}"
    )
