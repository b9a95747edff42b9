"""What an operator does on the page: a preview of an operation, and the operation.

An operation is that of the command (`commands.ops.modify`), with the same record; its actor is
`web:USER@HOST`. The preview counts the deliveries that match, and shows the oldest. A confirmation
changes at most as many as its preview counted, so that mail that arrives meanwhile is not touched
unseen. What must stay true: an empty filter changes nothing unless the operator confirms that; each
operation has a reason.
"""

import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice

from sqlalchemy import Engine

from commands.ops.modify import (
    after_sending,
    changed_text,
    changing,
    counts_text,
    subject_of,
)
from commands.output import counted
from commands.web.access import Visitor
from commands.web.search import Values, address_of, parse, values_of
from relay.queue.operations import OPERATIONS, Operation, QueueOperations
from relay.queue.states import State
from relay.report.queries import QueueReader
from relay.report.rows import Row
from relay.settings import Settings

SWITCHES = ("pause", "resume")
NAMES = ("retry", "hold", "release", "bounce", "drop", *SWITCHES)
SHOWN = 20  # deliveries of a preview
REASON_LENGTH = 500
_EFFECTS = {
    "retry": "They are tried again now, before they are due.",
    "hold": "They wait until an operator releases them. One that is being sent is held after this"
    " attempt.",
    "release": "They are queued again.",
    "bounce": "They are given up, and the senders get a DSN with your reason.",
    "drop": "They are given up, and the senders are told nothing.",
    "pause": "Nothing is sent there until it is resumed. Mail is accepted, and waits.",
    "resume": "Mail is sent there again.",
}


@dataclass(frozen=True, slots=True)
class Preview:
    """What a form shows before an operation. `values`: the hidden fields that say what it is about.
    `count`: deliveries; `rows`: recipients of the oldest `shown` of them."""

    name: str
    subject: str
    effect: str
    values: Values
    back: str
    count: int = 0
    shown: int = 0
    filter_shown: str = ""
    everything: bool = False
    rows: list[Row] = field(default_factory=list)

    @property
    def is_switch(self) -> bool:
        """Whether it pauses or resumes."""
        return self.name in SWITCHES

    @property
    def is_final(self) -> bool:
        """Whether it cannot be undone."""
        return self.name in ("bounce", "drop")


class Acting:
    """The operations of one database. Texts that say what is wrong are raised as ValueError and
    NoSuchMessage."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self._queue = QueueReader(engine)
        self._operations = QueueOperations(engine, sends_dsns=settings.bounces == "dsn")

    def preview(self, name: str, fields: Values) -> Preview:
        """What an operation would do to the result of a search, or to a route or server."""
        if name in SWITCHES:
            return self._preview_of_switch(name, fields)
        values, operation = values_of(fields), OPERATIONS[name]
        filter_ = parse(values, self._queue.resolve).filter_
        matched = self._operations.matching(operation, filter_)
        back = address_of(values)
        if not matched:
            states = " or ".join(operation.takes)
            text = f"Nothing to {name}: it applies to {states} deliveries."
            return Preview(name, "", text, values, back)
        rows = self._operations.matching_rows(operation, filter_, limit=SHOWN)
        count = matched.total()
        return Preview(
            name,
            counted(count),
            f"{counts_text(matched)}. {_EFFECTS[name]}",
            values,
            back,
            count,
            min(count, SHOWN),
            filter_.shown(),
            everything=not filter_.shown(),
            rows=list(islice(rows, 20 * SHOWN)),
        )

    def _preview_of_switch(self, name: str, fields: Values) -> Preview:
        subject, values = _subject(fields)
        kind, _, of = subject.partition(":")
        paused = {row.subject: row for row in self._queue.pauses()}
        text = _EFFECTS[name]
        if (pause := paused.get(subject)) and name == "resume":
            reason = f": {pause.reason}" if pause.reason else ""
            text = f"{pause.actor} paused it{reason}. {text}"
        elif pause:
            text = f"It is already paused by {pause.actor}. {text}"
        elif name == "resume":
            text = f"It is not paused. {text}"
        if kind == "server":
            waits = [row["waiting"] for row in self._queue.read("servers") if row["server"] == of]
            text += f" Waiting for it: {counted(int(sum(waits)))}."
        return Preview(name, f"{kind} {of}", text, values, f"/#{kind}s")

    def act(
        self, name: str, fields: Values, visitor: Visitor, given: Mapping[str, str]
    ) -> tuple[list[str], str]:
        """Do it; what was done, as sentences, and the address to go back to."""
        reason = given.get("reason", "").strip()[:REASON_LENGTH]
        if not reason:
            raise ValueError("write a reason")
        actor = f"web:{visitor.name}@{socket.gethostname()}"
        if name in SWITCHES:
            subject, _ = _subject(fields)
            switch = self._operations.resume if name == "resume" else self._operations.pause
            done = switch(subject, actor=actor, reason=reason)
            after = "resumed" if name == "resume" else "paused"
            was = "is not paused" if name == "resume" else "is already paused"
            kind = subject.partition(":")[0]
            return [f"{subject} {after}" if done else f"{subject} {was}"], f"/#{kind}s"
        values = values_of(fields)
        filter_ = parse(values, self._queue.resolve).filter_
        if not filter_.shown() and "everything" not in given:
            raise ValueError("there is no filter: confirm that you mean every delivery")
        expected = given.get("expected", "")
        if not expected.isascii() or not expected.isdigit() or not 0 < int(expected) < 1 << 62:
            raise ValueError("the form does not say how many deliveries it means: load it again")
        operation, changed, removed = OPERATIONS[name], Counter[str](), 0
        chunks = changing(
            self._engine,
            self._settings,
            operation,
            filter_,
            actor=actor,
            reason=reason,
            limit=int(expected),
        )
        for counts, bodies in chunks:
            changed.update(counts)
            removed += bodies
        return _texts(operation, changed, removed), address_of(values)


def _texts(operation: Operation, changed: Counter[str], removed: int) -> list[str]:
    texts = [changed_text(operation.name, changed, removed)]
    if sending := changed[State.SENDING]:
        texts.append(f"{sending} being sent: {after_sending(operation.name, operation)}")
    return texts


def _subject(fields: Values) -> tuple[str, Values]:
    """The route or server of a pause, and its field; raises ValueError."""
    one = {name: value.strip() for name, value in fields if name in ("route", "server")}
    subject = subject_of(one.get("route"), one.get("server"))
    kind, _, of = subject.partition(":")
    return subject, [(kind, of)]
