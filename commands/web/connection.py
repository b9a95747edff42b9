"""A connection of the page: it ends when a request does not arrive, or its answer is not read, in
time.

uvicorn limits only the silence after an answer, and accepts no more than 100 connections. What must
stay true: a client that sends or reads nothing occupies a connection for seconds only; a stream of
live events may stay open, as long as the client reads it.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

# Seconds for a request to arrive, and for the client to read the answer.
UNFINISHED_TIMEOUT = 10.0


class TimedProtocol(H11Protocol):
    """A connection with these limits."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._restart_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._restart_timer()

    def _restart_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(UNFINISHED_TIMEOUT, self._on_timeout)

    def _on_timeout(self) -> None:
        # The client waits for us when its request is complete and its answer is not: the database
        # has time limits of its own. There is no cycle before the first request.
        cycle = self.cycle
        complete = cycle is not None and not cycle.more_body  # type: ignore[redundant-expr]
        if complete and not cycle.response_complete and not self.flow.write_paused:
            self._restart_timer()
        else:
            self.transport.abort()
