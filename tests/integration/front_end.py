"""A front end in a thread, with a real spool and spooler, and a list for a database."""

import asyncio
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

import uvloop

from reception.receiver import DiskThreads, Receiver
from reception.server import Door, FrontEnd
from reception.spooler import Spooler
from reception.spooler_client import SpoolerClient
from relay.listeners import Listener, parse_listen
from relay.queue.accept import NewMessage
from relay.settings import SmtpdSettings
from relay.spool.store import Spool
from relay.tls import certificate_pair


class FakeDatabase:
    """Commits to a list. While `gate` is closed a COMMIT waits; `error` is raised by it."""

    def __init__(self) -> None:
        self.messages: list[NewMessage] = []
        self.gate = threading.Event()
        self.gate.set()
        self.taken = threading.Event()
        self.error: Exception | None = None

    def commit(self, messages: Sequence[NewMessage], _begin_by: float) -> list[None]:
        self.taken.set()
        self.gate.wait(20)
        if self.error is not None:
            raise self.error
        self.messages.extend(messages)
        return [None] * len(messages)


class ServerHarness:
    """A front end with one door, in a thread."""

    def __init__(
        self,
        spool: Spool,
        settings: SmtpdSettings,
        bodies_at_once: int,
        door: Callable[[SmtpdSettings], Door],
        listener: Listener = Listener("127.0.0.1", 0),  # noqa: B008 - it is immutable
        new_loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop,
    ) -> None:
        self.listener = listener
        self.certificate = certificate_pair(settings, settings.tls_client_ca)
        self.door = door(settings)
        self.policy = self.door.policy
        self.spool, self.settings, self.bodies_at_once = spool, settings, bodies_at_once
        self.database = FakeDatabase()
        self.hints: list[str] = []
        self.loop = new_loop()
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self.drain = 0.0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._serve())
        self.loop.close()

    async def _serve(self) -> None:
        self.spooler = SpoolerClient(self._keep, lambda ids, _route: self.hints.extend(ids))
        await self.spooler.start()
        self.receiver = Receiver(
            self.spool,
            self.spooler,
            lambda _address: "default",
            self.settings,
            DiskThreads(4),
            asyncio.Semaphore(self.bodies_at_once),
        )
        self.server = FrontEnd(
            self.loop,
            self.settings,
            self.receiver,
            lambda: self.settings.max_message_size,
            certificate=self.certificate,
        )
        [address] = await self.server.listen(self.door, [self.listener])
        self.host, self.port = parse_listen(address.partition("/")[0])
        self._ready.set()
        await self._stop.wait()
        await self.server.stop(self.drain)
        self.database.gate.set()
        await self.spooler.close(10.0)
        await self.loop.run_in_executor(None, self.receiver.threads.close, 10.0)
        await self.server.stop(0.0)

    async def _keep(self, channel: socket.socket) -> None:
        with channel:
            await self.loop.run_in_executor(
                None, Spooler(channel, self.spool, self.database.commit).run
            )

    def ask_to_stop(self, drain: float) -> None:
        self.drain = drain
        self.loop.call_soon_threadsafe(self._stop.set)

    def close(self) -> None:
        with suppress(RuntimeError):  # the loop has been closed since `ask_to_stop`
            self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()
        space = self.policy.space
        assert (space.claimed, space.stored, space.untrusted) == (0, 0, 0), "every claim ended"

    def bodies(self) -> list[str]:
        return [path.name for path in self.spool.directory.glob("*/*")]
