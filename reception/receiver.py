"""A transaction becomes a stored message, a row, and only then a 250.

A small message is handed to the store whole: a process of its own syncs and commits what comes in
at about the same time together. A larger one streams: as soon as a block has gathered it is
written, block after block in order, by whichever thread is free, and the connection is told to stop
reading while too much is outstanding; when its file is synced, the store commits it. So no message
is ever whole in memory unless it is smaller than a block.

What must stay true:
- 250 is said only for a message whose body is synced and whose row is committed.
- A body is removed only when no row can come to name it: the store took the order back, or the
  database refused its data. When the store does not know, the client hears 451 and the body stays.
- Our own faults are temporary for the client (452 without room, else 451), and say nothing about
  their nature.
- What has come and is not finished is counted in the message's claim on the room before it is
  written; without room for it the rest is read and thrown away, and the client hears 452 at its
  end.
- A reception lives on the event loop. Threads only touch the body of a large message, one at a
  time.
"""

import asyncio
import errno
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache
from queue import SimpleQueue

from reception.policy import SpaceClaim
from reception.spooler_client import SpoolerClient
from reception.spooler_protocol import Cancelled
from relay import metrics
from relay.db.group_commit import CommitUnknown
from relay.ids import new_id
from relay.log import get_logger
from relay.queue.accept import NewMessage, NewRecipient
from relay.spool.store import BodyWriter, Spool
from smtpd.events import Envelope

BLOCK = 64 * 1024
"""Octets from which on a message streams to its file."""
AHEAD = 8 * BLOCK
"""Octets of one message in memory above which its connection stops reading."""
THREADS = 8
"""For large messages and for removing."""

_NO_ROOM = b"452 4.3.1 Insufficient system storage\r\n"
_LOCAL_FAULT = b"451 4.3.0 Cannot take the message now, try again later\r\n"
_LONGEST_PATH = 950  # in our trace field, whose lines have 998 octets at most (RFC 5322, 2.1.1)
_MAILBOX_LINES = re.compile(rb"(?:>*From [^\n]*\n?)+")
_UNPRINTABLE = re.compile(r"[^A-Za-z0-9.:_\[\]-]")

log = get_logger(__name__)


