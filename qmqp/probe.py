"""Asks a server what it is, without giving it a message.

How it works: the protocol has no command that only asks, so the probe breaks it at the first byte:
where a length must stand no message begins with `x`, so nothing can come of it, whoever listens. If
the server closes at that, a second connection brings a whole netstring that has no room for a
message, `1:x,`. What comes back tells the families apart:

    Postfix     a D "netstring format error", a second later (a Z with soft_bounce); or, before anything is sent, a D
                that we may not come in
    mailfront   a Z
    qmail-ldap  a Z about compressed data: its qmqpd takes what is no digit for zlib (one without zlib is as qmail)
    qmail       closes without a word, and so do qmqp-sink and whatever follows the letter of the protocol; its
                tcpserver closes before anything is sent, if we may not come in. Before 2022 it took any byte for a
                digit, as indimail's still does: it closes when it has seen too many of them
    qrelay      closes as qmail does; to the whole netstring it says D "malformed input", where qmail closes again
    others      an SMTP or SSH banner, a reply that is no netstring, a K (which nobody may give here), or silence

What a probe cannot tell: how large a message may be. For that one would have to begin a message.

Sources: qmail-qmqpd.c (exits on a bad length, and when a length runs past the outer string, before
it opens the queue), that of qmail-ldap (saferead), Postfix qmqpd(8), mailfront protocol-qmqp.c,
qrelay's NetstringInput and Connection. What must stay true: nothing is sent that a message can come
of.
"""

import asyncio
import os
from dataclasses import dataclass, replace
from time import monotonic

from qmqp import PORT
from qmqp.reply import MalformedReply, ReplyParser

_NO_LENGTH = b"x"
_NO_MESSAGE = b"1:x,"  # the shortest request is longer
_TOO_LONG = b"x" * 9  # ten are a length beyond what qmail takes, whatever it makes of an `x`
_MALFORMED = b"16:Dmalformed input,"  # qrelay's words
_LONGEST = 4096
# A server that refuses us does so before it has heard anything: Postfix after a second
# (qmqpd_error_delay).
_PATIENCE = 1.5


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a probe found. `allowed`: None if nobody knows. `family`: postfix, qmail, qmail-ldap,
    mailfront, qrelay, other or none; `said`: the server's bytes, bounded."""

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
    """Ask the server at host and port, or at the Unix socket `path`; never raises for what the
    network does."""
    started = monotonic()
    try:
        reader, writer = await _connected(host, port, path, connect)
    except UnicodeError:
        return ProbeResult(False, None, "none", "no connection: that is no host name")
    except OSError as error:
        known = error.errno is not None and error.errno > 0
        reason = (
            os.strerror(error.errno or 0) if known else error.strerror or str(error) or "timed out"
        )
        return ProbeResult(False, None, "none", f"no connection: {reason}")
    took = round(monotonic() - started, 6)
    asked = False
    try:
        said, closed = await _read_reply(reader, min(_PATIENCE, reply))
        if not said and not closed:
            asked = True
            writer.write(_NO_LENGTH)
            said, closed = await _read_reply(reader, reply)
        if asked and not said and not closed:
            writer.write(_TOO_LONG)
            said, closed = await _read_reply(reader, reply)
    finally:
        writer.transport.abort()
    found = ProbeResult(True, *_judge(said, asked=asked, closed=closed), said, took)
    if found.family == "qmail":
        said = await _second_answer(host, port, path, connect, reply)
        if said == _MALFORMED:
            words = "it says D to a netstring that holds no message, as qrelay does"
            return replace(found, family="qrelay", words=words, said=said)
    return found


async def _connected(
    host: str | None, port: int, path: str | None, seconds: float
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    opening = asyncio.open_unix_connection(path) if path else asyncio.open_connection(host, port)
    return await asyncio.wait_for(opening, seconds)


async def _second_answer(
    host: str | None, port: int, path: str | None, connect: float, reply: float
) -> bytes:
    """What a server that closes at a bad length says to a whole netstring without a message; empty:
    nothing."""
    try:
        reader, writer = await _connected(host, port, path, connect)
    except OSError:
        return b""
    try:
        writer.write(_NO_MESSAGE)
        return (await _read_reply(reader, reply))[0]
    finally:
        writer.transport.abort()


async def _read_reply(reader: asyncio.StreamReader, seconds: float) -> tuple[bytes, bool]:
    """What the server says in that time, and whether it has closed."""
    said = b""
    try:
        async with asyncio.timeout(seconds):
            while len(said) < _LONGEST and not said.endswith(b","):
                if not (more := await reader.read(_LONGEST)):
                    return said, True
                said += more
    except TimeoutError:
        pass
    except OSError:
        return said, True
    return said, False


def _judge(said: bytes, *, asked: bool, closed: bool) -> tuple[bool | None, str, str]:
    """Whether we are let in, the family, and that in words."""
    if not said and not asked:
        return (
            None,
            "other",
            "it closed before anything was sent, as tcpserver does to whom it does not let in",
        )
    if not said and closed:
        return True, "qmail", "it closed without a word on what is no request, as qmail-qmqpd does"
    if not said:
        return (
            None,
            "other",
            "it said nothing and kept the connection open, which no known QMQP server does",
        )
    try:
        reply = ReplyParser().feed(said)
    except MalformedReply:
        reply = None
    if reply is None:
        first = "" if asked else ": it spoke first, as SMTP and SSH servers do"
        return None, "other", f"what it said is no QMQP reply{first}"
    if b"not authorized" in reply.text or b"not authorised" in reply.text:
        return False, "postfix", "it does not let us in (in Postfix: qmqpd_authorized_clients)"
    match reply.status:
        case b"K":
            return None, "other", "it accepted what was no message: do not send mail there"
        case b"D" if b"netstring" in reply.text:
            return True, "postfix", "it answers what is no request with a D, as Postfix does"
        case b"Z" if reply.text.startswith(b"netstring format error"):
            return (
                True,
                "postfix",
                "it answers what is no request with a Z, as Postfix does with soft_bounce",
            )
        case b"Z" if b"compressed data" in reply.text:
            return (
                True,
                "qmail-ldap",
                "it takes what is no length for compressed data, as qmail-ldap does",
            )
        case b"Z":
            return True, "mailfront", "it answers what is no request with a Z, as mailfront does"
    return True, "other", "it answers what is no request with a D"
