"""Authentication: whether a password is that of a user, answered on the loop.

A verification reads the row of the user and computes argon2id in a thread, two at once; others wait
in a bounded queue. A success is remembered for REMEMBERED under a keyed hash of name and password,
so that a client that connects for each message does not cost that much each time. Every REFRESH the
rows of the users that are logged in are read again: a user that was disabled or removed, or has
another password, loses its login, also in open sessions.

What must stay true: without the database those who are remembered still log in, and others hear
454 and never 535; a user that does not exist costs a verification too; an address that has failed
too often learns nothing more, not even that a password is right.
"""

import asyncio
import hmac
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol
from weakref import WeakValueDictionary

from sqlalchemy import Engine

from reception.login import Credentials, EventWindow, Login
from reception.receiver import DiskThreads
from relay import metrics
from relay.db import engine as database
from relay.log import escaped, first_line, get_logger
from relay.users import Role, User, Users

REMEMBERED = 300.0
"""Seconds for which a success is remembered, and longer while the database is away."""
REFRESH = 10.0
"""Seconds between two reads of the users that are logged in."""
FAILURE_DELAY = 5.0
"""Seconds from the credentials to the reply that they are wrong."""
FAILURES_PER_MINUTE = 10
"""Of a client; then 421."""
VERIFICATIONS = 2  # at once
MAX_WAITING = 64
"""Attempts that wait for a verification. They take some two seconds together."""
TIMEOUT = 10.0
"""Seconds for the database and a verification; then it counts as away."""
MAX_REMEMBERED = 10_000
MAX_CLIENTS = 10_000  # whose failures are counted
CLOSE_TIMEOUT = 2.0

INVALID = "535 5.7.8 Authentication credentials invalid"
_UNAVAILABLE = "454 4.7.0 Temporary authentication failure"
_TOO_MANY = "421 4.7.0 Too many failed authentications from your address, try again later"

type _Verdict = tuple[User | None, str]
"""The user, if it may log in, else None and the reason."""

log = get_logger(__name__)


class AttemptSource(Protocol):
    """The client of an attempt: its address, and the network by which its failures are counted."""

    @property
    def address(self) -> str:
        """Its IP address."""

    @property
    def network(self) -> str:
        """The key of its failures."""


@dataclass(slots=True, eq=False)
class LoginAttempt:
    """Credentials that wait for their answer: a login, or the reply that refuses them."""

    credentials: Credentials
    client: AttemptSource
    key: bytes
    began: float  # monotonic
    answer: Callable[[Login | str], None] | None
    timer: asyncio.TimerHandle | None = None


@dataclass(frozen=True, slots=True)
class RememberedLogin:
    """A success, and until when it counts (monotonic)."""

    login: Login
    until: float


