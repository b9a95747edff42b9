"""Celery's consumer, as this worker uses it: the broker is nobody's master.

Whoever reaches the broker can put anything into its lists. kombu decodes an entry with
`json.loads`, and what that raises ends the process; an entry may also name a compression, a time,
callbacks. So each entry is read here first: the ids of a hint are all that is taken from it, and
Celery gets a new entry around them. Everything else is dropped and counted.

Whatever else fails in the consumer is taken for a lost connection, from which Celery recovers by
itself. What must stay true: no entry ends the consumer, and nothing in it ends the process: engine
and sweeper go on.
"""

import base64
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
LOG_EVERY = 60.0  # seconds between two lines about entries that were dropped
SHORTEST_PAUSE, LONGEST_PAUSE = (
    1.0,
    30.0,
)  # before the consumer starts again after a failure of its own (seconds)
LARGEST = "largest_hint"  # the transport option that says how many ids a hint may have
_ENVELOPE, _EACH = (
    8192,
    64,
)  # bytes of an entry: around its ids, and for each (43 in JSON and base64)
_ID = re.compile(r"[0-9a-f]{32}")


class NoHint(ValueError):
    """An entry of the broker's list is no hint; the text says why."""


def hinted(entry: bytes, most: int) -> dict[str, list[str]]:
    """The ids of a hint by route, as Celery writes it, of at most so many; raises NoHint. Unpacks
    nothing."""
    if len(entry) > _ENVELOPE + _EACH * most:
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
    ids = ids if isinstance(ids, dict) else {"": ids}
    if (
        not all(isinstance(some, list) for some in ids.values())
        or not 0 < sum(map(len, ids.values())) <= most
    ):
        raise NoHint("no list of ids, or a longer one than BATCH_SIZE")
    if not all(
        isinstance(one, str) and _ID.fullmatch(one) for some in ids.values() for one in some
    ):
        raise NoHint("an id is not 32 hex digits")
    return ids


def entry_of(ids: dict[str, list[str]], queue: str) -> bytes:
    """An entry for these ids, in which nothing was said by anybody else."""
    task_id = uuid()
    headers = {
        "lang": "py", "task": TASK, "id": task_id, "root_id": task_id, "parent_id": None, "group": None, "eta": None,
        "expires": None, "retries": 0, "timelimit": [None, None], "argsrepr": "", "kwargsrepr": "{}", "origin": "",
    }  # fmt: skip
    properties = {
        "correlation_id": task_id, "delivery_mode": 2, "delivery_tag": uuid(), "priority": 0, "body_encoding": "base64",
        "delivery_info": {"exchange": "", "routing_key": queue},
    }  # fmt: skip
    body = base64.b64encode(json.dumps([[ids], {}, {}]).encode()).decode()
    return json.dumps({
        "body": body, "content-encoding": "utf-8", "content-type": "application/json", "headers": headers,
        "properties": properties,
    }).encode()  # fmt: skip


class Refusals:
    """Counts entries that are no hints, and logs them now and then."""

    def __init__(self) -> None:
        self._logged, self._since = float("-inf"), 0

    def add(self, queue: str, reason: str) -> None:
        """One more."""
        metrics.HINTS_REFUSED.labels(queue).inc()
        self._since += 1
        if (now := time.monotonic()) - self._logged >= LOG_EVERY:
            log.warning("hints refused", queue=queue, reason=reason, count=self._since)
            self._logged, self._since = now, 0


_refusals = Refusals()


class _Client(redis.PrefixedStrictRedis):
    """Answers a BRPOP with a hint, or as if none had come."""

    def __init__(self, *args: Any, most: int, refusals: Refusals, **given: Any) -> None:
        super().__init__(*args, **given)  # type: ignore[no-untyped-call]
        self._most, self._refusals = most, refusals

    def parse_response(self, connection: Any, command_name: str, **options: Any) -> Any:
        """What the broker answers; `celery inspect` waits for its own lists in the same way."""
        found = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]
        if command_name != "BRPOP" or not found:
            return found
        key, entry = found
        queue = key.decode("ascii", "replace").partition(redis.Channel.sep)[0]
        if queue not in QUEUES:
            return found
        try:
            return key, entry_of(hinted(entry, self._most), queue)
        except NoHint as error:
            self._refusals.add(queue, str(error))
            return None


class HintChannel(redis.Channel):
    """A channel on which hints arrive and nothing else does."""

    def _get_client(self) -> Any:
        most = self.connection.client.transport_options[LARGEST]
        return partial(
            _Client, global_keyprefix=self.global_keyprefix, most=most, refusals=_refusals
        )


class Transport(redis.Transport):
    """Redis, with such channels."""

    Channel = HintChannel


class Consumer(CeleryConsumer):  # type: ignore[misc]
    """Starts again whatever it failed of, and consumes what it was started for."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self._losses: tuple[type[BaseException], ...] = self.connection_errors  # type: ignore[has-type]
        self.connection_errors = (Exception,)
        self._failed, self._pause = float("-inf"), SHORTEST_PAUSE

    def connection_for_read(self, heartbeat: Any = None) -> Any:
        """A connection over which hints arrive; whatever scheme the URL has, it is Redis."""
        connection = self.app.connection_for_read(heartbeat=heartbeat)
        connection.transport_cls = Transport
        return self.ensure_connected(connection)

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Celery is about to try again."""
        super().on_connection_error_before_connected(exc)
        self._rest_after(exc)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Celery is about to connect again."""
        super().on_connection_error_after_connected(exc)
        self._rest_after(exc)

    def _rest_after(self, exc: Exception) -> None:
        if isinstance(exc, self._losses):  # Celery has pauses of its own for these
            return
        now = time.monotonic()
        self._pause = (
            min(LONGEST_PAUSE, 2 * self._pause)
            if now - self._failed < 2 * LONGEST_PAUSE
            else SHORTEST_PAUSE
        )
        self._failed = now
        log.error("consumer failed", reason=first_line(exc), seconds=self._pause)
        time.sleep(self._pause)

    def cancel_task_queue(self, queue: Any) -> None:
        """Go on: without hints mail waits for the next look at the database, and nothing would say
        why."""
        log.warning("consumer not cancelled", queue=str(queue))
