"""The spooler: the process that writes the journal and makes the rows.

The main thread reads the requests that are there (a batch), appends them to the journal, and
replies. The committer (reception/committer.py) makes their rows. A reply follows the sync while
less than REPLY_LAG messages wait for their rows; otherwise it waits for them, for at most a second.
When a second was once not enough, replies follow the sync until no row is missing. The reply to a
message that came alone has its hint published too, early; other hints follow the COMMIT.

What must stay true: a message is stored when its batch is synced, and nothing takes that back. A
request gets one result. A batch whose fate is unknown gets the result that tells smtpd to close the
connections. The process ends when smtpd does; what has no rows by then is replayed.
"""

import errno
import pickle
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from sqlalchemy import Engine

from reception.committer import Ids, JournalCommitter, WrittenBatch, by_route
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
from relay.db import engine as database
from relay.log import configure
from relay.queue.accept import Acceptor, EncodedMessage
from relay.runtime import freeze_memory
from relay.spool.journal.directory import JournalDirectory
from relay.spool.journal.format import SEGMENT_SIZE, JournalRecord, RecordKind
from relay.spool.journal.supply import SegmentSupply
from relay.spool.journal.writer import AppendedBatch, AppendUnknown, JournalWriter
from relay.spool.mark import SpoolMark
from relay.spool.store import Spool

MAX_BATCH = 64  # messages
MAX_BATCH_OCTETS = 4 << 20
"""Octets of envelopes and bodies above which a batch takes no further message."""
RECEIVE = 1 << 16
"""Octets that are read at once. A larger buffer would be mapped anew for each read."""
REPLY_LAG = 1024  # messages
REPLY_WAIT = 1.0
"""Seconds that a reply waits for the rows of its message."""
LAG_INTERVAL = 1.0
"""Seconds after which smtpd is told what has no rows, if no reply has told it that nothing has."""
DRAIN = 5.0
"""Seconds for the rows of the last messages when smtpd stops."""

type Results = list[tuple[int, StoreFault | None]]


