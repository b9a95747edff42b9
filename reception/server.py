"""The front end: sockets, and every limit of time and number, whatever the protocol.

A process has one front end with one or more doors. A `Door` is a protocol with its addresses and
its policy; it makes a connection object for each client. The limits count the connections of all
doors together. One clock tick a second checks the deadlines of all connections, so that no
connection needs a timer.

What must stay true: a deadline counts only after the input that had arrived by then was read.
Timers run before sockets, so a process that was stopped would find every deadline passed, and would
refuse messages that are stored.
"""

import asyncio
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from reception.authentication import Authenticator
from reception.envelope import Refused
from reception.hooks import HookHost
from reception.listeners import SystemdSockets
from reception.policy import ClientPolicy, Policy
from reception.proxy import ProxyConnection, ProxyNetworks
from reception.receiver import Receiver
from relay import metrics
from relay.listeners import Listener
from relay.log import get_logger
from relay.settings import SettingsError, SmtpdSettings
from relay.tls import CertificatePair

if TYPE_CHECKING:
    from reception.connection import MailConnection

LISTEN_BACKLOG = 1024
"""Connections that wait to be accepted."""
IDLE_TIME = 10.0
"""Seconds without a command after which a session outside of a transaction may be closed for
another connection."""
SEARCH_INTERVAL = 1.0
"""Seconds until the next search for such a session, when none was found."""
LATE_TICK = 1.0
"""Seconds that a clock tick may be late. After a later one the process, or its machine, has stood
still, and the lost time counts against neither the clients nor the spooler."""
READ_DELAY = 0.01
"""Seconds from a tick to the check of deadlines: the loop reads in between what has arrived."""
STOPPING = "421 4.3.2 Service is stopping"

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Door:
    """The way in by one protocol. `setting` has its listeners; `connection` serves a client, whose
    address is given if a proxy has sent it."""

    name: str
    setting: str
    policy: Policy
    connection: "Callable[[FrontEnd, Door, Listener, str | None], MailConnection]"


