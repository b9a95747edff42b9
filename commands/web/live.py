"""Live pages: a stream of server-sent events that says when there is something new.

The script of the page reads the stream, loads the page again on an event, and replaces its content;
so a live page shows what a reload shows. A stream ends when its session does, and when the server
stops.

What must stay true: streams are limited, so that they leave connections for pages, and together
they occupy one thread while the overview is read.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from commands.web.access import Access, LoginNeeded
from commands.web.overview import Overview

INTERVAL = 2.0  # seconds between two looks
MAX_STREAMS = 40


class LiveStreams:
    """The open streams of one process."""

    def __init__(self, overview: Overview, access: Access) -> None:
        self._overview, self._access = overview, access
        self._open = 0
        self._looking = asyncio.Lock()
        self._version, self._looked_at = 0, float("-inf")
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """End all streams."""
        self._stopped.set()

    async def stream(self, request: Request) -> Response:
        """A stream of events: `data` is a number that changes when there is something new."""
        await run_in_threadpool(self._access.visitor, request)
        if self._open >= MAX_STREAMS:
            raise HTTPException(503, "Too many live pages are open. Reload the page instead.")
        return StreamingResponse(self._events(request), media_type="text/event-stream")

    async def _events(self, request: Request) -> AsyncIterator[str]:
        self._open += 1
        try:
            yield "retry: 5000\n\n"
            version = None
            while not self._stopped.is_set():
                try:
                    await run_in_threadpool(self._access.visitor, request)
                    new = await self._look()
                except LoginNeeded:
                    yield "event: ended\ndata: 0\n\n"
                    return
                # A comment shows both ends that the other is still there.
                yield ": \n\n" if new == version else f"data: {new}\n\n"
                version = new
                await self._pause()
        finally:
            self._open -= 1

    async def _look(self) -> int:
        """The version of the overview; one thread looks for all streams."""
        async with self._looking:
            now = asyncio.get_running_loop().time()
            if now - self._looked_at >= INTERVAL:
                self._version = await run_in_threadpool(self._overview.version)
                self._looked_at = now
            return self._version

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), INTERVAL)
