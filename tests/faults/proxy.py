"""A proxy before PostgreSQL that cuts connections: at random bytes, or around a COMMIT.

It listens on a Unix socket of its own, as PostgreSQL names it, and passes bytes on. Before a
COMMIT the connection breaks without the server having seen it; after a COMMIT the server has
committed, and its answer is lost. `cuts` counts the broken connections.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any, Literal

type CutMode = Literal["", "random", "before COMMIT", "after COMMIT"]

SHARE = 0.2  # of the COMMITs, or of the connections within their first bytes
MEAN_BYTES = 30_000  # that a connection lives for in the mode `random`
_SOCKET = ".s.PGSQL.5432"
_COMMIT = b"COMMIT\0"  # in the client's request as in the tag of the server's answer


class DatabaseProxy:
    """Between `directory`, where clients connect, and `server`, the directory of PostgreSQL's
    socket. Starts at once; `close` ends it."""

    def __init__(self, directory: Path, server: Path, rng: random.Random) -> None:
        self.directory = directory
        self.cuts = 0
        self._server = server
        self._rng = rng
        self._mode: CutMode = ""
        self._open: set[ProxiedConnection] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="database-proxy", daemon=True)
        self._thread.start()
        self._listener = self._call(
            asyncio.start_unix_server(self._serve, str(directory / _SOCKET))
        )

    @contextmanager
    def cutting(self, mode: CutMode) -> Iterator[None]:
        """Cut connections in this way, those that are open too, as long as the block runs."""
        self._mode = mode
        try:
            yield
        finally:
            self._mode = ""

    def close(self) -> None:
        async def stop() -> None:
            self._listener.close()
            for connection in [*self._open]:
                connection.cut()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self._call(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call[Value](self, coroutine: Coroutine[Any, Any, Value]) -> Value:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server = await asyncio.open_unix_connection(str(self._server / _SOCKET))
        except OSError:  # the server is away
            writer.transport.abort()
            return
        connection = ProxiedConnection(self, (reader, writer), server)
        task = asyncio.current_task()
        assert task is not None
        self._open.add(connection)
        self._tasks.add(task)
        try:
            await connection.run()
        finally:
            self._open.discard(connection)
            self._tasks.discard(task)

    def draw_budget(self) -> int:
        """The bytes for which a connection lives in the mode `random`."""
        return 1 + int(self._rng.expovariate(1 / MEAN_BYTES))

    def chooses(self, mode: CutMode) -> bool:
        """Whether to cut now, as this mode does."""
        return self._mode == mode and (mode == "random" or self._rng.random() < SHARE)


type _Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class ProxiedConnection:
    """One connection of a client, and ours to the server."""

    def __init__(self, proxy: DatabaseProxy, client: _Streams, server: _Streams) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._budget = proxy.draw_budget()
        self._answer_lost = False  # to the COMMIT that is under way

    async def run(self) -> None:
        requests = asyncio.create_task(self._pass_on(self._client[0], self._server[1], self._ask))
        answers = asyncio.create_task(self._pass_on(self._server[0], self._client[1], self._answer))
        await asyncio.wait([requests, answers], return_when=asyncio.FIRST_COMPLETED)
        self.cut()
        await asyncio.gather(requests, answers, return_exceptions=True)

    def cut(self) -> None:
        for _, writer in (self._client, self._server):
            writer.transport.abort()

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        filtered: Callable[[bytes], bytes],
    ) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                allowed = self._spend(filtered(data))
                writer.write(allowed)
                if len(allowed) < len(data):
                    with suppress(TimeoutError):  # the peer may be stopped
                        await asyncio.wait_for(writer.drain(), 1.0)
                    self._proxy.cuts += 1
                    return
                await writer.drain()

    def _spend(self, data: bytes) -> bytes:
        """As much of the data as the budget allows, in the mode `random`."""
        if not self._proxy.chooses("random"):
            return data
        data = data[: self._budget]
        self._budget -= len(data)
        return data if self._budget else data[:-1]

    def _ask(self, data: bytes) -> bytes:
        if _COMMIT in data:
            if self._proxy.chooses("before COMMIT"):
                return b""
            self._answer_lost = self._proxy.chooses("after COMMIT")
        return data

    def _answer(self, data: bytes) -> bytes:
        return b"" if self._answer_lost and _COMMIT in data else data
