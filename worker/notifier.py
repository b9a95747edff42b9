"""The notifier: a thread in every worker that delivers events to webhooks and plugins.

Each subscription has an `EventCourier` on the event loop of this thread. It claims events that are
due (`relay.events.outbox`), sends up to CONCURRENCY of them at once, and records what became of
them, several in a transaction. A try that failed is repeated after the times in DELAYS. While a
receiver fails as a whole, one event at a time is tried, with growing pauses. If nothing arrived for
OUTAGE and several messages failed, what failed is due at once after the first that arrives again.

What must stay true: a receiver that is slow or dead costs mail nothing but rows; a courier holds at
most CONCURRENCY events in memory; nothing is deleted before the receiver has it, or TRIES failed,
or LONGEST_WAIT has passed.
"""

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial

from relay import metrics
from relay.events.outbox import ClaimedEvent, FinishedEvent, Outbox, Report
from relay.events.subscriptions import RENEWAL, Subscriptions
from relay.log import first_line, get_logger
from worker.event_receiver import EventReceiver, SendResult

log = get_logger(__name__)
CONCURRENCY = 16  # events of a subscription that a worker sends at once
POLL_INTERVAL = 1.0  # seconds between two looks for events
GATHER = 0.05  # seconds that a finished try waits for others, to be recorded with them
# Seconds from a failed try to the next, as the Standard Webhooks specification proposes.
DELAYS = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)
TRIES = len(DELAYS) + 1
LONGEST_WAIT = sum(DELAYS) + 3600.0  # then an event is given up, also if nothing could be tried
LONGEST_PAUSE = 60.0  # seconds without a try, while a receiver fails
LONGEST_ASKED = 3600.0  # the same, if the receiver asks for it by Retry-After
OUTAGE = 60.0  # after a longer one what failed before is tried at once
WOKEN = 500  # events that one transaction makes due then
CLEANING = 600.0  # seconds between two looks for events that have waited for too long
EXPIRED = 1000  # events that one transaction gives up
CLOSE_TIME = 2.0  # seconds for the tries that are under way when a worker stops


