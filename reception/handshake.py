"""The TLS handshake of a connection that a client has opened, and what it settled.

The handshake takes the transport over when `handshake` is called (by an eager task), and the
caller's protocol gets nothing until it has ended. What was sent in plain text before is the
caller's to discard; what a client sends behind its own handshake is returned as `early`.

What must stay true: a handshake ends within HANDSHAKE_TIMEOUT, and its failure is an OSError. No
octet of plain text is ever returned as decrypted (CVE-2011-0411).
"""

import asyncio
import ssl
from typing import NamedTuple

from reception.envelope import TlsState
from relay.log import escaped

HANDSHAKE_TIMEOUT = 30.0  # seconds
LONGEST_SUBJECT = 255
_SHORT = {
    "commonName": "CN",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "domainComponent": "DC",
    "userId": "UID",
}
"""The names of RFC 4514 (3) for those of OpenSSL."""


class SecureConnection(NamedTuple):
    """A connection after its handshake; `early` is what the client has sent behind it."""

    transport: asyncio.Transport
    state: TlsState
    early: bytes


class _Buffer(asyncio.Protocol):
    """Keeps what arrives between the end of the handshake and the return of `handshake`."""

    def __init__(self) -> None:
        self.early = b""
        self.lost = False

    def data_received(self, data: bytes) -> None:
        self.early += data

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True


async def handshake(
    loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, context: ssl.SSLContext
) -> SecureConnection:
    """Waits for the handshake of the client; raises OSError. The protocol of the transport that is
    returned has yet to be set."""
    buffer = _Buffer()
    secure = await loop.start_tls(
        transport,
        buffer,
        context,
        server_side=True,
        ssl_handshake_timeout=HANDSHAKE_TIMEOUT,
    )
    # uvloop has no cipher if the client reset the connection just now.
    settled = secure.get_extra_info("cipher") if secure is not None else None
    if secure is None or settled is None or buffer.lost:
        raise ConnectionResetError("the client closed the connection")
    cipher, protocol, _bits = settled
    subject = _subject(secure.get_extra_info("peercert"))
    return SecureConnection(secure, TlsState(protocol, cipher, subject), buffer.early)


def handshake_fault(error: OSError) -> str:
    """Why a handshake failed, as one line: OpenSSL's reason, or that of the connection."""
    reason = error.reason if isinstance(error, ssl.SSLError) else None
    return escaped((reason or error.strerror or str(error) or type(error).__name__).lower())


def _subject(certificate: dict[str, object] | None) -> str | None:
    """The subject of a certificate in the order of RFC 4514, or its first alternative name."""
    if not certificate:
        return None
    parts = [
        f"{_SHORT.get(name, name)}={value}"
        for relative in reversed(certificate.get("subject", ()))  # type: ignore[call-overload]
        for name, value in relative
    ]
    others: tuple[tuple[str, str], ...] = certificate.get("subjectAltName", ())  # type: ignore[assignment]
    text = ",".join(parts) or ":".join(others[0] if others else ("serial", "unknown"))
    return escaped(text, LONGEST_SUBJECT)
