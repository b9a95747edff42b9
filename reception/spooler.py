"""The spooler: the process that writes and syncs small bodies, and commits every row.

Storing is all system calls, each of which gives up the interpreter's lock and waits for it again;
beside a busy event loop that costs more than the calls. The spooler reads the requests that are
there (a batch) and syncs their bodies together; a thread commits their rows in one transaction and
sends one reply. One batch is committed and one waits. Requests not read yet can be cancelled.

What must stay true: every request gets one result; a row is committed after its body is synced, and
never without smtpd or later than its client's 451; a message that is not stored leaves no body. An
unexpected error ends the process, and smtpd starts another. It also ends when smtpd does.
"""

import pickle
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue

from reception.spooler_protocol import (
    FIELDS,
    BatchReply,
    Cancelled,
    FrameDecoder,
    RowRefused,
    StoreRequest,
    frame,
)
from relay.db import engine as database
from relay.db.group_commit import CommitUnknown, GroupCommitter, PendingItem, deliver_results
from relay.log import configure, first_line
from relay.queue.accept import Acceptor, NewMessage
from relay.spool.store import Spool
from relay.startup import freeze_memory

MAX_BATCH = 64  # messages
GATHER_TIME = 0.004
"""Seconds in which requests may gather while there are many. A row in a batch of eight costs half
of what it costs in a batch of four."""
_TOO_LATE = database.TooLate("no time was left before RELAY_ACCEPT_DEADLINE")


@dataclass(slots=True)
class Batch:
    """Rows to be committed, and the results that are known already."""

    rows: list[PendingItem[NewMessage]] = field(default_factory=list)
    results: list[tuple[int, Exception | None]] = field(default_factory=list)


class Spooler:
    """Serves the requests that arrive on `channel`.

    `commit` is what `GroupCommitter` runs; it takes at most `commit_timeout` seconds.
    """

    def __init__(
        self,
        channel: socket.socket,
        spool: Spool,
        commit: Callable[[Sequence[NewMessage], float], Sequence[None]],
        *,
        commit_timeout: float = 0.0,
    ) -> None:
        self._channel = channel
        self._spool = spool
        self._commit_timeout = commit_timeout
        self._committer = GroupCommitter(commit, wait=self._wait, expired=deliver_results)
        self._decoder = FrameDecoder()
        self._requests: dict[int, StoreRequest] = {}  # read, and in no batch yet
        self._batch = Batch()  # the next one
        self._batches = SimpleQueue[Batch | None]()
        self._may_queue = threading.Semaphore(1)  # no batch waits for the committer
        self._failed = False  # the committer
        self._peer = select.poll()
        self._peer.register(channel, select.POLLRDHUP)

    def run(self) -> None:
        """Serves until smtpd closes its end, or until an unexpected error."""
        committer = threading.Thread(target=self._commit_batches, name="committer")
        committer.start()
        taken = 0
        try:
            self._reply([], 0.0)
            while self._may_queue.acquire() and not self._failed and self._read(gather=taken > 1):
                numbers = [*self._requests][:MAX_BATCH]
                taken = len(numbers)
                self._batches.put(self._store([self._requests.pop(number) for number in numbers]))
        finally:
            self._batches.put(None)
            committer.join()

    def _read(self, *, gather: bool) -> bool:
        """Reads the requests that have arrived, and waits for one if there are none; False at the
        end."""
        if gather and len(self._requests) < MAX_BATCH:
            time.sleep(GATHER_TIME)
        while len(self._requests) < MAX_BATCH:
            idle = not self._requests and not self._batch.results
            try:
                data = self._channel.recv(1 << 20, 0 if idle else socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except ConnectionResetError:
                data = b""
            if not data:
                return not idle
            for number, *values in self._decoder.feed(data):
                if values:
                    self._requests[number] = StoreRequest.decode(number, *values)
                elif cancelled := self._requests.pop(number, None):
                    self._resolve(cancelled, self._batch, Cancelled())
        return True

    def _store(self, requests: list[StoreRequest]) -> Batch:
        """Syncs the bodies of a batch."""
        batch, self._batch = self._batch, Batch()
        small = [(one.number, one.message.id, one.body) for one in requests if one.body]
        stored = self._spool.store_all([(queue_id, body) for _, queue_id, body in small])
        faults = {
            number: result
            for (number, _, _), result in zip(small, stored, strict=True)
            if isinstance(result, OSError)
        }
        batch.results += faults.items()
        batch.rows += [
            PendingItem(
                request.message,
                partial(self._resolve, request, batch),
                # The latest moment to begin a transaction that ends before the client's 451.
                request.deadline - self._commit_timeout,
            )
            for request in requests
            if request.number not in faults
        ]
        return batch

    def _commit_batches(self) -> None:
        try:
            while (batch := self._batches.get()) is not None:
                self._may_queue.release()
                self._commit(batch)
        except BaseException:
            self._failed = True
            self._channel.shutdown(socket.SHUT_RDWR)  # `run` may wait for requests
            self._may_queue.release()
            raise

    def _commit(self, batch: Batch) -> None:
        """Commits a batch and sends its results."""
        started = time.monotonic()
        # Without smtpd, or after 451, the client sends the message again. A row that is committed
        # now would be a second copy.
        orphaned = any(events & select.POLLHUP for _, events in self._peer.poll(0))
        in_time: list[PendingItem[NewMessage]] = []
        for row in batch.rows:
            if orphaned:
                row.done(Cancelled())
            elif row.deadline is not None and row.deadline <= started:
                row.done(_TOO_LATE)
            else:
                in_time.append(row)
        deliver_results(self._committer.commit(in_time))
        self._reply(batch.results, time.monotonic() - started)

    def _resolve(self, request: StoreRequest, batch: Batch, result: Exception | None) -> None:
        if result is not None and not isinstance(result, CommitUnknown):
            self._spool.remove(request.message.id)
            if not isinstance(result, Cancelled):
                result = RowRefused(first_line(result))
        batch.results.append((request.number, result))

    def _reply(self, results: list[tuple[int, Exception | None]], seconds: float) -> None:
        with suppress(OSError):  # smtpd has ended; the next read ends this process
            self._channel.sendall(frame(BatchReply(results, seconds)))

    def _wait(self, seconds: float) -> bool:
        """Waits before the database is tried again; False when smtpd has closed its end."""
        return not self._peer.poll(seconds * 1000)


def main() -> None:
    """The process: it reads its settings from standard input; its arguments are the descriptors of
    the socket and of the spool directory."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # only its channel ends it
        signal.signal(number, signal.SIG_IGN)
    fields, settings = pickle.load(sys.stdin.buffer)  # noqa: S301  (from our smtpd)
    if fields != FIELDS:
        sys.exit("this program was replaced while it ran: start smtpd again")
    configure(settings)
    # A transaction that begins in time must have ended when its client gets 451. A quarter of that
    # time is enough for one statement, and leaves three to wait for a database that is away.
    timeout = min(database.STATEMENT_TIMEOUT, settings.accept_deadline / 4)
    engine = database.connect(settings.database_url, hot=True, timeout=timeout)
    acceptor = Acceptor(
        engine,
        lifetime=settings.queue_lifetime,
        grace=settings.grace,
        delay_warning=settings.delay_warning,
    )
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        spool = Spool(settings.spool_dir, int(sys.argv[2]))
        freeze_memory()
        Spooler(channel, spool, acceptor.commit, commit_timeout=timeout).run()
    engine.dispose()


if __name__ == "__main__":
    main()
