"""The keeper: a process of its own in which small bodies are synced and every row is committed.

Why a process: storing is nothing but system calls, and each of them gives up the interpreter's lock
and fights for it again. Beside a busy event loop that costs more than the calls themselves; alone
it costs nothing.

How it works: `store.SpoolerClient` sends an order a message over a Unix socket. The keeper takes
all that is there (a lot) and syncs the bodies together; a thread commits the rows of a lot in one
transaction and sends its answers in one piece. One lot is committed, one is being stored or waits,
and no more is read: what has not been read can still be taken back.

What must stay true: every order is answered once; a row is committed only when its body is safe,
and no try to do so begins when smtpd is not there to answer it, or could end after its client has
heard 451; what is not kept leaves no body. Whatever breaks here ends the process, so that a sound
one takes its place; it ends by itself when who sends the orders does.
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
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

from reception.spooler_protocol import (
    FIELDS,
    BatchReply,
    Cancelled,
    Frames,
    RowRefused,
    StoreRequest,
    frame,
)
from relay.db import engine as database
from relay.db.group_commit import CommitUnknown, GroupCommitter, PendingItem, deliver_results
from relay.log import configure, first_line
from relay.queue.accept import Acceptor, NewMessage
from relay.spool.store import Spool

LARGEST, GATHER = 64, 0.004
"""Messages in a round at most; seconds that they are let gather while they come in numbers."""
_READ = 1 << 20
_TOO_LATE = "no time was left before RELAY_ACCEPT_DEADLINE"


@dataclass(slots=True)
class Batch:
    """What goes from one stage to the other: entries to be committed, and what is decided
    already."""

    entries: list[PendingItem[NewMessage]]
    results: list[tuple[int, Exception | None]]


class Spooler:
    """Obeys the orders that come over `channel`; `commit` is what `GroupCommitter` runs, for
    `longest` seconds at most."""

    def __init__(
        self,
        channel: socket.socket,
        spool: Spool,
        commit: Callable[[Sequence[NewMessage], float], Sequence[None]],
        *,
        longest: float = 0.0,
    ) -> None:
        self._channel, self._spool, self._longest = channel, spool, longest
        self._rounds = GroupCommitter(commit, wait=self._rest, expired=deliver_results)
        self._frames = Frames()
        self._orders: dict[int, StoreRequest] = {}  # read, and not begun
        self._withdrawn: list[StoreRequest] = []
        self._lots = SimpleQueue[Batch | None]()
        self._room = threading.Semaphore(1)  # no lot waits for the committer
        self._failed = False  # the committer
        self._end = select.poll()
        self._end.register(channel, select.POLLRDHUP)

    def run(self) -> None:
        """Until the other end closes, or something breaks: then who sent the orders starts another
        keeper."""
        committer = threading.Thread(target=self._commit_all, name="committer")
        committer.start()
        busy = False
        try:
            self._report([], 0.0)
            while self._room.acquire() and not self._failed and self._read(gather=busy):
                count = min(len(self._orders), LARGEST)
                busy = count > 1
                self._lots.put(
                    self._store([self._orders.pop(number) for number in [*self._orders][:count]])
                )
        finally:
            self._lots.put(None)
            committer.join()

    def _read(self, *, gather: bool) -> bool:
        """Take in what has come, and wait until that is something; False at the end."""
        if gather and len(self._orders) < LARGEST:
            time.sleep(GATHER)
        while len(self._orders) < LARGEST:
            idle = not self._orders and not self._withdrawn
            try:
                data = self._channel.recv(_READ, 0 if idle else socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except ConnectionResetError:
                data = b""
            if not data:
                return not idle
            for order in map(StoreRequest.of, self._frames.feed(data)):
                if order.message is not None:
                    self._orders[order.number] = order
                elif taken_back := self._orders.pop(order.number, None):
                    self._withdrawn.append(taken_back)
        return True

    def _store(self, orders: list[StoreRequest]) -> Batch:
        """Sync the bodies; what may be committed, and what is decided."""
        lot, now = Batch([], []), time.monotonic()
        late = [order for order in orders if self._begin_by(order) <= now]
        for order in self._withdrawn:
            self._settled(order, lot, Cancelled())
        self._withdrawn.clear()
        for order in late:
            self._settled(order, lot, database.TooLate(_TOO_LATE))
        orders = [order for order in orders if order not in late]
        whole = [
            (order.number, order.message, order.body)
            for order in orders
            if order.message and order.body
        ]
        try:
            found = self._spool.store_all([(message.id, body) for _, message, body in whole])
        except Exception as error:  # of ours: nobody may be left without an answer
            found = [OSError(first_line(error))] * len(whole)
        failed = {
            number: one
            for (number, _, _), one in zip(whole, found, strict=True)
            if isinstance(one, Exception)
        }
        lot.results += failed.items()
        for order in orders:
            if order.message and order.number not in failed:
                done = partial(self._settled, order, lot)
                lot.entries.append(PendingItem(order.message, done, self._begin_by(order)))
        return lot

    def _begin_by(self, order: StoreRequest) -> float:
        """When the last try to commit must begin, to have ended when the client hears 451
        (monotonic)."""
        return float("inf") if order.deadline is None else order.deadline - self._longest

    def _commit_all(self) -> None:
        try:
            while (lot := self._lots.get()) is not None:
                self._room.release()
                self._commit(lot)
        except BaseException:
            self._failed = True
            self._channel.shutdown(socket.SHUT_RDWR)
            self._room.release()
            raise

    def _commit(self, lot: Batch) -> None:
        started = time.monotonic()
        alone = any(events & select.POLLHUP for _, events in self._end.poll(0))
        # Their clients hear 451, or have lost the connection, and send again: what is committed now
        # is delivered twice.
        late = [
            one
            for one in lot.entries
            if alone or (one.deadline is not None and one.deadline <= started)
        ]
        deliver_results(
            [(entry, Cancelled() if alone else database.TooLate(_TOO_LATE)) for entry in late]
        )
        deliver_results(self._rounds.settle([entry for entry in lot.entries if entry not in late]))
        if lot.results:
            self._report(lot.results, time.monotonic() - started)

    def _settled(self, order: StoreRequest, lot: Batch, result: Exception | None) -> None:
        if result is not None and not isinstance(result, CommitUnknown):
            if order.message:
                self._spool.remove(order.message.id)
            if not isinstance(result, Cancelled):
                result = RowRefused(first_line(result))
        lot.results.append((order.number, result))

    def _report(self, results: list[tuple[int, Exception | None]], seconds: float) -> None:
        with suppress(OSError):  # nobody is there to hear it, and the next read ends us
            self._channel.sendall(frame(BatchReply(results, seconds)))

    def _rest(self, pause: float) -> bool:
        return not self._end.poll(pause * 1000)


def main() -> None:
    """The process: its settings on standard input; its arguments are the descriptors of socket and
    spool directory."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # the end of the orders ends it, and nothing else
        signal.signal(number, signal.SIG_IGN)
    fields, settings = pickle.load(sys.stdin.buffer)  # noqa: S301  (ours)
    if fields != FIELDS:
        sys.exit("this program was replaced while it ran: start smtpd again")
    configure(settings)
    # A try that begins just in time must have ended when its client hears 451. A quarter of that
    # time is plenty for one statement, and leaves three to wait for a database that is away.
    longest = min(database.STATEMENT_TIMEOUT, settings.accept_deadline / 4)
    engine = database.connect(settings.database_url, hot=True, timeout=longest)
    intake = Acceptor(engine, lifetime=settings.queue_lifetime, grace=settings.grace)
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        Spooler(
            channel, Spool(settings.spool_dir, int(sys.argv[2])), intake.commit, longest=longest
        ).run()
    engine.dispose()


if __name__ == "__main__":
    main()
