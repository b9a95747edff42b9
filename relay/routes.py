"""Routes: which servers a recipient's mail goes to.

A delivery gets the name of its route when it is accepted; the servers of the route are looked up at
each attempt, so a change of the settings reaches queued mail. QMQP_SERVERS are the servers of the
route `default`, which takes what no other route takes. ROUTES names a TOML file with the other
routes (`Route` has the keys; docs/delivery.md has an example). The first route whose pattern
matches takes the recipient.

What must stay true: a file that cannot be used changes nothing. Half a TOML file is often valid, so
a change counts when the file has stayed the same for STABLE_FOR, by this process' clock.
"""

import fnmatch
import re
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from relay.log import get_logger
from relay.settings import Settings, SettingsError, from_text, reason, seconds, size

log = get_logger(__name__)
DEFAULT_PORT = 628  # IANA's, /etc/services
DEFAULT = "default"
NO_SERVER = "no QMQP server configured (RELAY_QMQP_SERVERS)"
POLL_INTERVAL = 1.0
STABLE_FOR = 1.0
_HOST = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_.])?"
_SERVER = re.compile(
    rf"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<host>{_HOST}))(?::(?P<port>\d+))?"
)


@dataclass(frozen=True, slots=True)
class Server:
    """One QMQP server: host and port, or the path of a Unix socket. Logs and tables show `name`."""

    name: str
    host: str | None
    port: int
    path: str | None = None


def parse_server(text: str) -> Server:
    """`host`, `host:port`, `[v6]:port` or `unix:/path`; raises ValueError with the reason."""
    if text.startswith("unix:"):
        if not text[5:].startswith("/"):
            raise ValueError(f"bad QMQP server {text!r}: unix: needs an absolute path")
        return Server(text, None, 0, text[5:])
    match = _SERVER.fullmatch(text)
    if not match:
        raise ValueError(
            f"bad QMQP server {text!r}: write host, host:port, [v6]:port or unix:/path"
        )
    port = int(match["port"] or DEFAULT_PORT)
    if not 0 < port < 65536:
        raise ValueError(f"bad port in QMQP server {text!r}: 1 to 65535")
    host = match["v6"] or match["host"]
    return Server(f"[{host}]:{port}" if match["v6"] else f"{host}:{port}", host, port)


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ValueError("must be a list of texts")
    return tuple(value)


def _servers(value: object) -> tuple[Server, ...]:
    return tuple(dict.fromkeys(map(parse_server, _texts(value))))


def _bisect(value: object) -> object:
    if value not in ("off", "address"):
        raise ValueError("must be off or address")
    return value == "address"


_Count = Annotated[int, Field(gt=0, strict=True)]
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
_Duration = Annotated[_Seconds | None, from_text(seconds)]


@dataclass(frozen=True, slots=True)
class Route:
    """Servers in the order of preference, and how mail is sent to them (None: as the settings say).

    All fields but `name` are keys of the file. `recipients`: addresses, domains, and shell patterns
    of both; `connections`: to each server from each worker.
    """

    name: str
    servers: Annotated[tuple[Server, ...], BeforeValidator(_servers)] = ()
    recipients: Annotated[tuple[str, ...], BeforeValidator(_texts)] = ()
    connections: _Count | None = None
    retry_min: _Duration = None
    retry_max: _Duration = None
    max_size: Annotated[_Count | None, from_text(size)] = None
    bisect: Annotated[bool, BeforeValidator(_bisect)] = True

    def takes(self, address: str) -> bool:
        """Whether a pattern matches this address or its domain."""
        address = address.lower()
        domain = address.rpartition("@")[2]
        return any(
            fnmatch.fnmatchcase(address if "@" in p else domain, p.lower()) for p in self.recipients
        )


_ROUTE = TypeAdapter(Route)
_KEYS = tuple(Route.__dataclass_fields__)[1:]


