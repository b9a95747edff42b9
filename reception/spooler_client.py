"""The spooler's client: the event loop passes messages on and gets the results.

`store` makes a request of a message. Requests go to the spooler (reception/spooler.py) while it
reads; the others wait here, where they can be withdrawn. A reply brings results, and the ids whose
rows have been made, which become hints. A spooler that dies, or is far too late with a reply, is
replaced; the new one finds in the journal what the old one wrote.

What must stay true: every request gets one result: None when the message is stored, or a
StoreFault. If the spooler died over a request, the message may be stored, and the StoreFault says
so. While the spooler reads nothing, memory holds no more than the messages that clients wait for.
"""

import asyncio
import itertools
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reception.spooler_protocol import (
    VERSION,
    FrameDecoder,
    Lag,
    SpoolerReply,
    SpoolerSettings,
    StoreFault,
    StoreRequest,
    frame,
)
from relay import metrics
from relay.log import first_line, get_logger
from relay.settings import SmtpdSettings
from relay.spool.store import Spool

log = get_logger(__name__)
RESTART_DELAY = 1.0
"""Seconds before a spooler is restarted that ran for less than MIN_UPTIME."""
MIN_UPTIME = 10.0  # seconds
WRITE_TOGETHER = 16
"""Requests in one write. They are below 64 KiB each, and what is written cannot be withdrawn."""
HANG_TIMEOUT = 60.0
"""Seconds past RELAY_ACCEPT_DEADLINE after which a missing result proves that the spooler hangs."""

type Launch = Callable[[socket.socket], Coroutine[Any, Any, object]]
type Done = Callable[[StoreFault | None], None]


class SpoolerError(Exception):
    """The first spooler has not started."""


@dataclass(slots=True)
class _PendingRequest:
    """A request without a result."""

    queue_id: str
    done: Done
    made: float = field(default_factory=time.monotonic)


