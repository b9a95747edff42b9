"""The engine of a worker process: one event loop that owns every connection, and the lease that
entitles it to them.

How it works. Hints (`offer`, from the Celery task) and looks at the database ask for deliveries
(worker/producer.py). What was claimed gets its body opened (worker/body_io.py) and becomes a
`DeliveryTask`, an asyncio task. Its outcome is a `Completion`. Wishes, records and the renewals of
the lease go through one `rounds.CommitThread`: a thread that commits what has gathered and posts
the answers back here in one call.

What must stay true:
- all state below belongs to the loop; other threads come in through `offer`, `drain` and
  `renewed_since` only;
- outcomes are put before the renewal that follows them, so that a worker which is alive again has
  told what it did;
- nothing passes its commit point unless the request for the last renewal that succeeded is younger
  than LEASE less a quarter, and was made for the worker id that the claim belongs to;
- a fault of this machine (a body that cannot be opened, no sockets) stops the claiming for a while,
  never the mail.
"""

import asyncio
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial

from relay import metrics
from relay.db.group_commit import CommitThread
from relay.db.schema import Outcome, State
from relay.ids import new_id
from relay.log import first_line, get_logger
from relay.queue.claim import WorkerQueue
from relay.queue.model import (
    Claim,
    ClaimRequest,
    Command,
    CommandResult,
    Completion,
    CompletionResult,
    Renewal,
)
from relay.routes import NO_SERVER, Routes
from relay.settings import WorkerSettings
from relay.spool.store import BodyUnsendable, Spool
from relay.startup import new_loop
from worker.body_io import BodyIo, Opened
from worker.capacity import Capacity
from worker.circuit_breaker import ServerPool
from worker.delivery import DeliveryTask, TransferConfig
from worker.hint_queue import HintBatch
from worker.producer import Producer

log = get_logger(__name__)
LONGEST_FAULT_PAUSE = 30.0
QUARANTINE_FROM = 2  # workers lost over a delivery, from which on it is sent alone
QUARANTINE_TIMEOUT = (
    30.0  # that suspects may keep everything else from being claimed, all together (seconds)
)
QUARANTINE_PAUSE = 300.0  # until they may do so again, if that was not enough (seconds)
WINDOW = 1024  # deliveries of a route that may be woken and not taken yet
GATHER = 0.005  # seconds that outcomes and wishes are let gather while they come in numbers
STANDSTILL = 1.0  # between two ticks: this process was stopped, or its machine was (seconds)
RECORDING_TIME = 5.0  # at the end of a drain, for the last outcomes to be recorded (seconds)


