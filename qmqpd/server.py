"""The connection of a QMQP client.

A client that is not authorized gets its Z before it has sent anything. A reply ends the connection
in order: the relay closes its side, and reads what still comes until the client closes too. If it
closed at once with bytes unread, the kernel would reset the connection, and the client might lose
the reply and send the message again.

What must stay true: the bytes and the time of that rest are bounded, and so is the number of
refused clients. A client that closes its side after the last comma still gets its reply; one that
closes before leaves nothing.
"""

import time

from qmqpd.session import NOT_AUTHORIZED, QmqpSession, RequestState
from reception.connection import LINGER_TIMEOUT, MailConnection
from reception.server import Door, FrontEnd
from relay.listeners import Listener

DISCARD_LIMIT = 1 << 20
"""Octets that a client may send after its reply."""
REFUSED_LIMIT = 32
"""Connections that were not admitted and wait for their client to close. Further ones are closed at
once, so that strangers hold no more descriptors; they may lose the reply, which is temporary."""
_COMPLETE = (RequestState.ASKING, RequestState.AWAIT_REPLY)


class QmqpConnection(MailConnection):
    """One QMQP client's connection."""

    session: QmqpSession

    def __init__(
        self, server: FrontEnd, door: Door, listener: Listener, proxied: str | None = None
    ) -> None:
        super().__init__(server, door, listener, proxied)
        self._half_closed = False  # by the client
        self._discarded = 0  # octets after the reply
        self._latest = time.monotonic() + server.settings.session_timeout

    def data_received(self, data: bytes) -> None:
        if self.session.closed:
            self._discard(len(data))
            return
        if self.early is not None:
            self._take_early(data)
            return
        events = self.session.receive(data)
        if not self.session.idle:
            # The first timeout runs for the lengths as a whole, not between their octets.
            self._extend()
        self._handle(events)

    def eof_received(self) -> bool:
        # The client may close its side behind the request, and read the reply.
        self._half_closed = self.session.state in _COMPLETE or self.early is not None
        return self._half_closed

    def _open(self) -> None:
        settings = self._server.settings
        self.session = QmqpSession(
            self.client,
            settings.hostname,
            self._server.max_size,
            settings.max_recipients,
            self._hooks.hooks if self._hooks is not None else (),
        )

    def _admit(self) -> str | None:
        return super()._admit() if self.client.trusted else NOT_AUTHORIZED

    def _start(self) -> None:
        self._ask_to_connect()  # QMQP has no banner

    def _continue(self) -> None:
        if self.reading_paused or self.reception is not None:
            self._throttle()

    def _throttle(self) -> None:
        self._pause_reading(self._congested)

    def _close(self) -> None:
        refused = len(self._server.connections) - self._server.admitted
        crowded = self._admitted is None and refused > REFUSED_LIMIT
        if self._half_closed or self._server.stopping or crowded:
            super()._close()
        elif not self.transport.is_closing():
            self.transport.write_eof()
            if self.reading_paused:
                self.reading_paused = False
                self.transport.resume_reading()

    def _discard(self, octets: int) -> None:
        """Reads what follows the reply, within limits. The rest of a request that has a D may take
        as long as an accepted one."""
        unread = self.session.unread - self._discarded
        self._discarded += octets
        if self._discarded > max(DISCARD_LIMIT, self.session.unread):
            self.transport.abort()
        elif unread > octets:
            self._extend()
            self.deadline = min(self.deadline, self._latest)
        elif unread > 0:
            self.deadline = time.monotonic() + LINGER_TIMEOUT
