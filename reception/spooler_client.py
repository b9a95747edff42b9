"""The spooler's client: the event loop passes messages on and gets the results.

`store` makes a request of a message. Requests go to the spooler (reception/spooler.py) while it
reads; the others wait here, where they can be cancelled. A reply brings the results of a whole
batch. A spooler that dies, or is far too late with a reply, is replaced.

What must stay true: every request gets one result: None when the message is safe, `Cancelled` when
nothing was stored, `CommitUnknown` when the spooler died over it, else the error. The hint follows
the result, so clients do not wait for it. While the spooler reads nothing, memory holds no more
than the messages that clients wait for.
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
from pathlib import Path
from typing import Any

from reception.spooler_protocol import (
    FIELDS,
    BatchReply,
    Cancelled,
    FrameDecoder,
    StoreRequest,
    cancellation,
)
from relay import metrics
from relay.db.group_commit import CommitUnknown, PendingItem, deliver_results
from relay.log import first_line, get_logger
from relay.queue.accept import NewMessage
from relay.settings import SmtpdSettings
from relay.spool.store import Spool

log = get_logger(__name__)
RESTART_DELAY = 1.0
"""Seconds before a spooler is restarted that ran for less than MIN_UPTIME."""
MIN_UPTIME = 10.0  # seconds
HANG_TIMEOUT = 60.0
"""Seconds past the deadline of a request after which its missing result proves that the spooler
hangs."""

type Launch = Callable[[socket.socket], Coroutine[Any, Any, object]]
type Done = Callable[[Exception | None], None]


class SpoolerError(Exception):
    """The first spooler has not started."""


class SpoolerClient(asyncio.Protocol):
    """Belongs to the loop. `launch` runs a spooler on its end of a socket until the spooler ends,
    and ends it when cancelled. `on_stored` gets the ids of stored messages, and their route."""

    def __init__(self, launch: Launch, on_stored: Callable[[list[str], str], None]) -> None:
        self._launch = launch
        self._on_stored = on_stored
        self._numbers = itertools.count(1)
        # Requests without a result, in the order of `store`.
        self._pending: dict[int, PendingItem[NewMessage]] = {}
        self._unsent: dict[int, bytes] = {}  # frames of those that no spooler has
        self.transport: asyncio.Transport | None = None
        self._writable = False  # the spooler has started and reads
        self._decoder = FrameDecoder()
        self._disconnected = asyncio.Event()
        self._process: asyncio.Task[object] | None = None
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._observe = metrics.group_commit("accept")

    async def start(self) -> None:
        """Starts a spooler and waits for it. Raises SpoolerError if it ends instead."""
        self._task = asyncio.create_task(self._supervise())
        await self._started

    def store(
        self, message: NewMessage, body: list[bytes] | None, deadline: float, done: Done
    ) -> int:
        """Requests to store a message; `body` is None if its file is synced. `done` gets the
        result. Returns the number of the request."""
        number = next(self._numbers)
        self._pending[number] = PendingItem(message, done, deadline)
        self._unsent[number] = StoreRequest(number, message, body, deadline).encode()
        self._send()
        return number

    def cancel(self, number: int) -> None:
        """Cancels a request if it is not too late for that."""
        if self._unsent.pop(number, None) is not None:
            asyncio.get_running_loop().call_soon(self._resolve, number, Cancelled())
        elif self.transport is not None:
            self.transport.write(cancellation(number))

    def check_deadlines(self, now: float) -> None:
        """Ends a spooler that hangs. Its clients have had 451; a new spooler may work."""
        for number, oldest in itertools.islice(self._pending.items(), 1):
            late = oldest.deadline is not None and now > oldest.deadline + HANG_TIMEOUT
            if late and self._process is not None and number not in self._unsent:
                log.error("spooler hung", id=oldest.item.id)
                self._process.cancel()

    async def close(self, seconds: float) -> None:
        """Lets the spooler finish its requests, for at most so many `seconds`."""
        self._closing = True
        for number in [*self._unsent]:
            self._resolve(number, Cancelled())
        if self.transport is not None:
            self.transport.write_eof()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=seconds)
            if self._process is not None:
                self._process.cancel()
            await asyncio.wait([self._task], timeout=1.0)

    def data_received(self, data: bytes) -> None:
        reply: BatchReply
        for reply in self._decoder.feed(data):
            if not reply.results:  # the spooler has started
                self.resume_writing()
                if not self._started.done():
                    self._started.set_result(None)
            stored = [self._pending[number] for number, result in reply.results if result is None]
            for number, result in reply.results:
                self._resolve(number, result)
            if stored:
                self._observe(len(stored), reply.seconds)
            ids: dict[str, dict[str, None]] = {}  # of each route, once and in order
            for message in (request.item for request in stored):
                for recipient in message.recipients:
                    ids.setdefault(recipient.route, {})[message.id] = None
            for route, stored_ids in ids.items():
                self._on_stored([*stored_ids], route)

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self._writable = False
        for number in [number for number in self._pending if number not in self._unsent]:
            self._resolve(number, CommitUnknown())
        self._disconnected.set()

    def _send(self) -> None:
        while self._unsent and self._writable and self.transport is not None:
            self.transport.write(self._unsent.pop(next(iter(self._unsent))))

    def _resolve(self, number: int, result: Exception | None) -> None:
        self._unsent.pop(number, None)
        request = self._pending.pop(number, None)
        if request is not None:
            deliver_results([(request, result)])

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


def launcher(settings: SmtpdSettings, spool: Spool) -> Launch:
    """Launches spoolers as processes. A spooler inherits our descriptor of the spool directory,
    because the path may lead to another directory by then."""
    # A spooler runs this code, and no module of the directory that smtpd was started in.
    path = os.pathsep.join(
        filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")))
    )

    async def launch(channel: socket.socket) -> object:
        with channel:
            handles = (channel.fileno(), spool.handle)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "reception.spooler", *map(str, handles)),
                stdin=subprocess.PIPE,
                pass_fds=handles,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,
            )
        try:
            await process.communicate(pickle.dumps((FIELDS, settings)))
        finally:
            if process.returncode is None:
                process.kill()
        return process.returncode

    return launch