class Engine:
    """Sends what a ledger lets it claim. `start`, then `offer` from any thread, at the end
    `drain`."""

    def __init__(
        self,
        settings: WorkerSettings,
        ledger: WorkerQueue,
        spool: Spool,
        routes: Routes,
        *,
        servers: ServerPool | None = None,
    ) -> None:
        self._settings, self._ledger, self._routes = settings, ledger, routes
        self._servers = servers or ServerPool(
            settings.server_connections, backoff=(settings.retry_min, settings.retry_max)
        )
        self._terms = TransferConfig.of(settings, self._servers, self._may_commit)
        self._loop = new_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._files = BodyIo(self._loop, spool)
        self._writer: CommitThread[Command, CommandResult] = CommitThread(
            "outcomes", ledger.commit, post=self._loop.call_soon_threadsafe, largest=512, gather=GATHER,
            observe=metrics.rounds("outcomes"),
        )  # fmt: skip
        self.worker = ""  # our row in `workers`; empty until there is one
        self.ready = threading.Event()
        self._renewed = float("-inf")  # when the last renewal that succeeded was asked for
        self._renewing = False
        self._room = Capacity(
            routes, self._servers, settings.worker_connections, settings.batch_size
        )
        self._demand = Producer(settings, routes, self._room, self._wish)
        self._active: dict[DeliveryTask, asyncio.Task[None]] = {}
        metrics.TRANSFERS_OPEN.set_function(lambda: len(self._active))
        self._opening = 0
        self._unrecorded = 0
        self._faults = 0
        self._paused_until = 0.0
        self._quarantine: deque[DeliveryTask] = deque()  # wait to be sent alone
        self._exclusive: DeliveryTask | None = None  # is being sent so
        self._exclusive_until = 0.0
        self._next_quarantine_at = 0.0
        self._stopping = False
        self._idle = asyncio.Event()
        self.heartbeat = time.monotonic()  # when the loop last turned

    # From other threads

    def start(self) -> None:
        """Start the loop and the writer; `ready` is set once the worker has its row."""
        for route in self._routes.all():
            if not route.servers:
                log.warning(NO_SERVER, route=route.name)
        self._writer.start()
        self._thread.start()

    def offer(self, ids: Sequence[str], lane: str = "fresh", route: str = "") -> HintBatch:
        """Deliver these messages as connections come free, on a route if it is known. Thread-safe;
        never blocks."""
        ticket = HintBatch(0 if self._stopping else len(ids))
        if not ticket.wait(0):
            self._loop.call_soon_threadsafe(self._offered, ticket, ids, lane, route)
        return ticket

    def pause(self, subjects: frozenset[str]) -> None:
        """Send nothing to these: `route:NAME`, `server:NAME`. Thread-safe."""
        self._servers.pauses = subjects

    def routes(self) -> tuple[str, ...]:
        """The names of the routes that it sends to. Thread-safe."""
        return self._routes.names()

    def awaited(self, names: Collection[str]) -> dict[str, int]:
        """Deferred mail waits for these routes, so their servers are tried sooner; how much of it
        may be overdue at a time: a window where a server works, one where a server may be tried.
        Thread-safe."""
        routes = [route for name in names if (route := self._routes.get(name))]
        self._servers.awaited = frozenset(
            server.name for route in routes for server in route.servers
        )
        most = {
            r.name: WINDOW if self._servers.works(r) else min(1, self._servers.room(r))
            for r in routes
        }
        return {name: count for name, count in most.items() if count}

    def look(self) -> None:
        """Look at the database now: something has become overdue. Thread-safe."""
        self._loop.call_soon_threadsafe(self._look)

    def renewed_since(self, moment: float) -> bool:
        """Whether a renewal that was asked for after `moment` (monotonic) has succeeded."""
        return self._renewed >= moment

    def drain(self, timeout: float) -> bool:
        """Stop: close what may be closed, wait `timeout` seconds for the rest, record everything,
        end the loop.

        Blocks; True if every outcome was recorded.
        """
        if self._stopping or not self._thread.is_alive():
            return True
        ended = asyncio.run_coroutine_threadsafe(self._drain(timeout), self._loop).result()
        ended = self._writer.close(RECORDING_TIME) and ended
        if ended and self.worker:
            try:
                self._ledger.retire(self.worker)
            except Exception as error:
                log.warning("worker not signed off", worker=self.worker, reason=first_line(error))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._files.close()
        return ended

    # The loop

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.create_task(self._register())
        self._loop.call_soon(self._tick)
        self._loop.run_forever()
        self._loop.run_until_complete(
            self._loop.shutdown_default_executor()
        )  # who signs on has a connection
        self._loop.close()

    def _tick(self) -> None:
        now = time.monotonic()
        stood, self.heartbeat = now - self.heartbeat, now
        if self.worker and not self._renewing and now - self._renewed >= self._settings.lease / 4:
            self._renew(now)
        if (
            stood > STANDSTILL
        ):  # nothing could move meanwhile: that time is no reason to give anything up
            self._exclusive_until += stood
            self._demand.stood_still(stood)
        self._demand.drop_hints(unless_moved_since=now - self._settings.grace)
        if self._quarantine and now >= self._exclusive_until:
            self._quarantine_timeout(now)
        self._poll()
        self._loop.call_later(min(0.25, self._settings.lease / 8), self._tick)

    # The lease

    def _may_commit(self, worker: str) -> bool:
        fresh = time.monotonic() - self._renewed < self._settings.lease * 0.75
        return fresh and worker == self.worker

    async def _register(self) -> None:
        """Get a row in `workers`, however long that takes."""
        worker, pause = new_id(), 0.1
        while not self._stopping:
            asked = time.monotonic()
            try:
                await asyncio.to_thread(
                    self._ledger.register, worker, socket.gethostname(), os.getpid()
                )
            except Exception as error:
                log.warning("worker not signed on", reason=first_line(error))
                await asyncio.sleep(pause)
                pause = min(2.0, pause * 2)
                continue
            self.worker, self._renewed = worker, asked
            self.ready.set()
            log.info("worker signed on", worker=worker)
            self._poll()
            return

    def _renew(self, asked: float) -> None:
        self._renewing = True
        self._writer.put(Renewal(self.worker), partial(self._was_renewed, asked, self.worker))

    def _was_renewed(self, asked: float, worker: str, result: CommandResult | Exception) -> None:
        self._renewing = False
        if worker != self.worker:
            return
        if result is True:
            self._renewed = asked
            return
        if result is False:
            log.critical(
                "this worker was declared dead; it starts again under another id", worker=worker
            )
            self.worker, self._renewed = "", float("-inf")
            self.ready.clear()
            for transfer in [*self._active]:
                transfer.abort()
            self._loop.create_task(self._register())

    # Claiming

    def _offered(self, ticket: HintBatch, ids: Sequence[str], lane: str, route: str) -> None:
        self._demand.hint(ticket, ids, lane, route)
        if self._stopping:
            self._demand.drop_hints()
        self._poll()

    def _may_claim(self, now: float) -> bool:
        if self._stopping or not self.worker or now < self._paused_until:
            return False
        if self._quarantine or (self._exclusive is not None and now < self._exclusive_until):
            return False
        return self._may_commit(self.worker)

    def _poll(self) -> None:
        now = time.monotonic()
        if self._quarantine:
            self._start_exclusive()
        if self._may_claim(now):
            self._demand.ask(self.worker, now)

    def _look(self) -> None:
        self._demand.look_now()
        self._poll()

    def _wish(self, wish: ClaimRequest, done: Callable[[Sequence[Claim]], None]) -> None:
        self._opening += 1
        self._writer.put(wish, partial(self._claimed, wish, done))

    def _claimed(
        self,
        wish: ClaimRequest,
        done: Callable[[Sequence[Claim]], None],
        result: CommandResult | Exception,
    ) -> None:
        """A wish came back: open the bodies of what was claimed."""
        claims = result if isinstance(result, list) else []
        self._opening -= 1
        done(claims)
        if claims:
            self._opening += 1
            self._files.open(claims).add_done_callback(partial(self._opened, wish.worker, claims))
        self._check_idle()
        self._poll()

    def _opened(self, worker: str, claims: Sequence[Claim], opened: asyncio.Future[Opened]) -> None:
        self._opening -= 1
        for claim, handle in zip(claims, opened.result(), strict=True):
            transfer = DeliveryTask(
                claim, worker, handle if isinstance(handle, int) else -1, self._routes.get(claim.route), self._terms,
                partial(self._room.slot_taken, claim.route),
            )  # fmt: skip
            if isinstance(handle, BodyUnsendable):
                log.critical("body unsendable", id=claim.queue_id, reason=str(handle))
                self._ended(transfer, transfer.unsendable(str(handle)))
            elif isinstance(handle, Exception):
                self._fault(claim, handle)
                self._ended(transfer, transfer.requeued())
            elif self._stopping or worker != self.worker:
                self._ended(transfer, transfer.requeued())
            elif claim.crash_count >= QUARANTINE_FROM:
                self._enter_quarantine(transfer)
            else:
                self._faults = 0
                self._send(transfer)
        self._poll()

    def _fault(self, claim: Claim, error: Exception) -> None:
        """This machine is at fault: stop claiming, for longer each time in a row."""
        self._faults += 1
        pause = min(LONGEST_FAULT_PAUSE, 0.5 * 2.0 ** min(self._faults, 10))
        self._paused_until = max(self._paused_until, time.monotonic() + pause)
        log.critical(
            "no claims for a while, this machine fails",
            id=claim.queue_id,
            seconds=pause,
            reason=str(error),
        )

    # Transfers

    def _send(self, transfer: DeliveryTask) -> None:
        self._active[transfer] = self._loop.create_task(self._run_delivery(transfer))

    async def _run_delivery(self, transfer: DeliveryTask) -> None:
        try:
            record = await transfer.run()
        except OSError as error:
            self._fault(transfer.claim, error)
            record = transfer.requeued()
        except Exception:
            log.exception("transfer failed for a reason of its own", id=transfer.claim.queue_id)
            record = transfer.broken()
        del self._active[transfer]
        self._ended(transfer, record)
        self._poll()

    def _ended(self, transfer: DeliveryTask, record: Completion) -> None:
        """Give the connection back and have the outcome recorded."""
        transfer.close()
        self._room.ended()
        if transfer is self._exclusive:
            self._exclusive = None
        self._unrecorded += 1
        self._writer.put(record, partial(self._recorded, record))
        _log_outcome(transfer, record)

    def _recorded(self, record: Completion, result: CommandResult | Exception) -> None:
        self._unrecorded -= 1
        self._check_idle()
        if isinstance(result, Exception):
            log.critical("outcome not recorded", id=record.queue_id, reason=first_line(result))
        elif isinstance(result, CompletionResult):
            if result.state is None:
                log.warning("outcome came too late", id=record.queue_id, outcome=record.outcome)
            elif result.state is not record.state:
                log.info(
                    str(result.state),
                    id=record.queue_id,
                    delivery=record.number,
                    reply=record.reply,
                )
            if result.body_deletable:
                self._files.remove(record.queue_id)

    # Deliveries over which workers vanished are sent alone, one after the other: if one takes this
    # worker too, it takes nothing else with it. They do not hold up the mail for longer than
    # ALONE_PATIENCE.

    def _enter_quarantine(self, transfer: DeliveryTask) -> None:
        now = time.monotonic()
        if now < self._next_quarantine_at:
            self._ended(transfer, transfer.postponed())
            return
        if not self._quarantine and self._exclusive is None:
            self._exclusive_until = now + QUARANTINE_TIMEOUT
        self._quarantine.append(transfer)

    def _start_exclusive(self) -> None:
        if self._active or self._opening:
            return
        transfer = self._exclusive = self._quarantine.popleft()
        log.warning(
            "sent alone", id=transfer.claim.queue_id, crash_count=transfer.claim.crash_count
        )
        self._send(transfer)

    def _quarantine_timeout(self, now: float) -> None:
        """Others would not end, or a suspect did not. What can be closed makes way for the next
        suspect, so that its time comes at all; what only waits for its reply goes on; the other
        suspects come again later."""
        self._next_quarantine_at = now + QUARANTINE_PAUSE
        if self._exclusive is None:
            for transfer in self._active:
                transfer.abort()
            transfer = self._exclusive = self._quarantine.popleft()
            self._exclusive_until = now + QUARANTINE_TIMEOUT
            log.warning(
                "sent alone", id=transfer.claim.queue_id, crash_count=transfer.claim.crash_count
            )
            self._send(transfer)
        self._release_quarantine(DeliveryTask.postponed)

    def _release_quarantine(self, record: Callable[[DeliveryTask], Completion]) -> None:
        while self._quarantine:
            transfer = self._quarantine.popleft()
            self._ended(transfer, record(transfer))

    # The end

    async def _drain(self, seconds: float) -> bool:
        self._stopping = True
        self._demand.drop_hints()
        self._release_quarantine(DeliveryTask.requeued)
        await asyncio.sleep(0)  # what was started just now begins, so that it can be stopped
        for transfer in [*self._active]:
            transfer.abort()
        log.info("draining", waiting=len(self._active), seconds=seconds)
        if self._active:
            _, late = await asyncio.wait(self._active.values(), timeout=seconds)
            for task in late:
                task.cancel()
        self._check_idle()
        with suppress(TimeoutError):
            async with asyncio.timeout(RECORDING_TIME):
                await self._idle.wait()
        return self._idle.is_set()

    def _check_idle(self) -> None:
        if self._stopping and not (self._active or self._opening or self._unrecorded):
            self._idle.set()


def _log_outcome(transfer: DeliveryTask, record: Completion) -> None:
    """One line for what became of a claim."""
    took = time.monotonic() - transfer.started
    if record.state is State.DELIVERED:
        metrics.DELIVERY_SECONDS.observe(transfer.claim.received_ago + took)
    event = "handed back" if record.state is State.QUEUED else str(record.state)
    if record.outcome in (Outcome.UNCERTAIN, Outcome.MALFORMED):
        event = str(record.outcome)
    say = log.info if record.state is not State.HELD and event != "uncertain" else log.warning
    again = {"again_in": round(record.delay, 1)} if record.delay else {}
    say(
        event, id=record.queue_id, delivery=record.number, server=record.server, reply=record.reply,
        ms=round(took * 1000), bytes=sum(one.bytes_sent for one in record.tries), tries=len(record.tries), **again,
    )  # fmt: skip
