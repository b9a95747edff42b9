"""The store: where the event loop hands in messages, and hears when they are safe.

How it works: `put` makes an order of a message. Orders go to the keeper, a process of its own
(reception/spooler.py), as long as it takes them in; the others wait here, where they can be taken
back. The keeper's reports come for a whole round at once. One that dies, or that owes an answer for
far too long, is replaced; what it had been told is in doubt.

What must stay true: everything that was put is answered exactly once: None when it is safe,
`Cancelled` when nothing of it was kept, `CommitUnknown` when nobody knows, else the reason. Only
then comes the hint: it wakes a thread, and clients need not wait for that. While the keeper reads
nothing, no more is held than clients wait for.
"""

import asyncio
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

from reception.spooler_protocol import FIELDS, BatchReply, Cancelled, Frames, StoreRequest, frame
from relay import metrics
from relay.db.group_commit import CommitUnknown
from relay.log import first_line, get_logger
from relay.queue.accept import NewMessage
from relay.settings import SmtpdSettings
from relay.spool.store import Spool

log = get_logger(__name__)
PAUSE, YOUNG = 1.0, 10.0
"""Seconds before a keeper that died before the age of YOUNG seconds is started again."""
PATIENCE = 60.0
"""Seconds past its deadline after which an order that has no answer proves that the keeper
hangs."""

type Launch = Callable[[socket.socket], Coroutine[Any, Any, object]]
type Done = Callable[[Exception | None], None]


class SpoolerError(Exception):
    """No keeper can be started."""


class _Pending(NamedTuple):
    id: str
    routes: tuple[str, ...]
    deadline: float
    done: Done


class SpoolerClient(asyncio.Protocol):
    """Belongs to the loop. `launch` runs a keeper on its end of a socket until that ends;
    cancelled, it ends it.

    `kept` hears the ids of messages that are safe, and their route.
    """

    def __init__(self, launch: Launch, kept: Callable[[list[str], str], None]) -> None:
        self._launch, self._kept = launch, kept
        self._number = 0
        self._pending: dict[int, _Pending] = {}  # in the order in which they were put
        self._waiting: dict[int, bytes] = {}  # those that no keeper was told of
        self._transport: asyncio.Transport | None = None
        self._open = False  # the keeper is there and takes orders in
        self._frames, self._lost = Frames(), asyncio.Event()
        self._life: asyncio.Task[object] | None = None
        self._first: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._observe = metrics.rounds("intake")

    async def start(self) -> None:
        """Start a keeper and wait until it is there; raises KeeperError if the first one ends
        instead."""
        self._first = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run())
        await self._first

    def put(
        self, message: NewMessage, body: list[bytes] | None, deadline: float, done: Done
    ) -> int:
        """Have a message kept; `body` is None when it is stored already. The order's number."""
        self._number += 1
        routes = tuple({recipient.route: None for recipient in message.recipients})
        self._pending[self._number] = _Pending(message.id, routes, deadline, done)
        self._waiting[self._number] = frame(
            StoreRequest(self._number, message, body, deadline).plain()
        )
        self._send()
        return self._number

    def withdraw(self, number: int) -> None:
        """Take an order back, if that can still be done."""
        if self._waiting.pop(number, None) is not None:
            asyncio.get_running_loop().call_soon(self._settle, number, Cancelled())
        elif self._transport is not None:
            self._transport.write(frame(StoreRequest(number).plain()))

    def look_at_clock(self, now: float) -> None:
        """End a keeper that hangs: another one may do better, and this one's clients have long
        heard 451."""
        oldest = next(
            (one for number, one in self._pending.items() if number not in self._waiting), None
        )
        if oldest is not None and self._life is not None and now > oldest.deadline + PATIENCE:
            log.error("keeper hangs, ending it", id=oldest.id)
            self._life.cancel()

    async def close(self, patience: float) -> None:
        """Let the keeper finish what it has, for `patience` seconds at most."""
        self._closing = True
        for number in [*self._waiting]:
            self._settle(number, Cancelled())
        if self._transport is not None:
            self._transport.write_eof()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=patience)
            if self._life is not None:
                self._life.cancel()
            await asyncio.wait([self._task], timeout=1.0)

    # -- told by the line to the keeper
    # -------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        report: BatchReply
        for report in self._frames.feed(data):
            if not report.results:  # its first words
                self.resume_writing()
                if self._first is not None and not self._first.done():
                    self._first.set_result(None)
            kept = [self._pending[number] for number, result in report.results if result is None]
            for number, result in report.results:
                self._settle(number, result)
            if kept:
                self._observe(len(kept), report.seconds)
                for route in {route: None for one in kept for route in one.routes}:
                    self._kept([one.id for one in kept if route in one.routes], route)

    def pause_writing(self) -> None:
        self._open = False

    def resume_writing(self) -> None:
        self._open = True
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport, self._open = None, False
        for number in [number for number in self._pending if number not in self._waiting]:
            self._settle(number, CommitUnknown())
        self._lost.set()

    # -- inside
    # -------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        while self._waiting and self._open and self._transport is not None:
            self._transport.write(self._waiting.pop(next(iter(self._waiting))))

    def _settle(self, number: int, result: Exception | None) -> None:
        self._waiting.pop(number, None)
        pending = self._pending.pop(number, None)
        if pending is not None:
            try:
                pending.done(result)
            except Exception:  # the others still wait for theirs
                log.exception("answer not taken")

    async def _run(self) -> None:
        while True:
            started = time.monotonic()
            try:
                ended = await self._live()
            except Exception as error:  # no process or no socket to spare: there may be one later
                ended = first_line(error)
            if self._closing:
                return None
            if self._first is not None and not self._first.done():
                return self._first.set_exception(
                    SpoolerError(f"the keeper ended when it was started: {ended}")
                )
            pause = PAUSE if time.monotonic() - started < YOUNG else 0.0
            metrics.KEEPERS.inc()
            log.error("keeper died, starting it again", status=ended, seconds=pause)
            await asyncio.sleep(pause)

    async def _live(self) -> object:
        """The life of one keeper; what it ended with."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._frames, self._lost = Frames(), asyncio.Event()
            self._transport, _ = await asyncio.get_running_loop().create_unix_connection(
                lambda: self, sock=ours
            )
            self._life = asyncio.create_task(self._launch(theirs))
            await asyncio.wait([self._life])
        await self._lost.wait()
        return "killed" if self._life.cancelled() else self._life.result()


def launching(settings: SmtpdSettings, spool: Spool) -> Launch:
    """Launches keepers as processes. They get our descriptor of the spool, for its path may name
    another by then."""
    # They run this code, and nothing that lies about where we were started.
    path = os.pathsep.join(
        filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")))
    )

    async def launch(channel: socket.socket) -> object:
        with channel:
            keeper = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "reception.spooler", str(channel.fileno()), str(spool.handle)),
                stdin=subprocess.PIPE, pass_fds=[channel.fileno(), spool.handle],
                env=os.environ | {"PYTHONPATH": path}, start_new_session=True,
            )  # fmt: skip
        try:
            await keeper.communicate(pickle.dumps((FIELDS, settings)))
        finally:
            if keeper.returncode is None:
                keeper.kill()
        return keeper.returncode

    return launch
