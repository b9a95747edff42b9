"""What became of an attempt, in words that leave no room for guessing.

A client of this protocol needs more than "sent" and "failed", as what may be done next hangs on two
things: what the server said, and on which side of the commit point (see the package) the connection
ended.

    outcome       happened                                           then
    DELIVERED     K                                                  done: the server answers for every recipient
    DEFERRED      Z                                                  try again later
    REJECTED      D                                                  give up: no recipient will get it
    UNREACHABLE   no connection                                      another server, at once
    INTERRUPTED   it ended before the commit point, without reply    another server, at once: no server may keep it
    UNCERTAIN     it ended after the commit point, without reply     later, and it may be a double
    MALFORMED     what came is no reply, or a K that came too early  before the commit point as INTERRUPTED,
                                                                     after it as UNCERTAIN

Source: qmqp.html, "Any response not received by the client indicates a temporary failure", and that
the server must throw away what was not received whole.
"""

import errno
from enum import StrEnum
from typing import NamedTuple


class SendOutcome(StrEnum):
    """What became of an attempt."""

    DELIVERED = "delivered"
    DEFERRED = "deferred"
    REJECTED = "rejected"
    UNREACHABLE = "unreachable"
    INTERRUPTED = "interrupted"
    UNCERTAIN = "uncertain"
    MALFORMED = "malformed"


class Result(NamedTuple):
    """What happened.

    `text` is the server's words without the status byte (bounded, any bytes) if it gave a valid
    reply, else our own. `committed`: the last byte of the request has left. `ours`: interrupted by
    `may_commit` or `abort`, not by the server. `flags`: "early-reply" (before the commit point),
    "truncated-reply" (a K whose words were cut off), "extra-bytes" (something came after the
    reply), "closed-at-once" (the server closed the connection within a second, without a reply, and
    may have read nothing)."""

    outcome: SendOutcome
    text: bytes
    committed: bool
    ours: bool
    bytes_sent: int
    seconds: float
    flags: frozenset[str]


def words_of(error: BaseException) -> str:
    """An error by its symbolic name and its words: `ECONNREFUSED (Connection refused)`."""
    code = error.errno if isinstance(error, OSError) else None
    name = errno.errorcode.get(code or 0, type(error).__name__)
    return f"{name} ({getattr(error, 'strerror', None) or error})"
