"""Asks a server of which kind it is, without giving it a message.

The protocol has no command that only asks, so the probe breaks it at the first byte: no message
begins with `x`, so no server can accept one. If the server then closes, a second connection brings
a whole netstring that is too short for a message, `1:x,`. The answers tell the families apart:

    Postfix     a D "netstring format error" after a second (a Z with soft_bounce); or, before anything is sent, a D
                that this client is not authorized
    mailfront   a Z
    qmail-ldap  a Z about compressed data: its qmqpd takes a byte that is no digit for zlib (without zlib it is as qmail)
    qmail       closes without a reply, as qmqp-sink and all that follow the letter of the protocol do; its tcpserver
                closes before anything is sent, if this client is not allowed. Before 2022 it took
                any byte for a digit, as indimail's still does: it closes when it has seen too many
                of them
    qrelay      closes as qmail does; to the whole netstring it replies D "malformed input", where qmail closes again
    others      an SMTP or SSH banner, a reply that is no netstring, a K (which no server may give here), or silence

A probe cannot find out how large a message may be: it would have to begin one. What must stay true:
nothing is sent that can become a message. Sources: qmail-qmqpd.c (exits on a bad length before it
opens the queue), that of qmail-ldap (saferead), Postfix qmqpd(8), mailfront protocol-qmqp.c,
qrelay.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from time import monotonic

from qmqp import PORT
from qmqp.reply import MalformedReply, Reply, ReplyParser

_NO_LENGTH = b"x"
_TOO_LONG = b"x" * 9  # after the first: ten are too long for qmail, whatever it takes an `x` for
_NO_MESSAGE = b"1:x,"  # the shortest request is longer
_QRELAY_REPLY = b"16:Dmalformed input,"
_READ_SIZE = 4096
# A server that refuses this client does so before it has read anything. Postfix waits for a second
# first (qmqpd_error_delay).
REFUSAL_DELAY = 1.5

_REFUSED = (False, "postfix", "it does not let us in (in Postfix: qmqpd_authorized_clients)")
# Status and text of a reply, and what they show (as `_classify` returns it). The first row holds.
_REPLIES: tuple[tuple[bytes, bytes, tuple[bool | None, str, str]], ...] = (
    (b"KZD", b"not authorized", _REFUSED),
    (b"KZD", b"not authorised", _REFUSED),
    (b"K", b"", (None, "other", "it accepted what was no message: do not send mail there")),
    (b"D", b"netstring", (True, "postfix", "it rejects what is no request (D), as Postfix does")),
    (b"D", b"", (True, "other", "it rejects what is no request (D)")),
    (b"Z", b"netstring format error",
     (True, "postfix", "it defers what is no request (Z), as Postfix does with soft_bounce")),
    (b"Z", b"compressed data",
     (True, "qmail-ldap", "it takes what is no length for compressed data, as qmail-ldap does")),
    (b"Z", b"", (True, "mailfront", "it defers what is no request (Z), as mailfront does")),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The result of a probe. `allowed`: None if the probe cannot tell. `family`: postfix, qmail,
    qmail-ldap, mailfront, qrelay, other or none. `said`: the server's bytes, bounded."""

    reachable: bool
    allowed: bool | None
    family: str
    words: str
    said: bytes = b""
    connect_seconds: float = 0.0


async def probe(
    *,
    host: str | None = None,
    port: int = PORT,
    path: str | None = None,
    connect: float = 10.0,
    reply: float = 5.0,
) -> ProbeResult:
    """Probe the server at `host` and `port`, or at the Unix socket `path`. `connect` and `reply`
    are seconds. Errors of the network are results."""
    started = monotonic()
    try:
        async with _connected(host, port, path, connect) as (reader, writer):
            seconds = round(monotonic() - started, 6)
            asked = False
            received, closed = await _read_reply(reader, min(REFUSAL_DELAY, reply))
            for text in (_NO_LENGTH, _TOO_LONG):
                if not received and not closed:
                    asked = True
                    writer.write(text)
                    received, closed = await _read_reply(reader, reply)
    except UnicodeError:
        return ProbeResult(False, None, "none", "no connection: that is no host name")
    except OSError as error:
        known = error.errno is not None and error.errno > 0
        reason = os.strerror(error.errno or 0) if known else error.strerror or str(error)
        return ProbeResult(False, None, "none", f"no connection: {reason or 'timed out'}")
    verdict = _classify(received, asked=asked, closed=closed)
    result = ProbeResult(True, *verdict, received, seconds)
    if (
        result.family == "qmail"
        and await _second_reply(host, port, path, connect, reply) == _QRELAY_REPLY
    ):
        words = "it says D to a netstring that holds no message, as qrelay does"
        return replace(result, family="qrelay", words=words, said=_QRELAY_REPLY)
    return result


@asynccontextmanager
async def _connected(
    host: str | None, port: int, path: str | None, seconds: float
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    opening = asyncio.open_unix_connection(path) if path else asyncio.open_connection(host, port)
    reader, writer = await asyncio.wait_for(opening, seconds)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def _second_reply(
    host: str | None, port: int, path: str | None, connect: float, reply: float
) -> bytes:
    """The reply to a whole netstring without a message; empty without a reply."""
    try:
        async with _connected(host, port, path, connect) as (reader, writer):
            writer.write(_NO_MESSAGE)
            return (await _read_reply(reader, reply))[0]
    except OSError:
        return b""


async def _read_reply(reader: asyncio.StreamReader, seconds: float) -> tuple[bytes, bool]:
    """The bytes that come in that time, and whether the server has closed."""
    received = b""
    try:
        async with asyncio.timeout(seconds):
            while len(received) < _READ_SIZE and not received.endswith(b","):
                if not (data := await reader.read(_READ_SIZE)):
                    return received, True
                received += data
    except TimeoutError:
        return received, False
    except OSError:
        return received, True
    return received, False


def _classify(received: bytes, *, asked: bool, closed: bool) -> tuple[bool | None, str, str]:
    """Whether this client is allowed, the family, and both in words."""
    if not received and not asked:
        words = (
            "it closed before anything was sent, as tcpserver does to a client that is not allowed"
        )
        return None, "other", words
    if not received and closed:
        return True, "qmail", "it closed without a word on what is no request, as qmail-qmqpd does"
    if not received:
        words = "it said nothing and kept the connection open, which no known QMQP server does"
        return None, "other", words
    reply: Reply | None
    try:
        reply = ReplyParser().feed(received)
    except MalformedReply:
        reply = None
    if reply is None:
        first = "" if asked else ": it spoke first, as SMTP and SSH servers do"
        return None, "other", f"what it said is no QMQP reply{first}"
    return next(
        verdict
        for statuses, text, verdict in _REPLIES
        if reply.status in statuses and text in reply.text
    )
