"""Asks a server of which kind it is, without giving it a message.

The protocol has no command that only asks, so the probe breaks it at the first byte: no message
begins with `x`, so no server can accept one. If the server then closes, a second connection brings
a whole netstring that is too short for a message, `1:x,`. The answers tell the families apart:

    Postfix     a D "netstring format error" after a second (a Z with soft_bounce); or, before
                anything is sent, a D that this client is not authorized
    mailfront   a Z
    qmail-ldap  a Z about compressed data: its qmqpd takes a byte that is no digit for zlib (without
                zlib it is as qmail)
    qmail       closes without a reply, as qmqp-sink and all that follow the letter of the protocol
                do; its tcpserver closes before anything is sent, if this client is not allowed.
                Before 2022 it took any byte for a digit, as indimail's still does: it closes when
                it has seen too many of them
    qrelay      closes as qmail does; to the whole netstring it replies D "malformed input", where
                qmail closes again
    qmqp-relay  a D "Malformed request" at once; or, before anything is sent, a Z that this client
                is not authorized
    others      an SMTP or SSH banner, a reply that is no netstring, a K (which no server may give
                here), or silence

A probe cannot find out how large a message may be: it would have to begin one. What must stay true:
nothing is sent that can become a message. Sources: qmail-qmqpd.c (exits on a bad length before it
opens the queue), that of qmail-ldap (saferead), Postfix qmqpd(8), mailfront protocol-qmqp.c,
qrelay.
"""

import asyncio
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from time import monotonic

from qmqp import PORT
from qmqp.reply import MalformedReply, ReplyParser

_NO_LENGTH = b"x"
_TOO_LONG = b"x" * 9  # after the first: ten are too long for qmail, whatever it takes an `x` for
_NO_MESSAGE = b"1:x,"  # the shortest request is longer
_QRELAY_REPLY = b"16:Dmalformed input,"
_READ_SIZE = 4096
# A server that refuses this client does so before it has read anything. Postfix waits for a second
# first (qmqpd_error_delay).
REFUSAL_DELAY = 1.5

type Verdict = tuple[bool | None, str, str]  # allowed, family, and both as a sentence

_REFUSED = (
    False,
    "postfix",
    "it does not authorize this client (in Postfix: qmqpd_authorized_clients)",
)
# Status and text of a reply, and what they show. The first row holds.
_REPLIES: tuple[tuple[bytes, bytes, Verdict], ...] = (
    (
        b"Z",
        b"Client is not authorized to use this service",
        (False, "qmqp-relay", "it does not authorize this client (RELAY_QMQP_CLIENT_NETWORKS)"),
    ),
    (b"KZD", b"not authorized", _REFUSED),
    (b"KZD", b"not authorised", _REFUSED),
    (b"K", b"", (None, "other", "it accepted an invalid request: do not send mail there")),
    (b"D", b"netstring", (True, "postfix", "it replies D to an invalid request, as Postfix does")),
    (
        b"D",
        b"Malformed request",
        (True, "qmqp-relay", "it replies D to an invalid request, as qmqp-relay does"),
    ),
    (b"D", b"", (True, "other", "it replies D to an invalid request")),
    (
        b"Z",
        b"netstring format error",
        (True, "postfix", "it replies Z to an invalid request, as Postfix does with soft_bounce"),
    ),
    (
        b"Z",
        b"compressed data",
        (True, "qmail-ldap", "it treats an invalid length as compressed data, as qmail-ldap does"),
    ),
    (b"Z", b"", (True, "mailfront", "it replies Z to an invalid request, as mailfront does")),
)
# The same for a server without a reply: whether it was asked, and whether it has closed.
_SILENCES: dict[tuple[bool, bool], Verdict] = {
    (False, True): (
        None,
        "other",
        "it closed before anything was sent, as tcpserver does to a client that is not allowed",
    ),
    (True, True): (
        True,
        "qmail",
        "it closed without a reply to an invalid request, as qmail-qmqpd does",
    ),
    (True, False): (
        None,
        "other",
        "it sent nothing and kept the connection open, which no known QMQP server does",
    ),
}


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The result of a probe. `allowed`: None if the probe cannot tell. `family`: postfix, qmail,
    qmail-ldap, mailfront, qrelay, qmqp-relay, other or none. `said`: the server's bytes,
    bounded."""

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
    server = (host, port, path, connect)
    waits = {b"": min(REFUSAL_DELAY, reply), _NO_LENGTH: reply, _TOO_LONG: reply}
    try:
        received, asked, seconds = await _ask(server, waits)
        verdict = _classify(received, asked=asked)
        result = ProbeResult(True, *verdict, received or b"", seconds)
    except UnicodeError:
        return ProbeResult(False, None, "none", "no connection: that is not a host name")
    except OSError as error:
        known = error.errno is not None and error.errno > 0
        reason = os.strerror(error.errno or 0) if known else error.strerror or str(error)
        return ProbeResult(False, None, "none", f"no connection: {reason or 'timed out'}")
    if result.family == "qmail":
        with suppress(OSError):
            received, _, _ = await _ask(server, {_NO_MESSAGE: reply})
        if received == _QRELAY_REPLY:
            text = "it replies D to a netstring without a message, as qrelay does"
            return replace(result, family="qrelay", words=text, said=_QRELAY_REPLY)
    return result


async def _ask(
    server: tuple[str | None, int, str | None, float], waits: dict[bytes, float]
) -> tuple[bytes | None, bool, float]:
    """Send one text after the other, and wait for so many seconds after each, until the server
    replies or closes.

    Returns its bytes (b"": it closed, None: it did neither), whether a text that is not empty
    was sent, and the seconds until it was connected."""
    host, port, path, seconds = server
    started = monotonic()
    opening = asyncio.open_unix_connection(path) if path else asyncio.open_connection(host, port)
    reader, writer = await asyncio.wait_for(opening, seconds)
    connected = round(monotonic() - started, 6)
    received, text = None, b""
    try:
        for text, seconds in waits.items():
            writer.write(text)
            received = await _read_reply(reader, seconds)
            if received is not None:
                break
    finally:
        writer.transport.abort()
    return received, text != b"", connected


async def _read_reply(reader: asyncio.StreamReader, seconds: float) -> bytes | None:
    """The bytes that come in that time; b"" if the server closed without any, None if it did not
    close either."""
    received = b""
    try:
        async with asyncio.timeout(seconds):
            while len(received) < _READ_SIZE and not received.endswith(b","):
                if not (data := await reader.read(_READ_SIZE)):
                    break
                received += data
    except TimeoutError:
        return received or None
    except OSError:  # a reset
        pass
    return received


def _classify(received: bytes | None, *, asked: bool) -> Verdict:
    if not received:
        return _SILENCES[asked, received is not None]
    try:
        reply = ReplyParser().feed(received)
    except MalformedReply:
        reply = None
    if reply is None:
        first = "" if asked else ": it sent text first, as SMTP and SSH servers do"
        return None, "other", f"it did not send a QMQP reply{first}"
    return next(
        verdict
        for statuses, text, verdict in _REPLIES
        if reply.status in statuses and text in reply.text
    )