class Spooler:
    """Serves the requests that arrive on `channel`. `limit`: so many octets may wait for rows;
    `reply_lag`: while fewer messages wait for rows, replies do not; `local`: no other machine has
    the spool's file system."""

    def __init__(
        self,
        channel: socket.socket,
        spool: Spool,
        acceptor: Acceptor,
        engine: Engine,
        mark: SpoolMark,
        *,
        limit: int = 1 << 30,
        reply_lag: int = REPLY_LAG,
        local: bool = True,
        segment_size: int = SEGMENT_SIZE,
    ) -> None:
        self._channel, self._spool = channel, spool
        self._limit, self._reply_lag, self._mark = limit, reply_lag, mark
        directory = JournalDirectory(spool.handle)
        directory.make()
        self._supply = SegmentSupply(directory, spool.identity, size=segment_size)
        self._writer = JournalWriter(
            directory, self._supply, on_retired=self._retire, segment_size=segment_size
        )
        self._committer = JournalCommitter(
            acceptor, engine, directory, mark, self._writer, spool.identity, local=local
        )
        self._decoder = FrameDecoder()
        self._requests: list[StoreRequest] = []  # read, and not stored yet
        self._octets = 0  # of these
        self._max_octets = min(MAX_BATCH_OCTETS, segment_size // 4)
        self._sending = threading.Lock()
        self._told = Lag()  # by the last reply
        self._tell_at = 0.0
        self._readable = select.poll()
        self._readable.register(channel, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(channel, select.POLLOUT)

    def run(self) -> None:
        """Serves until smtpd closes its end."""
        self._committer.start(self._committed)
        try:
            self._reply([])
            while self._read():
                if batch := self._next_batch():
                    self._store(batch)
                self._answer(self._committer.overdue(time.monotonic() - REPLY_WAIT))
                self._tell_lag()
        finally:
            self._writer.retire()
            self._committer.close(DRAIN)
            self._supply.close()

    def lag(self) -> Lag:
        """What has no rows yet, as each reply tells it."""
        return self._committer.lag()

    def _retire(self, segment: str, orderly: bool) -> None:
        self._committer.retire(segment, orderly=orderly)

    def _read(self) -> bool:
        """Reads the requests that have arrived; waits for one if there are none, or until something
        is due without one. False at the end."""
        while len(self._requests) < MAX_BATCH and self._octets < self._max_octets:
            timeout = 0.0 if self._requests else self.next_due() - time.monotonic()
            if not self._readable.poll(max(0.0, timeout * 1000)):
                break
            try:
                data = self._channel.recv(RECEIVE)
            except ConnectionResetError:
                data = b""
            if not data:
                return bool(self._requests)
            requests = [StoreRequest(*values) for values in self._decoder.feed(data)]
            self._requests += requests
            self._octets += sum(map(_octets_to_write, requests))
            if len(data) < RECEIVE:  # no more is there
                break
        return True

    def next_due(self) -> float:
        """When the next reply to a message is due, or the next one that tells the lag."""
        since = self._committer.waits_since()
        return self._tell_at if since is None else min(self._tell_at, since + REPLY_WAIT)

    def _next_batch(self) -> list[StoreRequest]:
        """Takes the requests of one batch, which fits a segment; at least one if there is one."""
        octets = count = 0
        for request in self._requests[:MAX_BATCH]:
            size = _octets_to_write(request)
            if count and octets + size > self._max_octets:
                break
            octets, count = octets + size, count + 1
        batch, self._requests = self._requests[:count], self._requests[count:]
        self._octets -= octets
        return batch

    def _store(self, requests: Sequence[StoreRequest]) -> None:
        """Appends a batch, and replies if it need not wait for the rows."""
        lag = self.lag()
        size = sum(request.size + len(request.rows) for request in requests)
        appended: AppendedBatch | StoreFault
        if lag.octets + size > self._limit:
            appended = StoreFault("RELAY_JOURNAL_LIMIT: too much waits for the database")
        else:
            appended = self._append(requests)
        if isinstance(appended, StoreFault):
            self._reply([(request.number, appended) for request in requests])
            return
        batch = WrittenBatch(
            appended.segment,
            appended.start,
            appended.end,
            [
                EncodedMessage(request.rows, None if request.body is None else position)
                for request, position in zip(requests, appended.positions, strict=True)
            ],
            [(request.queue_id, request.routes) for request in requests],
            size,
            [request.number for request in requests],
            hinted=len(requests) == 1 and 0 == lag.messages < self._reply_lag,
        )
        if lag.messages < self._reply_lag:
            # The reply goes first: the thread that makes the rows would compete with it.
            lag = lag._replace(messages=lag.messages + len(requests), octets=lag.octets + size)
            results: Results = [(number, None) for number in batch.numbers]
            ids = by_route(batch.hints) if batch.hinted else {}
            self._reply(results, ids, lag=lag, early=batch.hinted)
            self._committer.put(batch, wait=False)
        elif not self._committer.put(batch, wait=True):
            self._answer([batch])

    def _append(self, requests: Sequence[StoreRequest]) -> AppendedBatch | StoreFault:
        """Writes messages to the journal and syncs them."""
        records = [
            JournalRecord(
                RecordKind.LARGE if request.body is None else RecordKind.MESSAGE,
                request.queue_id,
                request.rows,
                b"".join(request.body or ()),
            )
            for request in requests
        ]
        try:
            self._spool.checked_handle()
            return self._writer.append(records, mark=self._mark.known)
        except (OSError, AppendUnknown) as error:
            number = (error.errno or errno.EIO) if isinstance(error, OSError) else 0
            return StoreFault(str(error), number, unknown=isinstance(error, AppendUnknown))

    def _tell_lag(self) -> None:
        """Tells smtpd each second what has no rows, and once that nothing is left: without mail and
        without a database no other reply does."""
        now = time.monotonic()
        if now < self._tell_at:
            return
        self._tell_at = now + LAG_INTERVAL
        lag = self.lag()
        # A smtpd that is stopped reads nothing, and must not stop this process for such a reply.
        if (lag.messages or lag != self._told) and self._writable.poll(0):
            self._reply([], lag=lag)

    def _answer(self, batches: Sequence[WrittenBatch]) -> None:
        if batches:
            self._reply([(number, None) for batch in batches for number in batch.numbers])

    def _committed(
        self, batches: Sequence[WrittenBatch], ids: Ids, count: int, seconds: float
    ) -> None:
        """The rows of some messages are committed, and these batches still need a reply."""
        self._reply(
            [(number, None) for batch in batches for number in batch.numbers], ids, count, seconds
        )

    def _reply(
        self,
        results: Results,
        ids: Ids | None = None,
        count: int = 0,
        seconds: float = 0.0,
        *,
        lag: Lag | None = None,
        early: bool = False,
    ) -> None:
        reply = SpoolerReply(results, ids or {}, count, seconds, lag or self.lag(), early)
        # smtpd may have ended; the next read ends this process.
        with self._sending, suppress(OSError):
            self._told = reply.lag
            self._channel.sendall(frame(reply))


def _octets_to_write(request: StoreRequest) -> int:
    """What a request adds to a batch, without the overhead of its record."""
    return len(request.rows) + (0 if request.body is None else request.size)


def main() -> None:
    """The process: it reads its settings from standard input; its arguments are the descriptors of
    the socket and of the spool directory."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # only its channel ends it
        signal.signal(number, signal.SIG_IGN)
    version, values = pickle.load(sys.stdin.buffer)  # noqa: S301  (from our smtpd)
    if version != VERSION:
        sys.exit("this program was replaced while it ran: start smtpd again")
    settings = SpoolerSettings(*values)
    configure(settings)
    engine = database.connect(settings.database_url, hot=True)
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        spool = Spool(settings.spool_dir, int(sys.argv[2]))
        mark = SpoolMark(JournalDirectory(spool.handle), spool.identity)
        mark.guard(engine)
        acceptor = Acceptor(engine, lifetime=settings.queue_lifetime, grace=settings.grace)
        spooler = Spooler(
            channel,
            spool,
            acceptor,
            engine,
            mark,
            limit=settings.journal_limit,
            local=settings.local,
        )
        freeze_memory()
        spooler.run()
    engine.dispose()


if __name__ == "__main__":
    main()
