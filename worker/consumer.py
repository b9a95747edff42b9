"""Celery's consumer as this worker uses it: no broker can end the worker or tell it what to do.

Each entry of the broker's lists is checked first (`relay.hint_entry`). Celery gets a new entry with
the ids of a hint; every other entry is dropped and counted. An early hint is offered to the engine
at once, if it takes it: Celery needs a millisecond to begin a task.

Any other failure of the consumer is handled like a lost connection, from which Celery recovers.
What must stay true: no entry ends the consumer, and no failure of the consumer ends the process,
because engine and sweeper must go on.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from celery.worker.consumer import Consumer as CeleryConsumer
from kombu.transport import redis

from relay import metrics
from relay.hint_entry import Hint, NoHint, entry_of, hinted
from relay.hints import QUEUES
from relay.log import first_line, get_logger

log = get_logger(__name__)
LOG_INTERVAL = 60.0  # seconds between two lines about dropped entries
# Seconds before the consumer starts again after a failure that is not a lost connection. The pause
# doubles while it fails again within 2 MAX_PAUSE.
MIN_PAUSE = 1.0
MAX_PAUSE = 30.0
# Options of the transport: how many ids a hint may have, and the function that gets an early hint
# and the name of its queue, and says whether it has taken it.
LARGEST = "largest_hint"
TAKE_EARLY = "take_early_hint"


class DroppedEntries:
    """Counts entries that are not hints, and logs them now and then."""

    def __init__(self) -> None:
        self._logged_at = float("-inf")
        self._count = 0

    def add(self, queue: str, reason: str) -> None:
        """Count one more."""
        metrics.HINTS_REFUSED.labels(queue).inc()
        self._count += 1
        if (now := time.monotonic()) - self._logged_at >= LOG_INTERVAL:
            log.warning("hints refused", queue=queue, reason=reason, count=self._count)
            self._logged_at = now
            self._count = 0


_dropped = DroppedEntries()


class _Client(redis.PrefixedStrictRedis):
    """Replies to a BRPOP with a hint, or as if the list had been empty."""

    def __init__(
        self, *args: Any, most: int, take_early: Callable[[Hint, str], bool], **options: Any
    ) -> None:
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]
        self._most, self._take_early = most, take_early

    def parse_response(self, connection: Any, command_name: str, **options: Any) -> Any:
        """The broker's reply. (`celery inspect` uses BRPOP on lists of its own.)"""
        reply = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]
        if command_name != "BRPOP" or not reply:
            return reply
        key, entry = reply
        queue = key.decode("ascii", "replace").partition(redis.Channel.sep)[0]
        if queue not in QUEUES:
            return reply
        try:
            hint = hinted(entry, self._most)
        except NoHint as error:
            _dropped.add(queue, str(error))
            return None
        if hint.early and self._take_early(hint, queue):
            return None
        return key, entry_of(hint, queue)


class HintChannel(redis.Channel):
    """A channel on which only hints arrive. A hint that it leaves behind is lost."""

    do_restore = False

    def _get_client(self) -> Any:
        options = self.connection.client.transport_options
        return partial(
            _Client,
            global_keyprefix=self.global_keyprefix,
            most=options[LARGEST],
            take_early=options[TAKE_EARLY],
        )


class Transport(redis.Transport):
    """Redis, with such channels."""

    Channel = HintChannel


class Consumer(CeleryConsumer):  # type: ignore[misc]
    """A consumer that starts again after any failure and never stops consuming its queues."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._lost_connection: tuple[type[BaseException], ...] = self.connection_errors  # type: ignore[has-type]
        self.connection_errors = (Exception,)
        self._failed_at = float("-inf")
        self._pause = MIN_PAUSE

    def connection_for_read(self, heartbeat: Any = None) -> Any:
        """A connection over which hints arrive; it is Redis, whatever the scheme of the URL."""
        connection = self.app.connection_for_read(heartbeat=heartbeat)
        connection.transport_cls = Transport
        return self.ensure_connected(connection)

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Celery tries again after this."""
        super().on_connection_error_before_connected(exc)
        self._wait_after(exc)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Celery connects again after this."""
        super().on_connection_error_after_connected(exc)
        self._wait_after(exc)

    def _wait_after(self, exc: Exception) -> None:
        if isinstance(exc, self._lost_connection):  # Celery has pauses of its own for these
            return
        now = time.monotonic()
        again = now - self._failed_at < 2 * MAX_PAUSE
        self._pause = min(MAX_PAUSE, 2 * self._pause) if again else MIN_PAUSE
        self._failed_at = now
        log.error("consumer failed", reason=first_line(exc), seconds=self._pause)
        time.sleep(self._pause)

    def cancel_task_queue(self, queue: Any) -> None:
        """Ignore a remote command to stop consuming: mail would wait for the next overdue poll, and
        no message would say why."""
        log.warning("consumer not cancelled", queue=str(queue))
