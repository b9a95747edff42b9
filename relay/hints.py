"""The broker: a Celery application, and hints.

A hint is one task `deliver(ids)` that names messages which may be ready to send, by route:
`{"default": [id, ...]}`. So a worker takes as many of each route as that route has room for; the
ids of a route without a name may be of any. It carries no truth: workers find the same in SQL a few
seconds later, so a hint may be lost, doubled or stale, and whoever publishes one gives up at once
when the broker is away. Nothing is ever scheduled with a countdown, an eta or a retry: Redis'
visibility timeout would make duplicates of them.

What must stay true: `Hints.offer` never blocks; no broker holds up the reply to an SMTP client or
the end of a process.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from celery import Celery
from kombu.entity import Exchange, Queue

from relay import metrics
from relay.log import first_line, get_logger
from relay.settings import Settings

log = get_logger(__name__)
TASK = "deliver"
FRESH, RETRY = "fresh", "retry"
QUEUES = (FRESH, RETRY)
# Longer lists than this are left to SQL (Celery messages).
WINDOW = 200
# A hint costs the broker's machinery milliseconds, whatever is in it. So a busy publisher lets more
# gather the more there was: nothing below some 200 messages a second, up to PACE above (seconds;
# seconds a message of the last hint).
PACE, PACE_EACH = 0.1, 0.005
_LOOK_EVERY = 1.0


def celery_app(settings: Settings) -> Celery:
    """The application that both halves use; connects to nothing yet. Sources of the values:
    docs/design.md."""
    app = Celery("qmqp-relay", set_as_current=True)
    app.conf.update(
        broker_url=settings.broker_url,
        result_backend=None,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_queues=[Queue(name, exchange=Exchange("mail"), routing_key=name) for name in QUEUES],
        task_default_queue=FRESH,
        task_create_missing_queues=False,
        task_acks_late=False,
        worker_pool="threads",
        worker_concurrency=4,
        # Not worker_disable_prefetch: with early ack nothing wakes the consumer when a task ends.
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_disable_rate_limits=True,
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "global_keyprefix": "qmqp-relay:",
            "socket_timeout": 5,
            "socket_connect_timeout": 2,
            "socket_keepalive": True,
            "health_check_interval": 25,
            "unacked_restore_throttle": 1,
        },
        timezone="UTC",
    )
    return app


class Hints:
    """Publishes hints to one queue from a thread of its own."""

    def __init__(self, app: Celery, queue: str, batch_size: int) -> None:
        self._app, self._queue, self._batch = app, queue, batch_size
        self._waiting: deque[tuple[str, str]] = deque(maxlen=WINDOW * batch_size)
        self._changed = threading.Condition()
        self._closing = False
        self.away = False  # the broker does not answer
        self.full = False  # the list is longer than the window: hinting has stopped for now
        self._looked = 0.0
        self._length: int | None = None
        self.published = 0
        self._thread = threading.Thread(target=self._run, name=f"hints-{queue}", daemon=True)

    def start(self) -> None:
        """Start publishing."""
        self._thread.start()

    def offer(self, ids: Iterable[str], route: str = "") -> None:
        """Hint at these messages of a route (empty: not known) if that can be done; never blocks,
        any thread."""
        if self.away or self.full:
            return
        with self._changed:
            self._waiting.extend((route, queue_id) for queue_id in ids)
            self._changed.notify()

    def lists(self) -> dict[str, float]:
        """How long the list is, if that is known, by the queue's name."""
        return {} if self._length is None else {self._queue: float(self._length)}

    def close(self) -> None:
        """Publish nothing more."""
        with self._changed:
            self._closing = True
            self._waiting.clear()
            self._changed.notify()
        self._thread.join(0.5)

    def _run(self) -> None:
        while not self._closing:
            try:
                with self._app.connection_for_write() as connection:
                    self._serve(connection)
            except Exception as error:  # whatever it says: hints are worth nothing but a new try
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if not self.away:
            log.warning("broker away", queue=self._queue, reason=first_line(error))
        self.away, self._length = True, None
        with self._changed:
            self._waiting.clear()
            self._changed.wait_for(lambda: self._closing, _LOOK_EVERY)

    def _serve(self, connection: Any) -> None:
        """Publish over one connection until it breaks or we close."""
        options = self._app.conf.broker_transport_options
        connection.transport_options.update(options | {"socket_timeout": 2, "max_retries": 0})
        _ = (
            self._app.backend
        )  # there is none, but finding that out takes the first message 0.1 s of imports
        producer, published = self._app.amqp.Producer(connection), metrics.hints(self._queue)
        self._look(connection)
        if self.away:
            log.info("broker back", queue=self._queue)
            self.away = False
        while not self._closing:
            taken = self._take()
            self._look(connection)
            if not taken or self.full:
                continue
            ids: dict[str, list[str]] = {}
            for route, queue_id in taken:
                ids.setdefault(route, []).append(queue_id)
            self._app.send_task(TASK, args=[ids], queue=self._queue, producer=producer, retry=False)
            self.published += 1
            published.inc()
            if len(taken) > 1:
                with self._changed:
                    pace = min(PACE, PACE_EACH * len(taken))
                    self._changed.wait_for(
                        lambda: self._closing or len(self._waiting) >= self._batch, pace
                    )

    def _take(self) -> list[tuple[str, str]]:
        """Up to a batch of routes and ids; none after a while, to look whether the list is still
        too long."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing, _LOOK_EVERY)
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), self._batch))]

    def _look(self, connection: Any) -> None:
        now = time.monotonic()
        if now - self._looked >= _LOOK_EVERY:
            self._looked = now
            self._length = connection.default_channel.client.llen(self._queue)
            self.full = self._length > WINDOW