class Threads:
    """A few daemon threads for calls that block on the disk; calls answer for themselves and never
    raise."""

    def __init__(self, count: int) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"bodies-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], None]) -> None:
        self._calls.put(call)

    def close(self, timeout: float) -> None:
        """Lets what was submitted finish, but no longer than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


class Openings:
    """How many large bodies may be open at a time; the others wait for a descriptor, in the order
    of their coming."""

    def __init__(self, free: int) -> None:
        self._free = free
        self._waiting: dict[Reception, None] = {}

    def take(self, reception: "Reception") -> bool:
        """Whether it may open its body; if not, its `open` is called when it may."""
        if not self._free:
            self._waiting[reception] = None
            return False
        self._free -= 1
        return True

    def leave(self, reception: "Reception", *, opened: bool) -> None:
        """It needs a descriptor no longer, whether it has one or waits."""
        self._waiting.pop(reception, None)
        if not opened:
            return
        self._free += 1
        if self._waiting:
            following = next(iter(self._waiting))
            del self._waiting[following]
            self._free -= 1
            following.open()


type Answer = Callable[[bytes], None]
type Flow = Callable[[], None]


@dataclass(slots=True)
class Receiver:
    """Makes receptions, and holds what they share. `deadline`: seconds from the end of a message to
    its answer."""

    loop: asyncio.AbstractEventLoop
    spool: Spool
    store: SpoolerClient
    route_for: Callable[[str], str]
    hostname: str
    deadline: float
    threads: Threads
    openings: Openings


class Reception:
    """One message on its way in from `client`, an address. Everything but what a thread runs is
    called on the loop.

    `claim` is what it takes of the room; `trusted`: whether the policy trusts the client. `answer`
    will get one whole reply after `complete`, unless that was abandoned; `flow` is called when
    `congested` may have changed.
    """

    def __init__(
        self,
        receiver: Receiver,
        envelope: Envelope,
        client: str,
        claim: SpaceClaim,
        answer: Answer,
        flow: Flow,
        *,
        trusted: bool,
    ) -> None:
        self.id = new_id()
        self._claim = claim
        self.deadline: float | None = None
        self._receiver, self._envelope, self._client, self._flow = receiver, envelope, client, flow
        self._trusted = trusted
        self._answer: Answer | None = answer
        self._started = self._ended = time.monotonic()
        trace = received_field(envelope, client, receiver.hostname, self.id, date(int(time.time())))
        self._held, self._held_size = [trace], len(trace)
        self._moving = 0  # octets with a thread
        self._busy = False  # a thread works for us
        self._opened = False  # a descriptor is ours
        self._body: BodyWriter | None = None  # of a large message
        self._size = 0
        self._header_message_id: str | None = None
        self._complete = self._gone = False
        self._error: Exception | None = None
        self._order = 0  # the number that the store knows us by

    @property
    def congested(self) -> bool:
        """More content should wait until the disk has caught up."""
        return self._held_size + self._moving > AHEAD

    @property
    def failed(self) -> bool:
        """Nothing of it is kept any more; the client hears so after its end."""
        return self._error is not None

    def append(self, text: bytes) -> None:
        """Takes decoded content."""
        if self._gone or self._error is not None:
            return
        if not self._claim.grow(len(text)):
            self._error = OSError(errno.ENOSPC, "no room for more of an unfinished message")
            self._held, self._held_size = [], 0
            if not self._busy:
                self._remove()
            return
        self._held.append(text)
        self._held_size += len(text)
        self._stream()

    def open(self) -> None:
        """There is a descriptor for what has waited for one."""
        self._opened = True
        self._stream()

    def complete(self, header_message_id: str | None) -> None:
        """The end was read: from now on an answer is due. `header_message_id`: the header's."""
        self._ended = time.monotonic()
        self.deadline = self._ended + self._receiver.deadline
        self._header_message_id, self._complete = header_message_id, True
        if self._error is not None:
            if not self._busy:  # else it is refused when that was removed which is being written
                self._refuse(self._error)
        elif not self._busy and self._body is None:
            self._set_apart()
            self._size = self._held_size
            self._put(self._held)
        elif not self._busy:
            self._work(self._finish)

    def expire(self) -> None:
        """The deadline has passed."""
        log.error("not accepted", id=self.id, client=self._client, reason="ACCEPT_DEADLINE passed")
        self._say(_LOCAL_FAULT)
        self.abandon()

    def abandon(self) -> None:
        """Nobody waits for an answer any more: the message is taken back if that can still be
        done."""
        self._gone = True
        self._answer = None
        if self._order:
            self._receiver.store.withdraw(self._order)
        elif not self._busy:
            self._remove()

    def _stream(self) -> None:
        """Writes what has gathered, if that is a block; without a descriptor it gathers until there
        is one."""
        if self._held_size < BLOCK or self._busy:
            return
        self._opened = self._opened or self._receiver.openings.take(self)
        if self._opened:
            if self._body is None:
                self._set_apart()
            self._work(self._write)

    def _shut(self) -> None:
        """The body is open no longer, or never will be."""
        opened, self._opened = self._opened, False
        self._receiver.openings.leave(self, opened=opened)

    def _set_apart(self) -> None:
        """Keeps our trace field and the client's header apart; to be called before the first bytes
        are handed on."""
        if (
            len(self._held) > 1 and self._held[1][0] in b" \t>F"
        ):  # all others are joined once, where they are written
            self._held[1:] = [set_apart(b"".join(self._held[1:]))]
            self._held_size = sum(map(len, self._held))

    def _work(self, call: Callable[[list[bytes]], None]) -> None:
        held, self._held = self._held, []
        self._moving, self._held_size = self._held_size, 0
        self._busy = True
        self._receiver.threads.submit(lambda: self._guard(call, held))

    def _written(self) -> None:
        self._busy = False
        self._claim.store(self._moving)
        self._moving = 0
        if self._gone or self._error is not None:
            self._remove()
            if self._error is not None and self._complete:
                self._refuse(self._error)
        elif self._complete:
            self._work(self._finish)
        else:
            self._stream()
        self._flow()

    def _finished(self) -> None:
        self._busy = False
        self._claim.store(self._moving)
        if self._gone:
            self._remove()
        else:
            self._put(None)

    def _put(self, body: list[bytes] | None) -> None:
        """Have the message kept; its body comes along unless it is stored already."""
        assert self.deadline is not None
        self._shut()
        self._held = []
        self._order = self._receiver.store.put(self._message(), body, self.deadline, self._settled)

    def _fail(self, error: Exception) -> None:
        """A body could not be written; what there was of it has gone."""
        self._busy, self._error, self._body, self._held = False, error, None, []
        self._held_size = self._moving = 0
        self._claim.end()
        self._shut()
        if self._complete or self._gone:
            self._refuse(error)
        else:
            self._flow()

    def _settled(self, result: Exception | None) -> None:
        self._claim.end(kept=result is None or isinstance(result, CommitUnknown))
        if result is None:
            metrics.RECEIVED_BYTES.inc(self._size)
            metrics.ACCEPT_SECONDS.observe(time.monotonic() - self._ended)
            told = {} if self._answer else {"told": False}
            self._say(b"250 2.0.0 Ok: queued as %b\r\n" % self.id.encode("ascii"))
            who = {"id": self.id, "client": self._client, "sender": self._envelope.sender}
            ms = round((time.monotonic() - self._started) * 1000, 1)
            log.info(
                "accepted",
                **who,
                recipients=len(self._envelope.recipients),
                size=self._size,
                ms=ms,
                **told,
            )
            return
        if not isinstance(result, CommitUnknown):
            self._remove()
        if not isinstance(result, Cancelled):
            self._refuse(result)

    def _refuse(self, error: Exception) -> None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if self._answer:  # else it has gone, or was told before
            log.error(
                "not accepted",
                id=self.id,
                client=self._client,
                reason=str(error) or type(error).__name__,
            )
        self._say(_NO_ROOM if full else _LOCAL_FAULT)

    def _say(self, reply: bytes) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer(reply)

    def _remove(self) -> None:
        """Remove what was streamed."""
        self._claim.end()
        self._shut()
        if self._body is not None:
            self._receiver.threads.submit(self._discard)

    # -- in a thread
    # --------------------------------------------------------------------------------------------

    def _guard[Argument](self, call: Callable[[Argument], None], argument: Argument) -> None:
        try:
            call(argument)
        except Exception as error:
            # The name lives no longer than this block, and the loop runs the call later.
            fault = error
            self._receiver.loop.call_soon_threadsafe(lambda: self._fail(fault))

    def _write(self, held: list[bytes]) -> None:
        if self._body is None:
            self._body = self._receiver.spool.create(self.id)
        self._body.append(b"".join(held))
        self._receiver.loop.call_soon_threadsafe(self._written)

    def _finish(self, held: list[bytes]) -> None:
        body = self._body
        assert body is not None
        if held:
            body.append(b"".join(held))
        self._size = body.finish()
        self._receiver.loop.call_soon_threadsafe(self._finished)

    def _discard(self) -> None:
        if self._body is not None:
            self._body.discard()
        self._receiver.spool.remove(self.id)

    def _message(self) -> NewMessage:
        envelope, parameters, route_for = (
            self._envelope,
            self._envelope.parameters,
            self._receiver.route_for,
        )
        return NewMessage(
            self.id,
            envelope.sender,
            self._size,
            [
                NewRecipient(one.address, one.notify, one.orcpt, route_for(one.address))
                for one in envelope.recipients
            ],
            self._client,
            envelope.helo,
            envelope.protocol,
            header_message_id=self._header_message_id,
            body_type=parameters.get(b"BODY"),
            ret=parameters.get(b"RET"),
            envid=parameters.get(b"ENVID"),
            client_trusted=self._trusted,
        )


