"""The QMQP servers of a trial: two sinks that keep every message, and that can be driven insane.

A recipient's name decides the reply: `reject.` and `bad.` are rejected for good, `busy.` is
deferred twice. A `Mailbox` counts the copies that both servers kept, and compares their bytes with
what was sent. While `InsaneReplies` is on, a server also does what no server should.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Lock

from qmqp.netstring import encode
from qmqp.sink import Answer, Received, Rule, Sink, running_sink
from tests.faults.traffic import Plan
from tests.services import free_port

DELAY = 0.03  # seconds before a reply, so that some transfers are past their commit point
BUSY_TRIES = 2
_NUMBER = re.compile(r"m(\d+)@")
_K = re.compile(rb"K|\d+:K")  # also in a reply that was sent as raw bytes


class Mailbox:
    """Counts what the servers kept, by recipient; `plan` says what the bytes should be."""

    def __init__(self, plan: Plan) -> None:
        self.kept: Counter[str] = Counter()
        self.replied_k: Counter[str] = Counter()
        self.altered: set[int] = set()
        self._plan = plan
        self._lock = Lock()

    def add(self, received: Received, content: bytes) -> None:
        """Count a complete request, unless the server refused it."""
        if received.reply[:1] in (b"Z", b"D"):
            return
        recipients = [address.decode() for address in received.recipients]
        with self._lock:
            self.kept.update(recipients)
            if _K.match(received.reply):
                self.replied_k.update(recipients)
            number = _NUMBER.search(recipients[0])
            # A DSN has the null sender and a text of the relay. Any other message ends with what
            # its client sent.
            if number and received.sender:
                self._compare(int(number[1]), content)

    def _compare(self, number: int, content: bytes) -> None:
        if not content.endswith(self._plan.body(number, self._plan.mail(number).size)):
            self.altered.add(number)


class PlannedReplies:
    """The rule of both servers: what a recipient's name says."""

    def __init__(self) -> None:
        self._busy: Counter[bytes] = Counter()

    def __call__(self, recipients: Sequence[bytes] | None, digest: str) -> Answer | None:
        for recipient in recipients or ():
            if recipient.startswith(b"reject."):
                return Answer(b"D", b"policy forbids this message (#5.7.1)")
            if recipient.startswith(b"bad."):
                return Answer(b"D", b"no mailbox here by that name (#5.1.1)")
            if recipient.startswith(b"busy.") and self._busy[recipient] < BUSY_TRIES:
                self._busy[recipient] += 1
                return Answer(b"Z", b"busy, try again later (#4.3.2)")
        return None


def _early_close(rng: random.Random) -> Answer:
    return Answer(raw=b"", at=rng.choice((0, 1, 40, 400, 4000)), end=rng.choice(("close", "reset")))


def _slow_reader(rng: random.Random) -> Answer:
    return Answer(read_size=2048, read_pause=0.2)


def _no_reply(rng: random.Random) -> Answer:
    return Answer(raw=b"", end=rng.choice(("close", "reset", "stay")))


def _half_reply(rng: random.Random) -> Answer:
    whole = encode(rng.choice((b"Kqueued", b"Zbusy", b"Drejected")))
    return Answer(raw=whole[: rng.randrange(1, 3)], end=rng.choice(("close", "reset")))


def _garbage_reply(rng: random.Random) -> Answer:
    lines = (
        b"220 mail.example.org ESMTP\r\n",
        b"1:X,",
        b"0:,",
        b"99999999999:",
        b"5:Kok,,",
        b"-1:K,",
    )
    return Answer(raw=rng.choice((*lines, rng.randbytes(40))))


def _slow_reply(rng: random.Random) -> Answer:
    return Answer(drip=1.0)


def _k_then_reset(rng: random.Random) -> Answer:
    return Answer(end="reset")


INSANITIES: dict[str, Callable[[random.Random], Answer]] = {
    "early close": _early_close,
    "slow reader": _slow_reader,
    "no reply": _no_reply,
    "half reply": _half_reply,
    "garbage": _garbage_reply,
    "a byte a second": _slow_reply,
    "K and reset": _k_then_reset,
}
# These begin before the request is read; the others replace the reply to it.
_AT_ONCE = {"early close", "slow reader"}


class InsaneReplies:
    """The second rule of a server. `kinds` are the insanities that it draws from, none for a sane
    server; `count` is how often it was insane."""

    def __init__(self, rng: random.Random) -> None:
        self.kinds: tuple[str, ...] = ()
        self.count = 0
        self._rng = rng

    def __call__(self, recipients: Sequence[bytes] | None, digest: str) -> Answer | None:
        opening = recipients is None
        kinds = [kind for kind in self.kinds if (kind in _AT_ONCE) is opening]
        # Half of the requests are served well, so that mail moves on.
        if not kinds or self._rng.random() < 0.5:
            return None
        self.count += 1
        return INSANITIES[self._rng.choice(kinds)](self._rng)


class MailServer:
    """A QMQP server on a port of its own, which keeps it when it is stopped and started again."""

    def __init__(
        self, directory: Path, mailbox: Mailbox, planned: PlannedReplies, rng: random.Random
    ) -> None:
        self.port = free_port()
        self.insane = InsaneReplies(rng)
        self._directory = directory
        self._mailbox = mailbox
        self._planned = planned
        self._sink: Sink | None = None
        self._stack = ExitStack()

    def start(self) -> None:
        # What a recipient's name says comes first: an insane K to mail that bounces would be valid.
        rules = (self._planned, self.insane, Rule(Answer(delay=DELAY)))
        running = running_sink(*rules, port=self.port, dump=self._directory, keep=1_000_000)
        self._sink = self._stack.enter_context(running)

    def stop(self) -> None:
        """Stop listening and reset all connections; what it has received is counted."""
        self._stack.close()
        self.collect()
        self._sink = None

    def collect(self) -> None:
        """Count what was received since the last call, and remove its files."""
        while self._sink is not None and self._sink.received:
            received = self._sink.received.popleft()
            path = self._directory / f"{received.number:08d}.eml"
            self._mailbox.add(received, path.read_bytes())
            path.unlink()
            path.with_suffix(".json").unlink()