class EventCourier:
    """Delivers the events of one subscription, on one event loop. Statements run on `database`."""

    def __init__(
        self,
        receiver: EventReceiver,
        outbox: Outbox,
        subscriptions: Subscriptions,
        database: Executor,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.receiver = receiver
        self.name = receiver.subscription.name
        self._outbox = outbox
        self._subscriptions = subscriptions
        self._database = database
        self._clock = clock
        self._running: dict[asyncio.Task[SendResult], ClaimedEvent] = {}
        self._finished: list[FinishedEvent] = []  # not recorded yet
        self._failures = 0  # in a row, of the receiver as a whole
        self._failing_since: float | None = None
        self._failed_messages: set[str] = set()  # since then; one alone is no outage
        self._paused_until = self._noted_at = float("-inf")
        self._waking = False
        self._clean_at = clock() + CLEANING

    async def turn(self) -> bool:
        """Record what has finished and claim what is due; whether more may be due now."""
        if self._finished:
            await self._call(
                self._outbox.finish, self.name, self._finished
            )  # again after an outage
            self._finished.clear()
        if self._clock() >= self._clean_at:
            self._clean_at = self._clock() + CLEANING
            await self._call(self._expire)
        if self._waking:
            woken = await self._call(self._outbox.wake, self.name, WOKEN)
            self._waking = woken == WOKEN
        free = (1 if self._failures else CONCURRENCY) - len(self._running)
        if free <= 0 or self._clock() < self._paused_until:
            return False
        claimed, more = await self._call(self._outbox.claim, self.name, free)
        for one in claimed:
            self._running[asyncio.create_task(self._send(one))] = one
        return more and len(claimed) < free

    async def wait(self, seconds: float) -> None:
        """Wait for a try to end, at most for so long, and take its result. Tries that end within
        GATHER are recorded together."""
        if not self._running:
            return
        await asyncio.wait(self._running, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        done, _ = await asyncio.wait(self._running, timeout=GATHER)
        await self._take(done)

    async def drain(self, seconds: float) -> None:
        """Claim nothing more, and give back what does not end in time."""
        if self._running:
            done, left = await asyncio.wait(self._running, timeout=seconds)
            await self._take(done)
            for task in left:
                task.cancel()
            self._finished += [
                FinishedEvent(claimed, Report.RETURN) for claimed in self._running.values()
            ]
            await asyncio.gather(*left, return_exceptions=True)
            self._running.clear()
        if self._finished:
            await self._call(self._outbox.finish, self.name, self._finished)
        await self.receiver.close()

    @property
    def idle(self) -> bool:
        """Whether no try is under way."""
        return not self._running

    async def _call[**P, T](self, run: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a statement on the thread for the database."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._database, partial(run, *args, **kwargs))

    async def _send(self, claimed: ClaimedEvent) -> SendResult:
        began = time.monotonic()
        try:
            result = await self.receiver.send(claimed.event)
        except Exception as error:
            log.exception("event not delivered by a defect", subscription=self.name)
            result = SendResult(f"a defect of this program: {first_line(error)}", down=True)
        metrics.NOTIFICATION_SECONDS.labels(self.name).observe(time.monotonic() - began)
        return result

    async def _take(self, done: set[asyncio.Task[SendResult]]) -> None:
        """Decide what each result means."""
        results = [(self._running.pop(task), task.result()) for task in done]
        given_up = 0
        for claimed, result in results:
            last = bool(result.error) and result.tried and claimed.tries + 1 >= TRIES
            given_up += last
            if result.error and len(self._failed_messages) < 2:
                self._failed_messages.add(claimed.event.queue_id)
            self._finished.append(_finished(claimed, result, last=last))
            what = "given_up" if last else "failed" if result.error else "delivered"
            metrics.NOTIFICATIONS.labels(self.name, what).inc()
        if given_up:
            log.error("events given up", subscription=self.name, events=given_up)
        await self._note([result for _, result in results])

    async def _note(self, results: Sequence[SendResult]) -> None:
        """Record how the receiver does, and pause while it fails."""
        failed = next((result for result in results if result.error), None)
        if any(not result.error for result in results):
            await self._note_success()
        elif failed is not None and (gone := next((r for r in results if r.gone), None)):
            reason = f"the receiver wants no more events: {gone.error}"
            await self._call(self._subscriptions.disable, self.name, reason)
            log.error("subscription disabled", subscription=self.name, reason=reason)
        elif failed is not None:
            await self._note_failure(failed.error)
        if down := [result for result in results if result.down]:
            self._failures += 1
            self._failing_since = self._failing_since or self._clock()
            asked = min(max(result.retry_after for result in down), LONGEST_ASKED)
            pause = max(min(2.0 ** min(self._failures, 10), LONGEST_PAUSE), asked)
            self._paused_until = self._clock() + pause

    async def _note_success(self) -> None:
        several = len(self._failed_messages) > 1
        self._failed_messages.clear()
        if self._failing_since is not None:
            log.info("subscription recovered", subscription=self.name)
            if several and self._clock() - self._failing_since >= OUTAGE:
                self._waking = True
        elif self._clock() - self._noted_at < RENEWAL:
            return
        self._failures, self._failing_since = 0, None
        self._noted_at = self._clock()
        await self._call(self._subscriptions.note_success, self.name)

    async def _note_failure(self, error: str) -> None:
        if self._failing_since is None:
            log.warning("subscription failing", subscription=self.name, reason=error)
            self._failing_since = self._clock()
        elif self._clock() - self._noted_at < RENEWAL:
            return
        self._noted_at = self._clock()
        await self._call(self._subscriptions.note_failure, self.name, error)

    def _expire(self) -> None:
        """Give up what has waited for too long."""
        total = count = self._outbox.expire(self.name, LONGEST_WAIT, EXPIRED)
        while count == EXPIRED:
            count = self._outbox.expire(self.name, LONGEST_WAIT, EXPIRED)
            total += count
        if total:
            metrics.NOTIFICATIONS.labels(self.name, "given_up").inc(total)
            log.error("events given up", subscription=self.name, events=total)


def _finished(claimed: ClaimedEvent, result: SendResult, *, last: bool) -> FinishedEvent:
    """How a claim ends after a result. A receiver that wants no events any more has not tried."""
    if not result.error or last:
        return FinishedEvent(claimed, Report.DONE)
    if result.gone or not result.tried:
        return FinishedEvent(claimed, Report.RETURN, LONGEST_PAUSE)
    delay = DELAYS[claimed.tries] * (1 + random.random() / 10)
    return FinishedEvent(claimed, Report.RETRY, max(delay, result.retry_after))


class Notifier(threading.Thread):
    """The thread of all couriers. `open_receivers` makes the receivers, on the event loop; `stop`
    ends what they share."""

    def __init__(
        self,
        outbox: Outbox,
        subscriptions: Subscriptions,
        open_receivers: Callable[[], Sequence[EventReceiver]],
        stop: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(name="notifier", daemon=True)
        self._outbox = outbox
        self._subscriptions = subscriptions
        self._open = open_receivers
        self._stop_receivers = stop
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        # One thread, so that events never take more than one connection from mail.
        self._database = ThreadPoolExecutor(1, thread_name_prefix="notifier-database")

    def run(self) -> None:
        with contextlib.closing(self._loop), self._database:
            self._loop.run_until_complete(self._main())

    def close(self) -> None:
        """End after the tries that are under way, or after CLOSE_TIME."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._closing.set)

    async def _main(self) -> None:
        receivers = self._open()
        couriers = [
            EventCourier(receiver, self._outbox, self._subscriptions, self._database)
            for receiver in receivers
        ]
        await asyncio.gather(self._renew(receivers), *map(self._deliver, couriers))
        if self._stop_receivers is not None:
            await self._stop_receivers()
        await self._loop.shutdown_default_executor()

    async def _renew(self, receivers: Sequence[EventReceiver]) -> None:
        """Renew the subscriptions until this worker stops."""
        wanted = [receiver.subscription for receiver in receivers]
        while not await self._closes_within(RENEWAL):
            try:
                await self._loop.run_in_executor(
                    self._database, self._subscriptions.register, wanted
                )
            except Exception as error:
                log.warning("subscriptions not renewed", reason=first_line(error))

    async def _deliver(self, courier: EventCourier) -> None:
        """Run a courier until this worker stops."""
        reported = False
        while not self._closing.is_set():
            try:
                more = await courier.turn()
                await courier.wait(0.0 if more else POLL_INTERVAL)
                reported = False
            except Exception as error:  # an outage of the database, which the next turn survives
                if not reported:
                    log.warning(
                        "events not handled", subscription=courier.name, reason=first_line(error)
                    )
                reported, more = True, False
                await self._closes_within(POLL_INTERVAL)
            if not more and courier.idle:
                await self._closes_within(POLL_INTERVAL)
        with contextlib.suppress(Exception):  # what is not recorded is sent again
            await courier.drain(CLOSE_TIME)

    async def _closes_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)
        return self._closing.is_set()