@lru_cache(maxsize=1)
def date(second: int) -> str:
    """A moment as RFC 5322 writes it, in this machine's zone."""
    return formatdate(second, localtime=True)


def set_apart(content: bytes) -> bytes:
    """Makes the beginning of a message's content (at least `BLOCK` octets, or all of it) fit to
    follow our trace field.

    The client's bytes stay as they are, behind what Postfix' smtpd puts before them, too. A first
    line that begins with a blank would be read as the continuation of our field (RFC 5322, 2.2.3):
    an empty line ends the header before it. A line of a mailbox file (`From ann Mon Jan  1 ...`) is
    no field, so servers end the header there, and the client's own header would become text: such
    lines are made fields.
    """
    if content.startswith((b" ", b"\t")):
        return b"\n" + content
    if content.startswith((b"From ", b">")) and (found := _MAILBOX_LINES.match(content)):
        return re.sub(rb"(?m)^(?=.)", b"X-Mailbox-Line: ", found[0]) + content[found.end() :]
    return content


def received_field(
    envelope: Envelope, client: str, hostname: str, queue_id: str, when: str
) -> bytes:
    """The trace field (RFC 5321, 4.4), in LF form. It names the recipient only where there is no
    other to betray."""
    literal = f"IPv6:{client}" if ":" in client else client
    recipients = envelope.recipients
    alone = len(recipients) == 1 and len(recipients[0].path) <= _LONGEST_PATH
    path = f"\n\tfor <{recipients[0].path}>; " if alone else ";\n\t"
    return (
        f"Received: from {_UNPRINTABLE.sub('?', envelope.helo)} ([{literal}])\n"
        f"\tby {hostname} with {envelope.protocol} id {queue_id}{path}{when}\n"
    ).encode("ascii")
