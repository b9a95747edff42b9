"""The engine of a worker process: one event loop that owns every connection to a QMQP server.

The road of a message: `offer` queues hints; `_poll` has the producer make claim requests;
`_request` gives each to the commit thread; `_claimed` opens the bodies; `_start` runs a
`DeliveryTask` for each claim; `_complete` has its outcome recorded; `_recorded` removes the body.

What must stay true: all state belongs to the loop, and other threads call only `start`, `offer`,
`poll_now` and `drain`; completions are committed before the renewal that follows them, so that a
worker with a fresh lease has recorded what it did; a local fault (an unreadable disk, no sockets)
pauses claiming and never counts against the mail; a body that alone cannot be read pauses nothing.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from qmqp.body import Body, BodyDamaged, BodyFault
from relay import metrics
from relay.db.group_commit import CommitThread
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
from relay.routes import Route, Routes
from relay.runtime import new_loop
from relay.settings import WorkerSettings
from relay.spool.bodies import Bodies, BodyMisplaced
from relay.spool.damaged_bodies import RECHECK, DamagedBodies
from relay.spool.journal.blockwise import UNREADABLE
from relay.spool.journal.format import Place
from relay.spool.store import BodyUnsendable, Spool
from worker.body_io import BodyIo, Opened
from worker.circuit_breaker import ConnectionSlot, ServerPool
from worker.delivery import DeliveryTask, TransferConfig, log_outcome
from worker.lease import Lease
from worker.prober import Prober
from worker.producer import ClaimsHandler, HintBatch, Producer, Slots
from worker.quarantine import MIN_CRASHES, Quarantine

log = get_logger(__name__)
MAX_FAULT_PAUSE = 30.0  # seconds without claims after a local fault
GATHER = 0.005  # seconds in which free slots and outcomes gather while there are many
STANDSTILL = 1.0  # seconds between two ticks: the process or its machine was stopped
RECORDING_TIME = 5.0  # seconds at the end of a drain for the last outcomes to be recorded


class Engine:
    """Sends what its queue lets it claim. `start`, then `offer` from any thread, then `drain`."""

    def __init__(
        self,
        settings: WorkerSettings,
        queue: WorkerQueue,
        spool: Spool,
        routes: Routes,
        *,
        servers: ServerPool | None = None,
    ) -> None:
        self._settings = settings
        self.routes = routes
        self.servers = servers or ServerPool(
            settings.server_connections, backoff=(settings.retry_min, settings.retry_max)
        )
        self._loop = new_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._commands: CommitThread[Command, CommandResult] = CommitThread(
            "outcomes",
            queue.commit,
            post=self._loop.call_soon_threadsafe,
            largest=512,
            gather=GATHER,
            observe=metrics.group_commit("outcomes"),
        )
        self.lease = Lease(queue, settings.lease, self._renew)
        self.producer = Producer(settings, routes, self.servers, self._request, self._call_in)
        self._bodies = BodyIo(self._loop, spool, Bodies(spool, queue.engine))
        self._damaged_bodies = DamagedBodies()
        self._config = TransferConfig(settings, self.servers, self.lease.may_commit)
        self._quarantine = Quarantine(self._send, self._complete)
        self._prober = Prober(self.servers, settings.connect_timeout)
        self._active: dict[DeliveryTask, asyncio.Task[None]] = {}
        metrics.TRANSFERS_OPEN.set_function(lambda: len(self._active))
        self._unrecorded = 0  # completions that are not committed yet
        self.outcomes = 0  # completions that are committed
        self._faults = 0  # in a row
        self._paused_until = 0.0
        self._claim_at = 0.0  # when slots have gathered for the next claims
        self._gathered: asyncio.TimerHandle | None = None
        self._stopping = False
        self.heartbeat = time.monotonic()  # when the loop last turned

    # From other threads

    def start(self) -> None:
        """Start the loop and the commit thread; `lease.registered` is set when the worker has its
        row."""
        for route in self.routes.all():
            if not route.servers:
                log.warning("no server configured", route=route.name, setting="RELAY_QMQP_SERVERS")
        self._commands.start()
        self._thread.start()

    def offer(
        self, ids: Sequence[str], queue: str = "fresh", route: str = "", *, early: bool = False
    ) -> HintBatch:
        """Deliver these messages as connections become free. Thread-safe; never blocks.

        `queue` is the Celery queue of the hints, `route` their route if it is known; `early`: their
        rows may not be there yet.
        """
        batch = HintBatch(early=early)
        if ids and not self._stopping:
            self._loop.call_soon_threadsafe(self._offered, batch, ids, queue, route)
        else:
            batch.set()
        return batch

    def poll_now(self) -> None:
        """Claim overdue deliveries now. Thread-safe."""
        self._loop.call_soon_threadsafe(self.producer.poll_now)
        self._loop.call_soon_threadsafe(self._poll)

    def drain(self, timeout: float) -> bool:
        """Stop: close what may be closed, wait `timeout` seconds for the rest, record everything,
        end the loop. Blocks; True if every outcome was recorded."""
        if self._stopping or not self._thread.is_alive():
            return True
        recorded = asyncio.run_coroutine_threadsafe(self._drain(timeout), self._loop).result()
        recorded = self._commands.close(RECORDING_TIME) and recorded
        if recorded:
            self.lease.retire()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._bodies.close()
        return recorded

    # The loop

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        lease = self._loop.create_task(self.lease.hold(self._poll, self._abort_all))
        self._loop.call_soon(self._tick)
        self._loop.run_forever()
        lease.cancel()
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(lease)
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def _tick(self) -> None:
        now = time.monotonic()
        elapsed = now - self.heartbeat
        self.heartbeat = now
        if elapsed > STANDSTILL:  # nothing could move in this time, so no deadline counts it
            self._quarantine.extend(elapsed)
            self.producer.extend_waits(elapsed)
        self.producer.drop_hints(unless_moved_since=now - self._settings.grace)
        self._quarantine.check_timeout(now, self._active)
        if not self._stopping:
            self._prober.start_due()
        self._poll()
        self._loop.call_later(min(0.25, self._settings.lease / 8), self._tick)

    def _renew(self, renewal: Renewal) -> asyncio.Future[CommandResult | Exception]:
        renewed: asyncio.Future[CommandResult | Exception] = self._loop.create_future()

        def resolve(result: CommandResult | Exception) -> None:
            if not renewed.done():
                renewed.set_result(result)

        self._commands.put(renewal, resolve)
        return renewed

    def _abort_all(self) -> None:
        for task in self._active:
            task.abort()

    # Hint -> claim -> open -> deliver -> complete

    def _offered(self, batch: HintBatch, ids: Sequence[str], queue: str, route: str) -> None:
        self.producer.add(batch, ids, queue, route)
        if self._stopping:
            self.producer.drop_hints()
        self._poll()

    def _poll(self) -> None:
        if self.producer.capacity.busy == self._quarantine.waiting:
            self._quarantine.send_next()
        now = time.monotonic()
        if (
            not self._stopping
            and now >= self._paused_until
            and not self._quarantine.blocks_claims(now)
            and self.lease.may_commit(self.lease.worker)
        ):
            if self._active and now < self._claim_at:
                self._gather(self._claim_at - now)
            else:
                self.producer.produce(self.lease.worker, now)

    def _call_in(self, seconds: float, call: Callable[[], None]) -> None:
        def then_poll() -> None:
            call()
            self._poll()

        self._loop.call_later(seconds, then_poll)

    def _gather(self, seconds: float) -> None:
        """Lets more slots become free: a claim for each would cost a transaction for each."""
        if self._gathered is None:
            self._gathered = self._loop.call_later(seconds, self._end_gather)

    def _end_gather(self) -> None:
        self._gathered = None
        self._poll()

    def _request(self, request: ClaimRequest, handler: ClaimsHandler) -> None:
        self._commands.put(request, partial(self._claimed, request.worker, handler), urgent=True)

    def _claimed(
        self, worker: str, handler: ClaimsHandler, result: CommandResult | Exception
    ) -> None:
        claims = result if isinstance(result, list) else []
        if len(claims) > 1:
            self._claim_at = time.monotonic() + GATHER
        slots = handler(claims)
        if claims:
            self._bodies.open(claims, partial(self._opened, worker, claims, slots))
        self._poll()

    def _opened(self, worker: str, claims: Sequence[Claim], slots: Slots, opened: Opened) -> None:
        for claim, slot, body in zip(claims, slots, opened, strict=True):
            self._start(claim, worker, slot, body)
        self._poll()

    def _start(
        self, claim: Claim, worker: str, slot: ConnectionSlot | None, body: Body | Exception
    ) -> None:
        """Send a claim whose body was opened: `body` may be the error instead."""
        content = b"" if isinstance(body, Exception) else body
        route = self.routes.get(claim.route) or Route(claim.route, ())  # it is gone
        task = DeliveryTask(claim, worker, content, route, self._config, slot)
        if isinstance(body, BodyMisplaced):
            self._complete(task, self._damaged(task, str(body), body.place))
        elif isinstance(body, BodyUnsendable):
            log.critical("body unsendable", id=claim.queue_id, reason=str(body))
            self._complete(task, task.unsendable(str(body)))
        elif isinstance(body, Exception):
            self._pause_claiming(claim, body)
            self._complete(task, task.requeued())
        elif self._stopping or worker != self.lease.worker:
            self._complete(task, task.requeued())
        elif claim.crash_count >= MIN_CRASHES:
            self._quarantine.add(task)
        else:
            self._faults = 0
            self._send(task)

    def _damaged(self, task: DeliveryTask, reason: str, place: Place | None) -> Completion:
        """The body does not verify, or cannot be read: read it again later, and hold the delivery
        the second time."""
        queue_id = task.claim.queue_id
        held = self._damaged_bodies.confirmed(queue_id, place)
        metrics.BODIES_DAMAGED.inc()
        log.critical("body damaged", id=queue_id, held=held, reason=reason)
        return task.unsendable(reason) if held else task.recheck(reason, RECHECK)

    def _pause_claiming(self, claim: Claim, error: Exception) -> None:
        """A local fault: claim nothing for a time that doubles with each fault in a row."""
        self._faults += 1
        pause = min(MAX_FAULT_PAUSE, 0.5 * 2.0 ** min(self._faults, 10))
        self._paused_until = max(self._paused_until, time.monotonic() + pause)
        log.critical("local fault", id=claim.queue_id, seconds=pause, reason=str(error))

    def _send(self, task: DeliveryTask) -> None:
        self._active[task] = self._loop.create_task(self._run_delivery(task))

    async def _run_delivery(self, task: DeliveryTask) -> None:
        try:
            completion = await task.run()
        except BodyDamaged as error:
            completion = self._damaged(task, str(error.strerror), task.claim.place)
        except OSError as error:
            completion = await self._faulted(task, error)
        except Exception:
            log.exception("delivery failed by a defect", id=task.claim.queue_id)
            completion = task.broken()
        del self._active[task]
        self._complete(task, completion)
        self._poll()

    async def _faulted(self, task: DeliveryTask, error: OSError) -> Completion:
        """An error of this machine while a message was sent."""
        with suppress(asyncio.CancelledError):  # at the end of a drain nothing is decided
            if (
                isinstance(error, BodyFault)
                and error.errno in UNREADABLE
                and await self._bodies.disk_reads()
            ):
                return self._damaged(task, str(error.strerror), task.claim.place)
            self._pause_claiming(task.claim, error)
        return task.requeued()

    def _complete(self, task: DeliveryTask, completion: Completion) -> None:
        """Free the connection and have the outcome recorded."""
        task.close()
        self.producer.capacity.ended()
        self._quarantine.ended(task)
        self._unrecorded += 1
        self._commands.put(completion, partial(self._recorded, completion))
        log_outcome(task, completion)

    def _recorded(self, completion: Completion, result: CommandResult | Exception) -> None:
        self._unrecorded -= 1
        queue_id = completion.queue_id
        if isinstance(result, Exception):
            log.critical("outcome not recorded", id=queue_id, reason=first_line(result))
        elif isinstance(result, CompletionResult):
            self.outcomes += 1
            if result.state is None:
                log.warning("claim superseded", id=queue_id, outcome=completion.outcome)
            elif result.state is not completion.state:
                reply, number = completion.reply, completion.number
                log.info(str(result.state), id=queue_id, delivery=number, reply=reply)
            if result.body_deletable:
                self._bodies.remove(queue_id)

    # The end

    async def _drain(self, seconds: float) -> bool:
        self._stopping = True
        self.producer.drop_hints()
        self._quarantine.release(DeliveryTask.requeued)
        self._prober.close()
        await asyncio.sleep(0)  # tasks that were just created must run before they can be aborted
        self._abort_all()
        log.info("draining", waiting=len(self._active), seconds=seconds)
        if self._active:
            _, late = await asyncio.wait(self._active.values(), timeout=seconds)
            for task in late:
                task.cancel()
        end = time.monotonic() + RECORDING_TIME
        while self.producer.capacity.busy or self._unrecorded:
            if time.monotonic() > end:
                return False
            await asyncio.sleep(0.01)
        return True
