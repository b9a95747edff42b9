"""A login: what a user whose password was right may send, for all sessions of that user.

What must stay true: a login that was revoked sends nothing more, in whatever session it is; the
null sender is allowed to every user, because bounces and receipts have it and it names no sender.
"""

import re
import time
from collections import deque
from dataclasses import dataclass, field

from reception.envelope import Refused
from reception.rates import RateExceeded
from relay.users import User

MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Credentials:
    """A name and a password that a client sent by a SASL mechanism."""

    mechanism: str
    name: str
    password: str = field(repr=False)


class EventWindow:
    """Counts events; `limit` of them may happen in any `seconds`."""

    def __init__(self, limit: int, seconds: float = MINUTE) -> None:
        self._seconds = seconds
        self._times = deque[float](maxlen=limit)

    def is_full(self, now: float) -> bool:
        """Whether one more would be too many (`now` is monotonic)."""
        times = self._times
        return len(times) == times.maxlen and now - times[0] < self._seconds

    def add(self, now: float) -> None:
        """Count one."""
        self._times.append(now)

    def is_over(self, now: float) -> bool:
        """Whether none of its events counts any more."""
        return not self._times or now - self._times[-1] >= self._seconds


class Login:
    """A user who has logged in. `seen`: it was active since this was last cleared."""

    __slots__ = ("__weakref__", "_limit", "_patterns", "_user", "_window", "revoked", "seen")

    def __init__(self, user: User) -> None:
        self.revoked = False
        self.seen = True
        self._limit: int | None = None
        self._window: EventWindow | None = None
        self.update(user)

    @property
    def name(self) -> str:
        """The name of the user."""
        return self._user.name

    @property
    def password_hash(self) -> str:
        """The hash of the password that was right."""
        return self._user.password_hash

    def update(self, user: User) -> None:
        """Take the senders and the limit from the row of today. A new limit counts from now."""
        self._user = user
        if user.messages_per_minute != self._limit:
            self._limit = user.messages_per_minute
            self._window = EventWindow(self._limit) if self._limit else None
        self._patterns = tuple(map(_compiled, user.senders))

    def begin_message(self, sender: str) -> None:
        """A message begins ('' is the null sender), and is counted if it is allowed. Raises
        Refused."""
        if self.revoked:
            raise Refused("421 4.7.0 This user may not send any more, closing connection")
        if sender and not self.allows(sender):
            raise Refused("553 5.7.1 This user may not send with that sender")
        if self._window is not None:
            now = time.monotonic()
            if self._window.is_full(now):
                raise RateExceeded("user", "messages", self.name)
            self._window.add(now)
        self.seen = True

    def allows(self, sender: str) -> bool:
        """Whether a pattern of the user matches this address."""
        local, _, domain = sender.rpartition("@")
        return any(of.fullmatch(local) and at.fullmatch(domain) for of, at in self._patterns)


def _compiled(pattern: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """The patterns of local part and domain. `*` is any text, and case does not count. They stand
    apart, so that a `*` before the @ ends there: a local part may contain an @."""
    local, at, domain = pattern.rpartition("@")
    return _globbed(local if at else "*"), _globbed(domain)


def _globbed(text: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, text.split("*"))), re.IGNORECASE)
