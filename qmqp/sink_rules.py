"""The behaviour of a sink: answers, rules that choose one, and presets of known servers."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from qmqp.netstring import MAX_LENGTH


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a connection: `status` and `text` as a netstring (a K without a text gets `Ok:
    queued as N`), or the bytes `raw` as they are (b"": no reply). It is sent `delay` seconds late,
    with `drip` seconds between single bytes.

    `at`: answer as soon as so many bytes of the request have been read, and read no more; None:
    answer when the request is complete. `read_size`, `read_pause`: read at most so many bytes at a
    time, and wait so many seconds in between. `end`: how the connection ends."""

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
    """The treatment of a bad request. `silent`: close without a reply. Sizes are bytes;
    `error_delay` is the seconds before a D."""

    silent: bool = False
    max_size: int = MAX_LENGTH
    max_address: int = 2048
    error_delay: float = 0.0


# strict replies D and the reason. qmail closes without a reply, as qmail-qmqpd.c does. postfix
# replies D after a second (qmqpd_error_delay) and closes while the client still writes, so that a
# reset follows.
PRESETS = {
    "strict": Preset(),
    "qmail": Preset(silent=True, max_address=999),
    "postfix": Preset(max_size=10_240_000, error_delay=1.0),
}


class Chooser(Protocol):
    """A rule. `opening` is called when a connection is accepted, `answer` when a request is
    complete. None: the rule does not apply."""

    def opening(self) -> Answer | None: ...
    def answer(self, recipients: Sequence[bytes], digest: str) -> Answer | None: ...


@dataclass(slots=True)
class Rule:
    """Gives the answer `what` to requests that have a recipient beginning with `recipient` (empty:
    to every connection), at most `times` times.

    Without `recipient` the rule holds from the first byte of a connection, so its answer may be
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
    """Answers as the recipient's address says: `defer-3@` is Z three times for each message and
    then K, `reject@` D, `slow@` K after `slow` seconds, `drop-reply@` is accepted without a
    reply."""

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