class SpoolerClient(asyncio.Protocol):
    """Belongs to the loop. `launch` runs a spooler on its end of a socket until the spooler ends,
    and ends it when cancelled. `offer` gets the ids whose rows have been made, or are being made
    (`early`), and their route; a result takes `deadline` seconds at most, or the spooler hangs."""

    def __init__(
        self, launch: Launch, offer: Callable[[list[str], str, bool], None], deadline: float
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._launch = launch
        self._offer = offer
        self._hang_after = deadline + HANG_TIMEOUT
        self.lag = Lag()
        self._numbers = itertools.count(1)
        # Requests without a result, in the order of `store`.
        self._pending: dict[int, _PendingRequest] = {}
        self._unsent: dict[int, bytes] = {}  # frames of those that no spooler has
        self.transport: asyncio.Transport | None = None
        self._ready = False  # the spooler has started
        self._paused = False  # it does not read
        self._decoder = FrameDecoder()
        self._disconnected = asyncio.Event()
        self._process: asyncio.Task[object] | None = None
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._observe = metrics.group_commit("accept")

    async def start(self) -> None:
        """Starts a spooler and waits for it. Raises SpoolerError if it ends instead."""
        self._task = asyncio.create_task(self._supervise())
        await self._started

    def store(
        self,
        queue_id: str,
        rows: bytes,
        routes: tuple[str, ...],
        size: int,
        body: list[bytes] | None,
        done: Done,
    ) -> int:
        """Requests to store a message (`StoreRequest` says what of it). `done` gets the result.
        Returns the number of the request."""
        number = next(self._numbers)
        self._pending[number] = _PendingRequest(queue_id, done)
        if not self._unsent:  # what else this turn of the loop brings goes with it
            self._loop.call_soon(self._send)
        self._unsent[number] = frame(StoreRequest(number, queue_id, rows, routes, size, body))
        return number

    def withdraw(self, number: int) -> bool:
        """Takes a request back; False if a spooler has it."""
        withdrawn = self._unsent.pop(number, None) is not None
        if withdrawn:
            del self._pending[number]
        return withdrawn

    def check_deadlines(self, now: float) -> None:
        """Ends a spooler that hangs. Its clients have no reply any more; a new one may work."""
        for number, oldest in itertools.islice(self._pending.items(), 1):
            late = now > oldest.made + self._hang_after
            if late and self._process is not None and number not in self._unsent:
                log.error("spooler hung", id=oldest.queue_id)
                self._process.cancel()

    async def close(self, seconds: float) -> None:
        """Lets the spooler finish its requests, for at most so many `seconds`."""
        self._closing = True
        for number in [*self._unsent]:
            self._resolve(number, StoreFault("smtpd stops"))
        if self.transport is not None:
            self.transport.write_eof()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=seconds)
            if self._process is not None:
                self._process.cancel()
            await asyncio.wait([self._task], timeout=1.0)

    def data_received(self, data: bytes) -> None:
        for values in self._decoder.feed(data):
            reply = SpoolerReply(*values)
            lag = Lag(*reply.lag)
            metrics.JOURNAL_DAMAGES.inc(max(0, lag.damages - self.lag.damages))
            self.lag = lag
            if not self._started.done():  # the first reply
                self._started.set_result(None)
            if not self._ready:
                self._ready = True
                self._send()
            for number, fault in reply.results:
                self._resolve(number, StoreFault(*fault) if fault else None)
            if reply.messages:
                self._observe(reply.messages, reply.seconds)
            for route, ids in reply.ids.items():  # after the replies to clients have left
                self._loop.call_soon(self._offer, ids, route, reply.early)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self._ready = self._paused = False
        self.lag = self.lag._replace(damages=0)
        for number in [number for number in self._pending if number not in self._unsent]:
            self._resolve(number, StoreFault("the spooler has died", unknown=True))
        self._disconnected.set()

    def _send(self) -> None:
        """Sends the requests that gathered, one write for many."""
        while self._unsent and self._ready and not self._paused and self.transport is not None:
            frames = [
                self._unsent.pop(number)
                for number in [*itertools.islice(self._unsent, WRITE_TOGETHER)]
            ]
            self.transport.write(b"".join(frames))

    def _resolve(self, number: int, result: StoreFault | None) -> None:
        self._unsent.pop(number, None)
        request = self._pending.pop(number, None)
        if request is not None:
            try:
                request.done(result)
            except Exception:  # the other clients still wait for their results
                log.exception("result not delivered")

    async def _supervise(self) -> None:
        """Runs one spooler after another until `close`."""
        while True:
            started = time.monotonic()
            try:
                status = await self._run_spooler()
            except Exception as error:  # no process or socket to spare; there may be one later
                status = first_line(error)
            if self._closing:
                return None
            if not self._started.done():
                text = f"the spooler ended when it was started: {status}"
                return self._started.set_exception(SpoolerError(text))
            delay = RESTART_DELAY if time.monotonic() - started < MIN_UPTIME else 0.0
            metrics.SPOOLER_RESTARTS.inc()
            log.error("spooler restarted", status=status, seconds=delay)
            await asyncio.sleep(delay)

    async def _run_spooler(self) -> object:
        """Runs one spooler until it ends; its exit status."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._decoder = FrameDecoder()
            self._disconnected.clear()
            self.transport, _ = await asyncio.get_running_loop().create_unix_connection(
                lambda: self, sock=ours
            )
            self._process = asyncio.create_task(self._launch(theirs))
            await asyncio.wait([self._process])
        await self._disconnected.wait()
        return "killed" if self._process.cancelled() else self._process.result()


def spooler_settings(settings: SmtpdSettings, *, local: bool) -> SpoolerSettings:
    """The part of the settings that a spooler needs."""
    return SpoolerSettings(
        spool_dir=settings.spool_dir,
        local=local,
        database_url=settings.database_url,
        queue_lifetime=settings.queue_lifetime,
        grace=settings.grace,
        journal_limit=settings.journal_limit,
        log_level=settings.log_level,
        log_format=settings.log_format,
        log_addresses=settings.log_addresses,
    )


def launcher(settings: SmtpdSettings, spool: Spool) -> Launch:
    """Launches spoolers as processes. A spooler inherits our descriptor of the spool directory,
    because the path may lead to another directory by then."""
    # A spooler runs this code, and no module of the directory that smtpd was started in.
    path = os.pathsep.join(
        filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")))
    )

    start = pickle.dumps((VERSION, tuple(spooler_settings(settings, local=spool.is_local))))
    without_docstrings = ["-OO"] if sys.flags.optimize else []  # as smtpd itself runs

    async def launch(channel: socket.socket) -> object:
        with channel:
            handles = (channel.fileno(), spool.handle)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, *without_docstrings, "-P", "-m", "reception.spooler"),
                *map(str, handles),
                stdin=subprocess.PIPE,
                pass_fds=handles,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,
            )
        try:
            await process.communicate(start)
        finally:
            if process.returncode is None:
                process.kill()
        return process.returncode

    return launch
