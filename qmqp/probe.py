"""Asks a server what it is, without giving it a message.

How it works: the protocol has no command that only asks, so the probe breaks it at the first byte: where a length must
stand no message begins with `x`, so nothing can come of it, whoever listens. What comes back tells the families apart:

    Postfix     a D "netstring format error", a second later; or, before anything is sent, a D that we may not come in
    mailfront   a Z
    qmail       closes without a word, and so do qrelay and whatever follows the letter of the protocol
    others      an SMTP or SSH banner, a reply that is no netstring, a K (which nobody may give here), or silence

Sources: qmail-qmqpd.c (exits on a bad length), Postfix qmqpd(8), mailfront protocol-qmqp.c. What must stay true: no
byte is sent that could be the start of a request.
"""

import asyncio
import os
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

_NO_LENGTH = b"x"
_LONGEST = 4096
# A server that refuses us does so before it has heard anything: Postfix after a second (qmqpd_error_delay).
_PATIENCE = 1.5


@dataclass(frozen=True, slots=True)
class Finding:
    """What a probe found. `family`: postfix, qmail, mailfront, other or none; `said`: the server's bytes, bounded."""

    reachable: bool
    allowed: bool | None
    family: str
    words: str
    said: bytes = b""
    connect_seconds: float = 0.0


async def probe(
    *,
    host: str | None = None,
    port: int = 628,
    path: str | None = None,
    connect: float = 10.0,
    reply: float = 5.0,
) -> Finding:
    """Ask the server at host and port, or at the Unix socket `path`; never raises for what the network does."""
    started = monotonic()
    try:
        opening = asyncio.open_unix_connection(path) if path else asyncio.open_connection(host, port)
        reader, writer = await asyncio.wait_for(opening, connect)
    except (OSError, TimeoutError) as error:
        reason = os.strerror(error.errno) if error.errno else str(error) or "timed out"
        return Finding(False, None, "none", f"no connection: {reason}")
    took = monotonic() - started
    try:
        said, closed = await _hear(reader, min(_PATIENCE, reply))
        if not said and not closed:
            writer.write(_NO_LENGTH)
            said, closed = await _hear(reader, reply)
    finally:
        writer.transport.abort()
    return _judge(said, closed, took)


async def _hear(reader: asyncio.StreamReader, seconds: float) -> tuple[bytes, bool]:
    """What the server says in that time, and whether it has closed."""
    said = b""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while len(said) < _LONGEST:
                try:
                    more = await reader.read(_LONGEST)
                except OSError:
                    return said, True
                if not more:
                    return said, True
                said += more
                if said.endswith(b","):
                    break
    return said, False


def _judge(said: bytes, closed: bool, took: float) -> Finding:
    length, _, rest = said.partition(b":")
    whole = length.isdigit() and rest[:1] in (b"K", b"Z", b"D")
    text = rest[1:].removesuffix(b",")
    if not said:
        if closed:
            return Finding(True, True, "qmail", "it closed without a word, as qmail-qmqpd does", b"", took)
        return Finding(True, None, "other", "it said nothing and kept the connection open", b"", took)
    if not whole:
        return Finding(True, None, "other", "what it said is no QMQP reply", said, took)
    if b"not authorized" in text or b"not authorised" in text:
        return Finding(True, False, "postfix", "it does not let us in", said, took)
    match rest[:1]:
        case b"D" if b"netstring" in text:
            return Finding(True, True, "postfix", "it refuses bad framing with a D, as Postfix qmqpd does", said, took)
        case b"Z":
            return Finding(True, True, "mailfront", "it refuses bad framing with a Z, as mailfront does", said, took)
        case b"K":
            return Finding(True, None, "other", "it accepted what was no message", said, took)
    return Finding(True, True, "other", "it refuses bad framing with a D", said, took)