class Authenticator:
    """Authenticates users in one of these roles. All methods are called on the loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        database_url: str,
        roles: Collection[Role] = (Role.SENDER,),
        *,
        refresh: float = REFRESH,
        failure_delay: float = FAILURE_DELAY,
        timeout: float = TIMEOUT,
    ) -> None:
        self._loop = loop
        self._url = database_url
        self._roles = roles
        self._refresh_interval, self._delay, self._timeout = refresh, failure_delay, timeout
        self._secret = secrets.token_bytes(32)
        self.remembered = OrderedDict[bytes, RememberedLogin]()
        self._logins = WeakValueDictionary[str, Login]()  # those that a session or a memory has
        self.failing = OrderedDict[str, EventWindow]()  # by the network of the client
        self._waiting = deque[LoginAttempt]()
        self._running = 0
        self._refresh_timer: asyncio.TimerHandle | None = None
        self._reported = False  # that users cannot be read

    @cached_property
    def _engine(self) -> Engine:
        return database.connect(self._url, pool=VERIFICATIONS + 1, timeout=self._timeout / 2)

    @cached_property
    def _users(self) -> Users:
        return Users(self._engine)

    @cached_property
    def _threads(self) -> DiskThreads:
        # One more than verifications, so that a refresh never waits for argon2.
        return DiskThreads(VERIFICATIONS + 1, "users")

    def authenticate(
        self, credentials: Credentials, client: AttemptSource, answer: Callable[[Login | str], None]
    ) -> None:
        """Calls `answer` once, now or later, with a login or the reply that refuses it."""
        now = time.monotonic()
        attempt = LoginAttempt(credentials, client, self._key(credentials), now, answer)
        if self._is_limited(client, now):
            self._refuse_limited(attempt)
        elif (known := self._recall(attempt.key)) is not None and now < known.until:
            self._succeed(attempt, known.login)
        elif len(self._waiting) >= MAX_WAITING:
            self._fall_back(attempt, "too many authentications at once")
        else:
            attempt.timer = self._loop.call_later(
                self._timeout, self._fall_back, attempt, "the users cannot be read in time"
            )
            self._waiting.append(attempt)
            self._verify_next()

    async def close(self) -> None:
        """Records who was seen, if the database answers at once, and ends the threads."""
        if self._refresh_timer is not None:
            self._refresh_timer.cancel()
            noted = self._threads.run(partial(_read, self._users, [], self._take_seen()))
            await asyncio.wait([noted], timeout=CLOSE_TIMEOUT)
            if noted.done():
                noted.exception()  # the database is away: nothing can be recorded
        if "_threads" in vars(self):
            await self._loop.run_in_executor(None, self._threads.close, CLOSE_TIMEOUT)
            self._engine.dispose()

    def _key(self, credentials: Credentials) -> bytes:
        name, password = credentials.name.lower().encode(), credentials.password.encode()
        return hmac.digest(self._secret, b"%d:%b%b" % (len(name), name, password), "sha256")

    def _recall(self, key: bytes) -> RememberedLogin | None:
        known = self.remembered.get(key)
        return None if known is None or known.login.revoked else known

    # Verifications

    def _verify_next(self) -> None:
        """Starts verifications. The limit is asked again, because attempts that came together may
        have failed meanwhile."""
        while self._waiting and self._running < VERIFICATIONS:
            attempt = self._waiting.popleft()
            if attempt.answer is None:
                continue
            if self._is_limited(attempt.client, time.monotonic()):
                self._refuse_limited(attempt)
            elif (known := self._recall(attempt.key)) and known.until > time.monotonic():
                self._succeed(attempt, known.login)  # others of its sessions waited before it
            else:
                self._running += 1
                call = partial(self._verify, self._users, attempt.credentials)
                verdict = self._threads.run(call)
                verdict.add_done_callback(partial(self._verified, attempt))

    def _verify(self, users: Users, credentials: Credentials) -> _Verdict:
        """Reads the row and computes the hash; it runs in a thread."""
        from relay import passwords  # what an smtpd without users never needs

        name = credentials.name.lower()
        user = users.find([name]).get(name)
        hash_ = passwords.UNKNOWN if user is None else user.password_hash
        is_right = passwords.verify(hash_, credentials.password)
        metrics.PASSWORD_VERIFICATIONS.inc()
        if user is None:
            return None, "unknown user"
        if not is_right:
            return None, "wrong password"
        return self._permitted(user)

    def _permitted(self, user: User) -> _Verdict:
        if user.disabled_at is not None:
            return None, "disabled user"
        return (user, "") if user.role in self._roles else (None, f"role {user.role}")

    def _verified(
        self, attempt: LoginAttempt, verdict: asyncio.Future[tuple[User | None, str]]
    ) -> None:
        self._running -= 1
        error = verdict.exception()
        if error is not None:
            if not database.is_outage(error):
                log.error("authentication failed by a defect", exc_info=error)
            self._fall_back(attempt, first_line(getattr(error, "orig", error)))
        else:
            user, reason = verdict.result()
            if user is None:
                self._fail(attempt, reason)
            else:
                self._remember(attempt, user)
        self._verify_next()

    def _remember(self, attempt: LoginAttempt, user: User) -> None:
        login = self._logins.get(user.name)
        if login is None or login.password_hash != user.password_hash:
            if login is not None:
                login.revoked = True  # its password was changed
            login = self._logins[user.name] = Login(user)
        login.update(user)
        self.remembered[attempt.key] = RememberedLogin(login, time.monotonic() + REMEMBERED)
        self.remembered.move_to_end(attempt.key)
        if len(self.remembered) > MAX_REMEMBERED:
            self.remembered.popitem(last=False)
        self._succeed(attempt, login)

    # Answers

    def _answer(self, attempt: LoginAttempt, result: Login | str) -> None:
        if attempt.timer is not None:
            attempt.timer.cancel()
        answer, attempt.answer = attempt.answer, None
        if answer is not None:
            answer(result)

    def _succeed(self, attempt: LoginAttempt, login: Login) -> None:
        if attempt.answer is None:  # its time has passed
            return
        login.seen = True
        metrics.AUTHENTICATIONS.labels("accepted").inc()
        log.debug("authenticated", **_facts(attempt))
        if self._refresh_timer is None:
            self._refresh_timer = self._loop.call_later(self._refresh_interval, self._refresh)
        self._answer(attempt, login)

    def _fail(self, attempt: LoginAttempt, reason: str) -> None:
        """The credentials are wrong. Each failure counts, also if the client did not wait."""
        if attempt.answer is None:  # it counted when its time had passed
            return
        now = time.monotonic()
        self._count_failure(attempt.client, now)
        metrics.AUTHENTICATIONS.labels("failed").inc()
        log.warning("authentication failed", reason=reason, **_facts(attempt))
        if attempt.timer is not None:
            attempt.timer.cancel()
        left = max(0.0, attempt.began + self._delay - now)
        self._loop.call_later(left, self._answer, attempt, INVALID)

    def _fall_back(self, attempt: LoginAttempt, reason: str) -> None:
        """The users cannot be read: memory alone decides. It counts as a failure, or a client could
        try passwords against the memory."""
        if attempt.answer is None:
            return
        known = self._recall(attempt.key)
        if known is not None:
            self._succeed(attempt, known.login)
            return
        self._count_failure(attempt.client, time.monotonic())
        metrics.AUTHENTICATIONS.labels("unavailable").inc()
        log.warning("authentication unavailable", reason=reason, **_facts(attempt))
        self._answer(attempt, _UNAVAILABLE)

    def _refuse_limited(self, attempt: LoginAttempt) -> None:
        metrics.AUTHENTICATIONS.labels("limited").inc()
        log.warning("authentication limited", **_facts(attempt))
        self._answer(attempt, _TOO_MANY)

    # Failures of a client

    def _is_limited(self, client: AttemptSource, now: float) -> bool:
        window = self.failing.get(client.network)
        return window is not None and window.is_full(now)

    def _count_failure(self, client: AttemptSource, now: float) -> None:
        failures = self.failing
        window = failures.setdefault(client.network, EventWindow(FAILURES_PER_MINUTE))
        failures.move_to_end(client.network)
        window.add(now)
        while next(iter(failures.values())).is_over(now) or len(failures) > MAX_CLIENTS:
            failures.popitem(last=False)

    # Users that are logged in

    def _take_seen(self) -> list[str]:
        """The names of those who were active since the last call."""
        seen = [login for login in self._logins.values() if login.seen]
        for login in seen:
            login.seen = False
        return [login.name for login in seen]

    def _refresh(self) -> None:
        self._refresh_timer = None
        logins = dict(self._logins)
        if logins:
            seen = self._take_seen()
            rows = self._threads.run(partial(_read, self._users, list(logins), seen))
            rows.add_done_callback(partial(self._refreshed, logins, seen))

    def _refreshed(
        self, logins: dict[str, Login], seen: list[str], rows: asyncio.Future[dict[str, User]]
    ) -> None:
        error = rows.exception()
        if error is None:
            self._reported = False
            for name, login in logins.items():
                self._compare(login, rows.result().get(name))
            self._forget()
        else:
            for name in seen:
                logins[name].seen = True
            if not self._reported:
                self._reported = True
                log.warning("users not read", reason=first_line(getattr(error, "orig", error)))
        if self._refresh_timer is None:
            self._refresh_timer = self._loop.call_later(self._refresh_interval, self._refresh)

    def _compare(self, login: Login, user: User | None) -> None:
        """Updates a login by its row of now, or revokes it."""
        if self._logins.get(login.name) is not login:  # a newer login has another password
            return
        same = user is not None and user.password_hash == login.password_hash
        if user is not None and same and self._permitted(user)[0] is not None:
            login.update(user)
            return
        login.revoked = True
        del self._logins[login.name]
        log.info("login revoked", user=login.name)

    def _forget(self) -> None:
        """Drops what is remembered no longer. The database answers, so it is not needed."""
        now = time.monotonic()
        for key, known in tuple(self.remembered.items()):
            if known.until < now or known.login.revoked:
                del self.remembered[key]


def _read(users: Users, names: list[str], seen: list[str]) -> dict[str, User]:
    """Records who was seen; the users of these names. It runs in a thread."""
    if seen:
        users.note_seen(seen)
    return users.find(names) if names else {}


def _facts(attempt: LoginAttempt) -> dict[str, str]:
    return {
        "client": attempt.client.address,
        "user": escaped(attempt.credentials.name, 128),
        "mechanism": attempt.credentials.mechanism,
    }
