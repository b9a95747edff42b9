"""What a transfer waits for: one piece of news at a time, and never for ever."""

import asyncio
from time import monotonic

LATE = 1.0  # seconds; a timer that is late by more than this tells that the process stood still


class Stopped(Exception):
    """Somebody here wants no more of it."""


class Wakeup:
    """A place to wait. Whoever has news calls `wake`, which says nothing but that it is worth
    looking again: whoever waits looks at its own conditions before and after."""

    __slots__ = ("_news", "stopped")

    def __init__(self) -> None:
        self._news: asyncio.Future[bool] | None = None
        self.stopped = False

    def wake(self, *_: object) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(True)

    def stop(self) -> None:
        """Let the present wait and all later ones raise Stopped."""
        self.stopped = True
        self.wake()

    async def until(self, deadline: float) -> None:
        """Wait for news. Raises TimeoutError when `monotonic()` comes to `deadline`, Stopped."""
        if not self.stopped:
            seconds = deadline - monotonic()
            if seconds <= 0:  # news may come as quickly as we wait: only the clock ends that
                raise TimeoutError
            loop = asyncio.get_running_loop()
            self._news = news = loop.create_future()
            alarm = loop.call_later(seconds, _expire, news, deadline)
            try:
                if not await news:
                    raise TimeoutError
            finally:
                alarm.cancel()
        if self.stopped:
            raise Stopped("stopped before the commit point")


def _expire(news: asyncio.Future[bool], deadline: float) -> None:
    if news.done():
        return
    now = monotonic()
    if now - deadline > LATE:
        # A process that was stopped (SIGSTOP, a paused machine) has not looked at its sockets for
        # all that time, and what its peers sent meanwhile may still be on its way: RFC 6298 spaces
        # retransmissions by a second and more. So such a timer says nothing about the peer, and the
        # deadline counts only after another second of listening.
        news.get_loop().call_later(LATE, _expire, news, now + LATE)
    else:
        news.set_result(False)
