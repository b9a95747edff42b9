"""Who may use the page: logins, sessions, the tokens of forms, and the header of a trusted proxy.

While no user has the role viewer or operator and no header is set, every client that can connect
reads the page, and nothing can be changed there. Otherwise a visitor is a user of the relay, who
logs in with a password, or whom a trusted proxy names in a header.

A session is a signed cookie: name, time and a random number, signed with the hash of the password
by a key that this process alone has. So it ends when the password changes, when the user is
disabled or removed, after RELAY_WEB_SESSION, and when the process ends. The row of the user is read
for every request.

What must stay true: the header counts only if the peer is a trusted proxy, and a request of another
peer that has it is refused; a form is accepted only with the token of its session.
"""

import asyncio
import contextlib
import hmac
import secrets
import threading
import time
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv6Address

from sqlalchemy import Engine
from starlette.exceptions import HTTPException
from starlette.requests import Request

from reception.authentication import Authenticator
from reception.login import Credentials, Login
from reception.policy import network_of, plain_address
from relay.log import escaped, get_logger
from relay.settings import Settings, parse_network
from relay.users import PAGE_ROLES, Role, User, Users, user_name

COOKIE = "qmqp_relay_session"
MAX_ENDED = 10_000  # sessions that were logged out and would still be valid

log = get_logger(__name__)


class LoginNeeded(Exception):
    """The page has users, and this request has no valid session."""


@dataclass(frozen=True, slots=True)
class Visitor:
    """The user who makes a request. Without a name the page is open, and read only.

    `token` proves that a form comes from our page. `session` is empty if a proxy names the user.
    """

    name: str = ""
    role: Role | None = None
    token: str = ""
    session: str = ""

    @property
    def acts(self) -> bool:
        """Whether the visitor may change the queue, and read headers of messages."""
        return self.role is Role.OPERATOR


@dataclass(frozen=True, slots=True)
class PageClient:
    """The client of a request, as the authenticator counts it."""

    address: str
    network: str


