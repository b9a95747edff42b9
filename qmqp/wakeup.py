"""A wakeup: a coroutine waits for it with a deadline, and callbacks notify it."""

import asyncio
import socket
from time import monotonic

LATE = 1.0  # seconds; a timer that is later than this shows that the process was stopped


class Stopped(Exception):
    """This side has ended the transfer."""


class Wakeup:
    """Wakes one waiting coroutine. A notification carries no data: the coroutine checks its own
    conditions before it waits and after it wakes."""

    __slots__ = ("_future", "stopped")

    def __init__(self) -> None:
        self._future: asyncio.Future[bool] | None = None
        self.stopped = False

    def notify(self, *_: object) -> None:
        """End the present wait. Takes and ignores the arguments of a callback."""
        if self._future is not None and not self._future.done():
            self._future.set_result(True)

    def stop(self) -> None:
        """Let the present wait and all later ones raise Stopped."""
        self.stopped = True
        self.notify()

    async def wait(self, deadline: float) -> None:
        """Wait for a notification. Raises TimeoutError when `monotonic()` reaches `deadline`, and
        Stopped."""
        if not self.stopped:
            seconds = deadline - monotonic()
            if seconds <= 0:  # notifications may come without a pause: only the clock ends the loop
                raise TimeoutError
            loop = asyncio.get_running_loop()
            self._future = future = loop.create_future()
            timer = loop.call_later(seconds, _expire, future, deadline)
            try:
                if not await future:
                    raise TimeoutError
            finally:
                timer.cancel()
        if self.stopped:
            raise Stopped("stopped before the commit point")

    async def wait_writable(self, sock: socket.socket, deadline: float) -> None:
        """Wait until the kernel has room for more bytes, or for a notification."""
        loop = asyncio.get_running_loop()
        loop.add_writer(sock.fileno(), self.notify)
        try:
            await self.wait(deadline)
        finally:
            loop.remove_writer(sock.fileno())


def _expire(future: asyncio.Future[bool], deadline: float) -> None:
    if future.done():
        return
    now = monotonic()
    if now - deadline > LATE:
        # A process that was stopped (SIGSTOP, a paused machine) has not read its sockets meanwhile,
        # and what its peers sent may still be on its way: RFC 6298 spaces retransmissions by a
        # second and more. Such a timer says nothing about the peer, so the deadline counts only
        # after another second of listening.
        future.get_loop().call_later(LATE, _expire, future, now + LATE)
    else:
        future.set_result(False)