def parse_routes(text: str) -> list[Route]:
    """The routes of a TOML file, in its order; raises ValueError that names route and key."""
    routes = []
    for name, table in tomllib.loads(text).items():
        if not isinstance(table, dict):
            raise ValueError(f"{name}: a route is a table: [{name}]")
        for key in table.keys() - set(_KEYS):
            raise ValueError(f"[{name}] {key}: no such key; there are {', '.join(_KEYS)}")
        try:
            route = _ROUTE.validate_python({**table, "name": name})
        except ValidationError as error:
            detail = error.errors()[0]
            key = detail["loc"][0]
            raise ValueError(f"[{name}] {key} = {table[key]!r}: {reason(detail)}") from None
        if name != DEFAULT and not route.recipients:
            raise ValueError(f"[{name}] recipients: write at least one pattern")
        if name != DEFAULT and not route.servers:
            raise ValueError(f"[{name}] servers: write at least one")
        if route.retry_min and route.retry_max and route.retry_min > route.retry_max:
            raise ValueError(f"[{name}] retry_max: must not be less than retry_min")
        routes.append(route)
    return routes


type Stamp = tuple[int, int, int]


def _stamp(path: Path | None) -> Stamp | None:
    """Inode, time and size of a file, which tell a change; None if there is no file."""
    try:
        status = path.stat() if path else None
    except OSError:
        return None
    return (status.st_ino, status.st_mtime_ns, status.st_size) if status else None


class Routes:
    """All routes; any thread."""

    def __init__(
        self,
        routes: list[Route],
        path: Path | None = None,
        default: Route | None = None,
        *,
        read: Stamp | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._default = default or Route(DEFAULT)
        self._clock = clock
        self._read = read  # the stamp of the file before it was read
        self._seen = read  # the stamp at the last poll, and since when it is the same
        self._since = self._polled = clock()
        self._use(routes)

    @classmethod
    def load(cls, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> "Routes":
        """The routes of the settings; raises SettingsError if they cannot be read."""
        try:
            default = _ROUTE.validate_python({"name": DEFAULT, "servers": settings.qmqp_servers})
        except ValidationError as error:
            raise SettingsError(f"RELAY_QMQP_SERVERS: {reason(error.errors()[0])}") from None
        read = _stamp(settings.routes)
        try:
            routes = parse_routes(settings.routes.read_text()) if settings.routes else []
        except OSError as error:
            raise SettingsError(
                f"RELAY_ROUTES: {settings.routes}: {error.strerror};"
                " write that file, or leave RELAY_ROUTES empty"
            ) from None
        except ValueError as error:
            raise SettingsError(f"RELAY_ROUTES: {settings.routes}: {error}") from None
        return cls(routes, settings.routes, default, read=read, clock=clock)

    def route_for(self, address: str) -> str:
        """The name of a recipient's route."""
        return next((route.name for route in self._now().values() if route.takes(address)), DEFAULT)

    def get(self, name: str) -> Route | None:
        """The route of that name now."""
        return self._now().get(name)

    def names(self) -> tuple[str, ...]:
        """The names of all routes."""
        return tuple(self._now())

    def all(self) -> tuple[Route, ...]:
        """All routes in the order in which they are tried; the last one takes the rest."""
        return tuple(self._now().values())

    def servers(self) -> dict[str, tuple[str, ...]]:
        """The names of the servers of each route."""
        return {
            name: tuple(server.name for server in route.servers)
            for name, route in self._now().items()
        }

    def max_size(self) -> int | None:
        """The smallest limit of a route, in bytes; None if there is no limit."""
        limits = [route.max_size for route in self._now().values() if route.max_size]
        return min(limits, default=None)

    def _use(self, routes: list[Route]) -> None:
        named = {route.name: route for route in routes}
        default = named.pop(DEFAULT, self._default)
        if not default.servers:
            default = replace(default, servers=self._default.servers, recipients=())
        self._routes = named | {DEFAULT: default}

    def _now(self) -> dict[str, Route]:
        """The routes, read again if the file has changed; checked every POLL_INTERVAL."""
        now = self._clock()
        if self._path is not None and now - self._polled >= POLL_INTERVAL:
            self._polled = now
            stamp = _stamp(self._path)
            if stamp != self._seen:
                self._seen = stamp
                self._since = now
            if stamp is not None and stamp != self._read and now - self._since >= STABLE_FOR:
                self._read_again(self._path, stamp)
        return self._routes

    def _read_again(self, path: Path, stamp: Stamp) -> None:
        try:
            routes = parse_routes(path.read_text())
        except (ValueError, OSError) as error:
            log.error("routes file rejected", file=str(path), reason=str(error))
        else:
            if _stamp(path) != stamp:
                return  # it is being written
            self._use(routes)
            log.info("routes read", routes=list(self._routes))
        self._read = stamp