class Access:
    """The visitors of one process."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._users = Users(engine)
        self._settings = settings
        self._proxies = tuple(map(parse_network, settings.web_proxy_networks))
        self._key = secrets.token_bytes(32)
        self._ended = dict[str, float]()  # until when its cookie would be valid
        self._lock = threading.Lock()
        self._authenticator: Authenticator | None = None

    # Requests

    def visitor(self, request: Request) -> Visitor:
        """The visitor; raises LoginNeeded, and HTTPException for a header that is not valid."""
        if named := self._named_by_proxy(request):
            token = self._sign("proxy", named.name)
            return Visitor(named.name, named.role, token)
        if visitor := self._in_session(request.cookies.get(COOKIE, "")):
            return visitor
        if self._settings.web_user_header or self._users.exist(PAGE_ROLES):
            raise LoginNeeded
        return Visitor()

    def check_token(self, visitor: Visitor, token: str) -> None:
        """Raises HTTPException unless the form comes from a page of this visitor."""
        if not visitor.token or not hmac.compare_digest(visitor.token.encode(), token.encode()):
            text = "This form is not valid any more. Go back, load the page again and repeat it."
            raise HTTPException(403, text)

    def is_secure(self, request: Request) -> bool:
        """Whether the browser speaks TLS, with us or with a trusted proxy."""
        forwarded = request.headers.get("x-forwarded-proto", "").strip().lower()
        return request.url.scheme == "https" or (self._is_proxied(request) and forwarded == "https")

    def takes_passwords(self, request: Request) -> bool:
        """Whether a password may be sent: no other program reads it on its way, or a trusted proxy
        protects it."""
        peer = _peer(request)
        local = peer is not None and peer.is_loopback
        return local or self.is_secure(request) or self._is_proxied(request)

    # Sessions

    async def log_in(self, request: Request, name: str, password: str) -> Login | str:
        """Verify a password; the login, or the reply of SMTP that refuses it."""
        loop = asyncio.get_running_loop()
        if self._authenticator is None:
            self._authenticator = Authenticator(loop, self._settings.database_url, PAGE_ROLES)
        try:
            name = user_name(name)
        except ValueError:
            name = ""  # it costs and counts as much as that of another unknown user
        answer: asyncio.Future[Login | str] = loop.create_future()
        credentials = Credentials("page", name, password)
        self._authenticator.authenticate(credentials, self._client(request), partial(_set, answer))
        return await answer

    def begin_session(self, login: Login) -> str:
        """The cookie of a new session."""
        number, issued = secrets.token_hex(16), int(time.time())
        signature = self._sign("session", login.name, issued, number, login.password_hash)
        return f"{login.name.encode().hex()}.{issued}.{number}.{signature}"

    def end_session(self, visitor: Visitor) -> None:
        """Refuse the cookie of this session from now on."""
        now = time.time()
        with self._lock:
            self._ended = {one: until for one, until in self._ended.items() if until > now}
            if len(self._ended) >= MAX_ENDED:
                self._key = secrets.token_bytes(32)  # it ends all sessions
                self._ended.clear()
            self._ended[visitor.session] = now + self._settings.web_session

    async def close(self) -> None:
        """End the threads of the authenticator."""
        if self._authenticator is not None:
            await self._authenticator.close()

    def _in_session(self, cookie: str) -> Visitor | None:
        try:
            encoded, begun, number, signature = cookie.split(".")
            name, issued = bytes.fromhex(encoded).decode(), int(begun)
        except ValueError:
            return None
        now = time.time()
        if not issued <= now < issued + self._settings.web_session or number in self._ended:
            return None
        user = self._permitted(name)
        if user is None:
            return None
        expected = self._sign("session", name, issued, number, user.password_hash)
        if not hmac.compare_digest(expected.encode(), signature.encode()):
            return None
        return Visitor(name, user.role, self._sign("form", number), number)

    def _permitted(self, name: str) -> User | None:
        """The user of this name, if it may use the page now."""
        try:
            user = self._users.find([user_name(name)]).get(name)
        except ValueError:
            return None
        permitted = user is not None and user.disabled_at is None and user.role in PAGE_ROLES
        return user if permitted else None

    def _sign(self, *parts: object) -> str:
        text = "\0".join(map(str, parts))
        return hmac.digest(self._key, text.encode(), "sha256").hex()

    # Proxies

    def _named_by_proxy(self, request: Request) -> User | None:
        header = self._settings.web_user_header
        names = request.headers.getlist(header) if header else []
        if not names:
            return None
        if not self._is_proxied(request):
            log.warning("page header refused", client=self._client(request).address)
            raise HTTPException(403, "A header of this request is accepted from a proxy only.")
        user = self._permitted(names[0].lower()) if len(names) == 1 else None
        if user is None:
            log.warning("page user refused", user=escaped(", ".join(names), 128))
            text = "The proxy names no user of the relay with the role viewer or operator."
            raise HTTPException(403, text)
        return user

    def _is_proxied(self, request: Request) -> bool:
        peer = _peer(request)
        return peer is not None and any(peer in network for network in self._proxies)

    def _client(self, request: Request) -> PageClient:
        """The client; behind a trusted proxy the one that the proxy names last."""
        address = _peer(request)
        if self._is_proxied(request):
            forwarded = request.headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
            with contextlib.suppress(ValueError):
                address = plain_address(forwarded)
        return PageClient(str(address), network_of(address) if address else "")


def _peer(request: Request) -> IPv4Address | IPv6Address | None:
    """The address of the other end of the connection; None for a socket without one."""
    try:
        return plain_address(request.client.host) if request.client else None
    except ValueError:
        return None


def _set(answer: asyncio.Future[Login | str], result: Login | str) -> None:
    if not answer.done():  # the client may have gone
        answer.set_result(result)
