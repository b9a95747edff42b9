"""Hints: Celery tasks that name messages which may be ready to send.

A hint is one task `deliver(ids)` with ids by route, `{"default": [id, ...]}`, so that a worker
takes as many of each route as the route has capacity for; ids of a route without a name may be of
any. Workers find the same messages in SQL a few seconds later, so a hint may be lost, doubled or
late. No hint has a countdown, an eta or a retry: Redis' visibility timeout would duplicate it.
A hint may also be early: the rows of its messages are only being committed.

A thread publishes the ids that were offered. An early hint is sent by the thread that offers it, if
no other ids wait: to wake another one takes longer than to send.

What must stay true: `Hints.offer` never blocks, as it sends no more than one hint before the broker
has answered; a broker in an outage delays no reply to an SMTP client and no process that ends.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import closing

from redis import Redis
from redis.connection import AbstractConnection

from relay import metrics
from relay.broker import KEY_PREFIX, connect
from relay.hint_entry import Hint, entry_of
from relay.log import first_line, get_logger

log = get_logger(__name__)
FRESH, RETRY = "fresh", "retry"
QUEUES = (FRESH, RETRY)
# No hint is published while the list is longer than this (in Celery messages): workers poll SQL.
WINDOW = 200
# A hint takes a millisecond of a worker's Celery, whatever its size. So a busy publisher waits
# PACE_EACH seconds for each message of its last hint, at most PACE; below some 200 messages a
# second it does not wait.
PACE, PACE_EACH = 0.1, 0.005
_LENGTH_INTERVAL = 1.0

type _Offered = tuple[str, str, bool]  # a route, an id, and whether the hint is early


class Hints:
    """Publishes hints to one queue of a broker."""

    def __init__(self, broker_url: str, queue: str, batch_size: int) -> None:
        self._url = broker_url
        self._queue, self._list = queue, KEY_PREFIX + queue
        self._count = metrics.hints(queue)
        self._batch = batch_size
        self._waiting: deque[_Offered] = deque(maxlen=WINDOW * batch_size)
        self._changed = threading.Condition()
        self._closing = False
        self._idle: AbstractConnection | None = None  # while the thread waits and all was answered
        self._unanswered = False  # a hint that `offer` has sent
        self._error: Exception | None = None  # of `offer`
        self.away = False  # whether the broker does not answer
        self.full = False  # whether the list is longer than WINDOW
        self._measured = 0.0
        self._length: int | None = None
        self.published = 0
        self._thread = threading.Thread(target=self._run, name=f"hints-{queue}", daemon=True)

    def start(self) -> None:
        """Start publishing."""
        self._thread.start()

    def offer(self, ids: Iterable[str], route: str = "", early: bool = False) -> None:
        """Queue a hint for these messages of a route (empty: unknown), unless the broker is away or
        the list is full; never blocks, any thread. `early`: their rows may be there a little
        later."""
        if self.away or self.full:
            return
        with self._changed:
            idle = self._idle if early and not self._waiting else None
            self._waiting.extend((route, queue_id, early) for queue_id in ids)
            if idle is not None:
                self._send_from_caller(idle)
            self._changed.notify()

    def lists(self) -> dict[str, float]:
        """The length of the list by the queue's name; empty if it is not known."""
        return {} if self._length is None else {self._queue: float(self._length)}

    def close(self) -> None:
        """Stop publishing."""
        with self._changed:
            self._closing = True
            self._waiting.clear()
            self._changed.notify()
        self._thread.join(0.5)

    def _run(self) -> None:
        while not self._closing:
            try:
                with closing(connect(self._url)) as broker:
                    self._serve(broker)
            except Exception as error:  # any error: a hint is worth no more than a reconnection
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if not self.away:
            log.warning("broker away", queue=self._queue, reason=first_line(error))
        self.away, self._length = True, None
        with self._changed:
            self._waiting.clear()
            self._changed.wait_for(lambda: self._closing, _LENGTH_INTERVAL)

    def _serve(self, broker: Redis) -> None:
        """Publish over one connection until it breaks or `close` is called."""
        connection = broker.connection
        assert connection is not None  # it is the client's only one
        self._unanswered, self._error = False, None
        self._measure(broker)
        if self.away:
            log.info("broker back", queue=self._queue)
            self.away = False
        while not self._closing:
            batch = self._take(connection)
            if self._unanswered:
                self._read_answer(connection)
            self._measure(broker)
            if not batch or self.full:
                continue
            self._send(connection, batch)
            self._read_answer(connection)
            if len(batch) > 1:
                with self._changed:
                    pace = min(PACE, PACE_EACH * len(batch))
                    self._changed.wait_for(
                        lambda: self._closing or len(self._waiting) >= self._batch, pace
                    )

    def _take(self, connection: AbstractConnection) -> list[_Offered]:
        """Up to a batch of offered ids; none after _LENGTH_INTERVAL, so that the list is measured
        again, and none after `offer` has sent a hint. Raises the error of `offer`."""
        with self._changed:
            self._idle = connection
            self._changed.wait_for(
                lambda: self._waiting or self._unanswered or self._closing, _LENGTH_INTERVAL
            )
            self._idle = None
            if self._error is not None:
                raise self._error
            return self._pop()

    def _pop(self) -> list[_Offered]:
        return [self._waiting.popleft() for _ in range(min(len(self._waiting), self._batch))]

    def _send_from_caller(self, connection: AbstractConnection) -> None:
        """Sends an early hint; the thread reads the answer."""
        self._idle, self._unanswered = None, True
        try:
            self._send(connection, self._pop())
        except Exception as error:  # it is the thread's to handle
            self._error = error

    def _send(self, connection: AbstractConnection, batch: Sequence[_Offered]) -> None:
        ids: dict[str, list[str]] = {}
        for route, queue_id, _ in batch:
            ids.setdefault(route, []).append(queue_id)
        hint = Hint(ids, early=any(early for _, _, early in batch))
        entry = entry_of(hint, self._queue)
        packed = connection.pack_command("LPUSH", self._list, entry)  # type: ignore[no-untyped-call]
        # `_measure` tries the connection, which would take too long here.
        connection.send_packed_command(packed, check_health=False)  # type: ignore[no-untyped-call]

    def _read_answer(self, connection: AbstractConnection) -> None:
        connection.read_response()
        self._unanswered = False
        self.published += 1
        self._count.inc()

    def _measure(self, broker: Redis) -> None:
        now = time.monotonic()
        if now - self._measured >= _LENGTH_INTERVAL:
            self._measured = now
            self._length = length = broker.llen(self._list)
            self.full = length > WINDOW
