"""Queue ids: UUIDv7, made here because Python before 3.14 and PostgreSQL before 18 cannot.

In Python, file names, logs, replies and hints an id is 32 lower-case hex digits; only the database
has dashes in it. Ids sort by time, so new rows go to the end of every index.
"""

import secrets
import time


def new_id() -> str:
    """A UUIDv7 (RFC 9562 5.7) as 32 hex digits: 48 bits of milliseconds, then random bits."""
    random = secrets.randbits(74)
    stamp = time.time_ns() // 1_000_000
    value = stamp << 80 | 0x7 << 76 | (random >> 62) << 64 | 0b10 << 62 | random & (1 << 62) - 1
    return f"{value:032x}"


def made_at(queue_id: str) -> float:
    """When an id was made, in seconds since 1970, by the clock of its maker."""
    return int(queue_id[:12], 16) / 1000


def lock_key(queue_id: str) -> int:
    """The key of an advisory lock for an id (PostgreSQL's bigint): its 62 random bits."""
    return int.from_bytes(bytes.fromhex(queue_id[16:]), signed=True)


def dashed(queue_id: str) -> str:
    """An id in the database's form."""
    return "-".join((queue_id[:8], queue_id[8:12], queue_id[12:16], queue_id[16:20], queue_id[20:]))
