"""The result of a request.

A client of this protocol needs more than "sent" and "failed". What it may do next depends on the
server's reply, and on which side of the commit point (see the package) the connection ended.

    outcome       what happened                                      what may follow
    DELIVERED     K                                                  nothing: the server answers for every recipient
    DEFERRED      Z                                                  the same request, later
    REJECTED      D                                                  nothing: no recipient will get it
    UNREACHABLE   no connection                                      another server, at once
    INTERRUPTED   the end before the commit point, without a reply   another server, at once: no server may keep it
    UNCERTAIN     the end after the commit point, without a reply    the same request, later; it may be a duplicate
    MALFORMED     bytes that are not a reply, or a K too early       before the commit point as INTERRUPTED,
                                                                     after it as UNCERTAIN

Source: qmqp.html, "Any response not received by the client indicates a temporary failure", and that
the server must throw away a request that it did not receive wholly.
"""

import errno
from enum import StrEnum
from typing import NamedTuple


class SendOutcome(StrEnum):
    """How a request ended."""

    DELIVERED = "delivered"
    DEFERRED = "deferred"
    REJECTED = "rejected"
    UNREACHABLE = "unreachable"
    INTERRUPTED = "interrupted"
    UNCERTAIN = "uncertain"
    MALFORMED = "malformed"


class Result(NamedTuple):
    """How a request ended, and why.

    `text` is the server's text without the status byte (bounded, any bytes) if the reply was valid,
    else our own. `committed`: the last byte of the request has left. `ours`: `may_commit` or
    `abort` ended the transfer, not the server. `flags`: "early-reply" (before the commit point),
    "truncated-reply" (a K whose text was cut off), "extra-bytes" (after the reply),
    "closed-at-once" (the server closed the connection within a second, without a reply, and may
    have read nothing)."""

    outcome: SendOutcome
    text: bytes
    committed: bool
    ours: bool
    bytes_sent: int
    seconds: float
    flags: frozenset[str]


def describe(error: BaseException) -> str:
    """The symbolic name of an error and its text: `ECONNREFUSED (Connection refused)`."""
    code = error.errno if isinstance(error, OSError) else None
    name = errno.errorcode.get(code or 0, type(error).__name__)
    return f"{name} ({getattr(error, 'strerror', None) or error})"
