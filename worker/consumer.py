"""Celery's consumer as this worker uses it: no broker can end the worker or tell it what to do.

Anybody who reaches the broker can put anything into its lists. kombu decodes an entry with
`json.loads`, whose errors end the process; an entry may also name a compression, a time, callbacks.
So each entry is checked first. Only the ids of a hint are taken from it, and Celery gets a new
entry with them; every other entry is dropped and counted.

Any other failure of the consumer is handled like a lost connection, from which Celery recovers.
What must stay true: no entry ends the consumer, and no failure of the consumer ends the process,
because engine and sweeper must go on.
"""

import base64
import itertools
import json
import re
import time
from functools import partial
from typing import Any

from celery.worker.consumer import Consumer as CeleryConsumer
from kombu.transport import redis
from kombu.utils.uuid import uuid

from relay import metrics
from relay.hints import QUEUES, TASK
from relay.log import first_line, get_logger

log = get_logger(__name__)
LOG_INTERVAL = 60.0  # seconds between two lines about dropped entries
# Seconds before the consumer starts again after a failure that is not a lost connection. The pause
# doubles while it fails again within 2 MAX_PAUSE.
MIN_PAUSE = 1.0
MAX_PAUSE = 30.0
LARGEST = "largest_hint"  # the transport option that says how many ids a hint may have
# Bytes of an entry: in all but its ids, and for each id (43 in JSON and base64).
_FIXED_BYTES = 8192
_BYTES_PER_ID = 64
_ID = re.compile(r"[0-9a-f]{32}")


class NoHint(ValueError):
    """An entry of the broker's list is not a hint; the text says why."""


def hinted(entry: bytes, most: int) -> dict[str, list[str]]:
    """The ids of a hint by route, at most so many. Raises NoHint; decompresses nothing."""
    if len(entry) > _FIXED_BYTES + _BYTES_PER_ID * most:
        raise NoHint(f"{len(entry)} bytes")
    try:
        message = json.loads(entry)
        headers, properties = message["headers"], message["properties"]
        if headers["task"] != TASK or headers.get("compression"):
            raise NoHint("another task, or compressed")
        if message["content-type"] != "application/json" or properties["body_encoding"] != "base64":
            raise NoHint("another content type")
        (ids,), _, _ = json.loads(base64.b64decode(message["body"], validate=True))
    except NoHint:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise NoHint("not written by Celery") from None
    if not isinstance(ids, dict):
        ids = {"": ids}
    if not all(isinstance(some, list) for some in ids.values()):
        raise NoHint("no list of ids")
    if not 0 < sum(map(len, ids.values())) <= most:
        raise NoHint("no ids, or more than BATCH_SIZE")
    flat = itertools.chain.from_iterable(ids.values())
    if not all(isinstance(queue_id, str) and _ID.fullmatch(queue_id) for queue_id in flat):
        raise NoHint("an id is not 32 hex digits")
    return ids


def entry_of(ids: dict[str, list[str]], queue: str) -> bytes:
    """A new entry for these ids, as Celery writes it."""
    task_id = uuid()
    headers = {
        "lang": "py",
        "task": TASK,
        "id": task_id,
        "root_id": task_id,
        "parent_id": None,
        "group": None,
        "eta": None,
        "expires": None,
        "retries": 0,
        "timelimit": [None, None],
        "argsrepr": "",
        "kwargsrepr": "{}",
        "origin": "",
    }
    properties = {
        "correlation_id": task_id,
        "delivery_mode": 2,
        "delivery_tag": uuid(),
        "priority": 0,
        "body_encoding": "base64",
        "delivery_info": {"exchange": "", "routing_key": queue},
    }
    message = {
        "body": base64.b64encode(json.dumps([[ids], {}, {}]).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": properties,
    }
    return json.dumps(message).encode()


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

    def __init__(self, *args: Any, most: int, **options: Any) -> None:
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]
        self._most = most

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
            return key, entry_of(hinted(entry, self._most), queue)
        except NoHint as error:
            _dropped.add(queue, str(error))
            return None


class HintChannel(redis.Channel):
    """A channel on which only hints arrive. A hint that it leaves behind is lost."""

    do_restore = False

    def _get_client(self) -> Any:
        most = self.connection.client.transport_options[LARGEST]
        return partial(_Client, global_keyprefix=self.global_keyprefix, most=most)


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
