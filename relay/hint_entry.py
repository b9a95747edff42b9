"""The entry of a hint in the broker's list: a Celery message with ids by route.

Celery documents the message ("Message Protocol", version 2). kombu's Redis transport keeps it as
one JSON object. `entry_of` writes it in a tenth of a millisecond, and publishers need no Celery,
which would take 8 MiB of smtpd.

Anybody who reaches the broker can put anything into its lists. kombu decodes an entry with
`json.loads`, whose errors end the process; an entry may also name a compression, a time, callbacks.
So only the ids of a hint are taken from an entry, and Celery gets a new entry with them.
"""

import base64
import itertools
import json
import re
from typing import NamedTuple
from uuid import uuid4

TASK = "deliver"
EARLY_COMMIT = 0.02
"""Seconds from the sync of a message in which its rows must be committed; else its early hint may
have come in vain, and a second one follows."""
EARLY_SEARCH = 0.03
"""Seconds from an early hint for which workers claim its messages. It is longer than EARLY_COMMIT,
and begins later; so the last claim sees the rows, or a second hint follows."""
# Bytes of an entry: in all but its ids, and for each id (43 in JSON and base64).
_FIXED_BYTES = 8192
_BYTES_PER_ID = 64
_ID = re.compile(r"[0-9a-f]{32}")


class NoHint(ValueError):
    """An entry of the broker's list is not a hint; the text says why."""


class Hint(NamedTuple):
    """Ids by route of messages that may be claimed. `early`: their rows may not be there yet."""

    ids: dict[str, list[str]]
    early: bool = False


def hinted(entry: bytes, most: int) -> Hint:
    """The hint of an entry, with at most so many ids. Raises NoHint; decompresses nothing."""
    if len(entry) > _FIXED_BYTES + _BYTES_PER_ID * most:
        raise NoHint(f"{len(entry)} bytes")
    try:
        message = json.loads(entry)
        headers, properties = message["headers"], message["properties"]
        if headers["task"] != TASK or headers.get("compression"):
            raise NoHint("another task, or compressed")
        if message["content-type"] != "application/json" or properties["body_encoding"] != "base64":
            raise NoHint("another content type")
        (ids,), options, _ = json.loads(base64.b64decode(message["body"], validate=True))
        early = options.get("early") is True
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
    return Hint(ids, early)


def entry_of(hint: Hint, queue: str) -> bytes:
    """A new entry for this hint, as Celery writes it."""
    task_id = str(uuid4())
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
        "delivery_tag": str(uuid4()),
        "priority": 0,
        "body_encoding": "base64",
        "delivery_info": {"exchange": "", "routing_key": queue},
    }
    options = {"early": True} if hint.early else {}
    message = {
        "body": base64.b64encode(json.dumps([[hint.ids], options, {}]).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": properties,
    }
    return json.dumps(message).encode()
