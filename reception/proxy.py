"""A connection that begins with a PROXY header, until the front end takes it over.

Only listeners with `/proxy` make one. The peer must be in RELAY_PROXY_NETWORKS, and the header must
be complete within HEADER_TIMEOUT; everything else closes the connection without a reply. Then the
protocol of the front end gets the transport, and the address of the client instead of the peer's.

What must stay true: no octet behind the header is read here. The loop reads into a buffer that is
as long as the header wants, so those octets meet the check before the banner, or the TLS handshake.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import cast

from reception.policy import plain_address
from reception.proxy_header import BadHeader, HeaderReader
from relay import metrics
from relay.log import get_logger
from relay.settings import Network, parse_network

HEADER_TIMEOUT = 5.0  # seconds
READ_DELAY = 0.01
"""Seconds from the deadline to its check: timers run before sockets, so what has arrived by then is
read first."""

log = get_logger(__name__)


class ProxyNetworks:
    """The peers that may send a header."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._networks: tuple[Network, ...] = tuple(map(parse_network, entries))

    def __contains__(self, peer: str) -> bool:
        address = plain_address(peer)
        return any(address in network for network in self._networks)


class ProxyConnection(asyncio.BufferedProtocol):
    """Reads the header. `connect` makes the protocol for a client with this address (None: that of
    the peer); `accepted` is called with the transport of each connection."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        networks: ProxyNetworks,
        connect: Callable[[str | None], asyncio.Protocol],
        accepted: Callable[[asyncio.Transport], None],
    ) -> None:
        self._loop = loop
        self._networks = networks
        self._connect = connect
        self._accepted = accepted
        self._reader = HeaderReader()
        self._buffer = bytearray()
        self._peer = ""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        if not peer:  # the peer has already closed the connection
            transport.abort()
            return
        self._peer = str(plain_address(peer[0]))
        self._accepted(transport)
        if peer[0] not in self._networks:
            self._refuse("the peer is not in RELAY_PROXY_NETWORKS")
            return
        self._timer = self._loop.call_later(HEADER_TIMEOUT, self._on_timeout, READ_DELAY)

    def get_buffer(self, _sizehint: int) -> bytearray:
        self._buffer = bytearray(self._reader.wanted)
        return self._buffer

    def buffer_updated(self, size: int) -> None:
        if self._transport.is_closing():
            return
        try:
            header = self._reader.feed(bytes(self._buffer[:size]))
        except BadHeader as error:
            self._refuse(str(error))
            return
        if header is not None:
            self._stop_timer()
            protocol = self._connect(header.source)
            self._transport.set_protocol(protocol)
            protocol.connection_made(self._transport)

    def connection_lost(self, _error: Exception | None) -> None:
        self._stop_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _on_timeout(self, pause: float) -> None:
        if pause:
            self._timer = self._loop.call_later(pause, self._on_timeout, 0.0)
        else:
            self._refuse("no PROXY header in time")

    def _refuse(self, reason: str) -> None:
        self._stop_timer()
        metrics.PROXY_REFUSALS.inc()
        log.info("proxy connection refused", peer=self._peer, reason=reason)
        self._transport.abort()
