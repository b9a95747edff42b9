"""What a sink does about a connection: answers, the rules that choose one, and characters of
servers."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from qmqp.netstring import MAX_LENGTH


@dataclass(frozen=True, slots=True)
class Answer:
    """How a connection is answered: `status` and `text` (a K without text gets `Ok: queued as N`)
    as a netstring, or the bytes `raw` as they are (b"": nothing is said); `delay` seconds late,
    with `drip` seconds between single bytes.

    `at`: as soon as so many bytes of the request have been read, and no more are; None: when the
    request is whole. `read_size`, `read_pause`: read at most so many bytes at a time, and wait so
    many seconds in between. `end`: what then becomes of the connection."""

    status: bytes = b"K"
    text: bytes = b""
    raw: bytes | None = None
    delay: float = 0.0
    drip: float = 0.0
    at: int | None = None
    read_size: int = MAX_LENGTH
    read_pause: float = 0.0
    end: Literal["close", "reset", "stay"] = "close"


@dataclass(frozen=True, slots=True)
class Preset:
    """What is done about a request that is no good. `silent`: close without a word. Sizes in bytes,
    `error_delay` in seconds before a D."""

    silent: bool = False
    max_size: int = MAX_LENGTH
    max_address: int = 2048
    error_delay: float = 0.0


PRESETS = {
    "strict": Preset(),
    "qmail": Preset(silent=True, max_address=999),
    "postfix": Preset(max_size=10_240_000, error_delay=1.0),
}
"""`strict` says D and why; `qmail` closes without a word, as qmail-qmqpd.c does; `postfix` says D
after a second (qmqpd_error_delay) and closes while the client is still writing, so that a reset
follows."""


class Chooser(Protocol):
    """A rule: `opening` is asked when a connection is accepted, `answer` when a request is
    whole."""

    def opening(self) -> Answer | None: ...
    def answer(self, recipients: Sequence[bytes], digest: str) -> Answer | None: ...


@dataclass(slots=True)
class Rule:
    """Give `what` to requests that have a recipient beginning with `recipient` (empty: to every
    connection), `times` times if that is given.

    Without `recipient` it holds for a connection from its first byte, so its answer may also come
    early (`at`) or say how to read."""

    what: Answer
    recipient: bytes = b""
    times: int | None = None

    def opening(self) -> Answer | None:
        return None if self.recipient else self._take()

    def answer(self, recipients: Sequence[bytes], digest: str) -> Answer | None:
        if self.recipient and any(recipient.startswith(self.recipient) for recipient in recipients):
            return self._take()
        return None

    def _take(self) -> Answer | None:
        if self.times is None:
            return self.what
        self.times -= 1
        return self.what if self.times >= 0 else None


@dataclass(slots=True)
class MagicRecipients:
    """The recipient says what happens: `defer-3@` is Z the first three times for each message,
    `reject@` D, `slow@` K after `slow` seconds, `drop-reply@` taken and never answered."""

    slow: float = 5.0
    seen: Counter[tuple[str, bytes]] = field(default_factory=Counter)

    def opening(self) -> Answer | None:
        return None

    def answer(self, recipients: Sequence[bytes], digest: str) -> Answer | None:
        for recipient in recipients:
            match re.split(rb"-(?=[0-9]{1,6}$)", recipient.partition(b"@")[0]):
                case [b"reject"]:
                    return Answer(b"D", b"Error: no such mailbox: " + recipient)
                case [b"drop-reply"]:
                    return Answer(raw=b"")
                case [b"slow"]:
                    return Answer(delay=self.slow)
                case [b"defer", times]:
                    self.seen[digest, recipient] += 1
                    tries = self.seen[digest, recipient]
                    if tries <= int(times):
                        return Answer(
                            b"Z", b"Error: %b is busy, try %d of %b" % (recipient, tries, times)
                        )
        return None
