"""A front end in a thread, with a real spool and spooler, and a list for a database."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import uvloop

from reception.authentication import FAILURE_DELAY, Authenticator
from reception.hooks import HookHost
from reception.receiver import DiskThreads, Receiver
from reception.server import Door, FrontEnd
from reception.spooler import Spooler
from reception.spooler_client import SpoolerClient
from relay.listeners import Listener, parse_listen
from relay.queue.accept import EncodedMessage, NewMessage, NewRecipient, SegmentSpan
from relay.settings import SmtpdSettings, load
from relay.spool.journal.directory import JournalDirectory, SegmentFile
from relay.spool.journal.format import Place
from relay.spool.journal.reader import JournalReader
from relay.spool.store import Spool
from relay.tls import certificate_pair
from tests.bodies import body_in
from tests.waiting import until


class FakeDatabase:
    """An acceptor whose rows are a list. While `gate` is closed a COMMIT waits; `error` is raised
    by it. `known`: it is the database of the spool, and never older."""

    known = 0

    def __init__(self) -> None:
        self.messages: list[NewMessage] = []
        self.deliveries: list[str] = []  # of these messages, as JSON
        self.places: dict[str, Place | None] = {}
        self._positions: dict[str, int] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def commit(
        self,
        messages: Sequence[EncodedMessage],
        span: SegmentSpan,
        *,
        age: float = 0.0,
        announced: str | None = None,
    ) -> None:
        assert age >= 0
        assert announced in (None, decoded(messages[0].rows).id)
        self.gate.wait(20)
        if self.error is not None:
            raise self.error
        for encoded in messages:
            message = decoded(encoded.rows)
            self.deliveries.append(encoded.rows.decode().split("\n")[2])
            at = encoded.position
            self.places[message.id] = None if at is None else Place(span.segment, at)
            self.messages.append(message)  # last: a test waits for it, and reads the others
        self._positions[span.segment] = span.end

    def advance(self, _: object) -> None:
        """The mark."""

    def open_segment(self, *_: object) -> None:
        """Its row."""

    def seal_segment(self, *_: object) -> None:
        """Its row."""

    def sealed_segments(self) -> set[str]:
        return set()

    def position(self, segment: str) -> tuple[int | None, bool]:
        return self._positions.get(segment), False

    def learn_from_journal(self, *, unsealed: bool) -> None:
        """As a mark."""


def decoded(rows: bytes) -> NewMessage:
    """The message of which these are the rows."""
    (message,), recipients, deliveries = (
        json.loads(f"[{line}]") for line in rows.decode().split("\n")
    )
    routes = {one["number"]: one["route"] for one in deliveries}
    fields = {name: value for name, value in message.items() if name in NewMessage._fields}
    return NewMessage(
        **fields
        | {
            "id": message["id"].replace("-", ""),
            "recipients": [
                NewRecipient(one["address"], one["notify"], one["orcpt"], routes[one["delivery"]])
                for one in recipients
            ],
        }
    )


class HeldSyncs:
    """Syncs of segments wait until `gate` is set; `taken`: one of them has begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate, self.taken = threading.Event(), threading.Event()
        sync = SegmentFile.sync

        def held(file: SegmentFile) -> None:
            self.taken.set()
            self.gate.wait(20)
            sync(file)

        monkeypatch.setattr(SegmentFile, "sync", held)


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
        *,
        failure_delay: float = FAILURE_DELAY,
        hooks: HookHost | None = None,
    ) -> None:
        self.hooks = hooks
        self.failure_delay = failure_delay
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
        self.spooler = SpoolerClient(
            self._keep,
            lambda ids, _route, _early: self.hints.extend(ids),
            self.settings.accept_deadline,
        )
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
            Authenticator(self.loop, self.settings.database_url, failure_delay=self.failure_delay),
            certificate=self.certificate,
            hooks=self.hooks,
        )
        [address] = await self.server.listen(self.door, [self.listener])
        self.host, self.port = parse_listen(address.partition("/")[0])
        self._ready.set()
        await self._stop.wait()
        await self.server.stop(self.drain)
        if self.hooks is not None:
            await self.hooks.stop()
        await self.server.authenticator.close()
        self.database.gate.set()
        await self.spooler.close(10.0)
        await self.loop.run_in_executor(None, self.receiver.threads.close, 10.0)
        await self.server.stop(0.0)

    async def _keep(self, channel: socket.socket) -> None:
        database: Any = self.database
        with channel:
            spooler = Spooler(
                channel,
                self.spool,
                database,
                database,
                database,
                limit=self.settings.journal_limit,
                segment_size=8 << 20,
            )
            await self.loop.run_in_executor(None, spooler.run)

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
        """The files of large messages."""
        return [path.name for path in self.spool.directory.glob("*/*") if len(path.name) == 32]

    def messages(self, count: int) -> list[NewMessage]:
        """The messages, once so many have rows."""
        until(lambda: len(self.database.messages) >= count)
        assert len(self.database.messages) == count
        return self.database.messages


@contextmanager
def starting[Kind: ServerHarness](
    kind: type[Kind], door: Callable[[SmtpdSettings], Door], spool: Spool, **usual: Any
) -> Iterator[Callable[..., Kind]]:
    """`start(bodies_at_once, **given)`: a server with these settings, and with these arguments of
    `ServerHarness`; `usual` are those of each. All are closed at the end."""
    running: list[Kind] = []

    def start(bodies_at_once: int = 100, **given: Any) -> Kind:
        given = usual | given
        how = {name: given.pop(name) for name in _HOW if name in given}
        settings = load(
            SmtpdSettings,
            state_dir=spool.directory.parent,
            spool_dir=spool.directory,
            hostname="relay.example",
            **given,
        )
        running.append(kind(spool, settings, bodies_at_once, door, **how))
        return running[-1]

    yield start
    for one in running:
        one.close()


_HOW = ("listener", "new_loop", "failure_delay", "hooks")


def body_of(running: ServerHarness, message: NewMessage) -> bytes:
    place = running.database.places[message.id]
    if place is None:
        return body_in(running.spool.path(message.id))
    return JournalReader(JournalDirectory(running.spool.handle)).read(place, message.size)
