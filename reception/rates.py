"""Rates: messages, recipients and connections a minute of a client, a sender or a user.

Each limit has a bucket for each key: it holds as many tokens as the limit has for a minute, and
fills evenly. A bucket is one number, the time when it will be full again, so a full bucket needs no
entry. Every smtpd process counts for itself.

What must stay true: memory is bounded, whatever senders a client makes up. A table keeps MAX_KEYS
buckets, and beyond that forgets the one that was not used for the longest time; the key of a sender
has a fixed length.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

from reception.envelope import Refused
from relay.rate_limits import RateLimit

MINUTE = 60.0
MAX_KEYS = 16_384  # buckets of one limit: about 2.5 MB
_WHOSE = {"client": "from your address", "sender": "from this sender", "user": "by this user"}


class RateExceeded(Refused):
    """A limit is reached: that of `subject`, whose `name` this is, for `what`."""

    def __init__(self, subject: str, what: str, name: str) -> None:
        super().__init__(f"451 4.7.1 Too many {what} a minute {_WHOSE[subject]}, try again later")
        self.subject, self.what, self.name = subject, what, name


class RateTable:
    """The buckets of one limit."""

    def __init__(self, limit: RateLimit, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._interval = MINUTE / limit.number  # seconds in which a token comes back
        self._full_at: OrderedDict[str | bytes, float] = OrderedDict()  # by time of use

    def __len__(self) -> int:
        return len(self._full_at)

    def has_token(self, key: str | bytes) -> bool:
        """Whether the bucket of this key has a token."""
        now = self._clock()
        full_at = max(self._full_at.get(key, now), now)
        # Half an interval is more than the rounding of a minute's additions.
        return full_at - now + self._interval < MINUTE + self._interval / 2

    def take(self, key: str | bytes) -> None:
        """Takes a token."""
        now = self._clock()
        buckets = self._full_at
        buckets[key] = max(buckets.get(key, now), now) + self._interval
        buckets.move_to_end(key)
        for _ in range(2):
            oldest = next(iter(buckets))
            if buckets[oldest] > now and len(buckets) <= MAX_KEYS:
                break
            del buckets[oldest]


class Rates:
    """The tables of all limits."""

    def __init__(
        self, limits: Iterable[RateLimit], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tables: dict[str, list[RateTable]] = {}
        for limit in limits:
            self._tables.setdefault(limit.what, []).append(RateTable(limit, clock))

    def take(self, what: str, subjects: Mapping[str, str | None]) -> None:
        """Counts one of `what` for these subjects, or raises RateExceeded and counts nothing. The
        null sender and a client without a user have no limits of senders and users."""
        pairs = [
            (table, _key(table.limit.subject, name), name)
            for table in self._tables.get(what, ())
            if (name := subjects.get(table.limit.subject))
        ]
        for table, key, name in pairs:
            if not table.has_token(key):
                raise RateExceeded(table.limit.subject, what, name)
        for table, key, _name in pairs:
            table.take(key)


def _key(subject: str, text: str) -> str | bytes:
    if subject != "sender":
        return text
    return hashlib.blake2b(text.lower().encode("utf-8", "replace"), digest_size=16).digest()