@dataclass(slots=True)
class FrontEnd:
    """The state that all connections share. `size_limit` is called every second, because routes may
    change it; `max_size` is its last value, for connections that begin.

    A connection whose descriptor is `last_descriptor` or higher pauses accepting.
    """

    loop: asyncio.AbstractEventLoop
    settings: SmtpdSettings
    receiver: Receiver
    size_limit: Callable[[], int]
    authenticator: Authenticator
    last_descriptor: float = math.inf
    certificate: CertificatePair | None = None
    hooks: HookHost | None = None  # None without plugins
    connections: "set[MailConnection]" = field(default_factory=set)
    sessions: Counter[str] = field(default_factory=Counter)  # connections by the name of their door
    clients: Counter[str] = field(default_factory=Counter)  # admitted connections by network
    admitted: int = 0
    untrusted: int = 0  # of the admitted ones
    stopping: bool = False
    next_tick: float = math.inf
    max_size: int = field(init=False)
    _next_search: float = 0.0  # for an idle session (monotonic)
    _proxies: ProxyNetworks = field(init=False)
    _servers: list[asyncio.Server] = field(default_factory=list)
    # These stay open while accepting pauses.
    _sockets: list[tuple[socket.socket, Door, Listener]] = field(default_factory=list)
    _resuming: asyncio.Task[None] | None = None
    _clock: asyncio.TimerHandle | None = None
    _empty: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._proxies = ProxyNetworks(self.settings.proxy_networks)

    async def listen(
        self, door: Door, listeners: Iterable[Listener], passed: SystemdSockets | None = None
    ) -> list[str]:
        """Listens on these addresses ('' means every one, port 0 any free port) and on the sockets
        of systemd; returns what is in use, as it is written in the setting. Raises SettingsError
        that names the listener and the setting."""
        before = len(self._sockets)
        self._set_size_limit()
        for listener in listeners:
            try:
                await self._listen_on(door, listener, passed)
            except (OSError, SettingsError) as error:
                await self.stop(0.0)
                errno = error.errno if isinstance(error, OSError) else None
                reason = os.strerror(errno) if errno else str(error)
                raise SettingsError(
                    f"cannot listen on {listener}: {reason}; {door.setting} sets the address"
                ) from error
        if self._clock is None:
            self.tick()
        return [
            listener.at(*each.getsockname()[:2]) for each, _, listener in self._sockets[before:]
        ]

    async def _listen_on(
        self, door: Door, listener: Listener, passed: SystemdSockets | None
    ) -> None:
        connect = self._protocol_factory(door, listener)
        if listener.socket_name:
            sockets = (passed or SystemdSockets({})).take(listener.socket_name)
            opened = [
                await self.loop.create_server(connect, sock=each, backlog=LISTEN_BACKLOG)
                for each in sockets
            ]
        else:
            host, port = listener.host or None, listener.port
            opened = [await self.loop.create_server(connect, host, port, backlog=LISTEN_BACKLOG)]
        self._servers += opened
        self._sockets += [
            (socket.socket(fileno=os.dup(each.fileno())), door, listener)
            for server in opened
            for each in server.sockets
        ]

    def _protocol_factory(
        self, door: Door, listener: Listener
    ) -> Callable[[], asyncio.BaseProtocol]:
        connect = partial(door.connection, self, door, listener)
        if not listener.proxy:
            return connect
        return partial(ProxyConnection, self.loop, self._proxies, connect, self.watch_descriptors)

    async def stop(self, drain: float) -> None:
        """Ends every session. Transactions in progress have `drain` seconds to finish."""
        self.stopping = True
        self._close_listeners()
        for listening, *_ in self._sockets:
            listening.close()
        for connection in tuple(self.connections):
            connection.stop(idle=True)
        if self.connections and drain > 0:
            try:
                await asyncio.wait_for(self._empty.wait(), drain)
            except TimeoutError:
                log.warning("stopping with sessions open", sessions=len(self.connections))
                await asyncio.sleep(READ_DELAY)
        for connection in tuple(self.connections):
            connection.stop()
        if self._clock is not None:
            self._clock.cancel()

    def admit(self, client: ClientPolicy) -> str | None:
        """Counts a connection, or returns the reply that refuses it.

        A quarter of the connections is reserved for trusted clients. A refused connection is not
        counted, so that a burst of them takes no slots while their replies leave.
        """
        limit = self.settings.max_connections
        if self.stopping:
            return STOPPING
        if self.clients[client.network] >= self.settings.max_connections_per_client:
            return "421 4.7.0 Too many connections from your address"
        try:
            client.check_rate("connections")
        except Refused as refused:
            return f"421{str(refused)[3:]}"  # the connection ends
        full = self.admitted >= limit or (
            not client.trusted and self.untrusted >= limit - limit // 4
        )
        if full and not self._close_idle(client):
            return "421 4.3.2 Too many connections, try again later"
        self.count(client, 1)
        return None

    def _close_idle(self, newcomer: ClientPolicy) -> bool:
        """Closes the session that has been idle for the longest time, if there is one; untrusted
        clients first, and for an untrusted newcomer no others. A search that found none is not
        repeated at once, because it looks at every connection."""
        now = time.monotonic()
        if now < self._next_search:
            return False
        latest = now - IDLE_TIME + self.settings.smtp_timeout
        idle = [
            connection
            for connection in self.connections
            if connection.deadline < latest and connection.may_yield_to(newcomer)
        ]
        if not idle:
            self._next_search = now + SEARCH_INTERVAL
            return False
        min(idle, key=lambda each: (each.session.client.trusted, each.deadline)).yield_place()
        return True

    def add(self, connection: "MailConnection", door: Door) -> None:
        """A connection has begun."""
        self.connections.add(connection)
        self.sessions[door.name] += 1
        metrics.sessions(door.name).inc()

    def remove(
        self, connection: "MailConnection", door: Door, admitted: ClientPolicy | None
    ) -> None:
        """A connection has ended; `admitted` is its client if it was counted."""
        if admitted is not None:
            self.count(admitted, -1)
        self.connections.discard(connection)
        self.sessions[door.name] -= 1
        if self.stopping and not self.connections:
            self._empty.set()

    def count(self, client: ClientPolicy, change: int) -> None:
        """Adds to the admitted connections of a client, or takes one away."""
        self.admitted += change
        self.untrusted += 0 if client.trusted else change
        self.clients[client.network] += change
        if not self.clients[client.network]:
            del self.clients[client.network]

    def watch_descriptors(self, transport: asyncio.Transport) -> None:
        """Pauses accepting if this connection has one of the last descriptors."""
        if transport.get_extra_info("socket").fileno() >= self.last_descriptor:
            self.pause()

    def pause(self) -> None:
        """Accepts no more until descriptors are free. Clients wait in the listen queue of the
        kernel, because the sockets stay open."""
        if self._servers and not self.stopping:
            self._close_listeners()
            log.warning("accepting paused", sessions=len(self.connections))

    async def _resume(self) -> None:
        """Accepts again if descriptors are free. A new descriptor shows that, because it has the
        lowest free number."""
        with suppress(OSError), self._sockets[0][0].dup() as lowest:
            if lowest.fileno() + len(self._sockets) > self.last_descriptor:
                return
            for listening, door, listener in self._sockets:
                connect = self._protocol_factory(door, listener)
                self._servers.append(
                    await self.loop.create_server(
                        connect, sock=listening.dup(), backlog=LISTEN_BACKLOG
                    )
                )
        if self.stopping:
            self._close_listeners()
        else:
            log.info("accepting resumed", sessions=len(self.connections))

    def _close_listeners(self) -> None:
        for server in self._servers:
            server.close()
        self._servers.clear()

    def tick(self) -> None:
        """The clock: once a second, or more often for short timeouts."""
        now = time.monotonic()
        self._set_size_limit()
        if self.certificate is not None:
            self.certificate.refresh()
        if not self._servers and not self.stopping:
            self._resuming = self.loop.create_task(self._resume())
        late = now > self.next_tick + LATE_TICK
        pause = min(1.0, self.settings.smtp_timeout / 4, self.settings.accept_deadline / 4)
        self.next_tick = now + pause
        if late:
            for connection in self.connections:
                connection.restart_rate(now)
            self._clock = self.loop.call_later(pause, self.tick)
        else:
            self._clock = self.loop.call_later(READ_DELAY, self.check_deadlines, now)

    def _set_size_limit(self) -> None:
        """Open sessions keep the limit that they were offered."""
        self.max_size = self.size_limit()

    def check_deadlines(self, now: float) -> None:
        """Ends connections and requests that were overdue at the tick, `now`, and still are."""
        for connection in tuple(self.connections):
            connection.check_deadlines(now)
        self.receiver.spooler.check_deadlines(now)
        self._clock = self.loop.call_later(max(0.0, self.next_tick - time.monotonic()), self.tick)
