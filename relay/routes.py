"""Routes: which servers a recipient's mail goes to. What, not how healthy: that the worker knows.

A delivery gets the name of its route when it is accepted; the servers behind the name are looked up
at each attempt, so that a change of the settings reaches mail that is queued already. QMQP_SERVERS
are the servers of the route `default`, which takes what no other route asks for. ROUTES names a
TOML file with the others:

    [bulk]                                    # the name that is stored
    recipients = ["lists.example.org", "*@*.example.net", "news@example.com"]
    servers = ["10.0.0.5", "[::1]:628", "unix:/run/qmqpd"]
    connections = 20                          # of this route to each of its servers, from each worker
    retry_min = "10s"
    retry_max = "30m"
    max_size = "10M"
    bisect = "off"

The first route whose pattern matches has the recipient. The file is read again when it changes; one
that cannot be used is refused in the log, and what was read before stays.

Half a TOML file is often a whole one, with fewer routes. So a change is taken only when the file
has looked the same for SETTLED, by our own clock (its times may be another machine's), and still
does when it has been read.
"""

import fnmatch
import math
import re
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relay.log import get_logger
from relay.settings import Settings, SettingsError, seconds, size

log = get_logger(__name__)
DEFAULT_PORT = 628  # IANA's, /etc/services
DEFAULT = "default"
NO_SERVER = "no QMQP server configured (RELAY_QMQP_SERVERS)"
_LOOK_EVERY = 1.0
SETTLED = 1.0
_HOST = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_.])?"
_SERVER = re.compile(
    rf"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<host>{_HOST}))(?::(?P<port>\d+))?"
)


@dataclass(frozen=True, slots=True)
class Server:
    """One QMQP server; `name` is how logs and tables show it. Either host and port or the path of a
    Unix socket."""

    name: str
    host: str | None
    port: int
    path: str | None = None


def parse_server(text: str) -> Server:
    """`host`, `host:port`, `[v6]:port` or `unix:/path`; raises ValueError that names what is
    wrong."""
    if text.startswith("unix:"):
        if not text[5:].startswith("/"):
            raise ValueError(f"bad QMQP server {text!r}: unix: needs an absolute path")
        return Server(text, None, 0, text[5:])
    found = _SERVER.fullmatch(text)
    if not found:
        raise ValueError(
            f"bad QMQP server {text!r}: write host, host:port, [v6]:port or unix:/path"
        )
    port = int(found["port"] or DEFAULT_PORT)
    if not 0 < port < 65536:
        raise ValueError(f"bad port in QMQP server {text!r}: 1 to 65535")
    host = found["v6"] or found["host"]
    return Server(f"[{host}]:{port}" if found["v6"] else f"{host}:{port}", host, port)


@dataclass(frozen=True, slots=True)
class Route:
    """Servers in the order of preference, and what is special about sending to them (None: as the
    settings say)."""

    name: str
    servers: tuple[Server, ...]
    recipients: tuple[str, ...] = ()
    connections: int | None = None
    retry_min: float | None = None
    retry_max: float | None = None
    max_size: int | None = None
    bisect: bool = True

    def takes(self, address: str) -> bool:
        """Whether one of its patterns is this address, its domain, or a shell pattern of either."""
        address = address.lower()
        domain = address.rpartition("@")[2]
        return any(
            fnmatch.fnmatchcase(address if "@" in p else domain, p.lower()) for p in self.recipients
        )


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a duration: write 30s, 5m, 2h or 5d")
    found = float(str(seconds(value)))
    if not 0 < found < math.inf:
        raise ValueError(f"{value!r} is not a duration above 0")
    return found


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is not a size: write 64K, 25M or a number of bytes")
    found = int(str(size(value)))
    if found < 1:
        raise ValueError(f"{value!r} is not a size above 0")
    return found


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is not a whole number above 0")
    return value


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError("must be a list of texts")
    return tuple(value)


def _bisect(value: object) -> bool:
    if value not in ("off", "address"):
        raise ValueError(f"{value!r} is neither off nor address")
    return value == "address"


_KEYS: dict[str, Callable[[object], Any]] = {
    "servers": lambda value: tuple(dict.fromkeys(parse_server(text) for text in _texts(value))),
    "recipients": _texts,
    "connections": _count,
    "retry_min": _seconds,
    "retry_max": _seconds,
    "max_size": _size,
    "bisect": _bisect,
}


def parse_routes(text: str) -> list[Route]:
    """The routes of a TOML file, in its order; raises ValueError that names route and key."""
    found = []
    for name, table in tomllib.loads(text).items():
        if not isinstance(table, dict):
            raise ValueError(f"{name}: a route is a table: [{name}]")
        made: dict[str, Any] = {}
        for key, value in table.items():
            if key not in _KEYS:
                raise ValueError(f"[{name}] {key}: no such key; there are {', '.join(_KEYS)}")
            try:
                made[key] = _KEYS[key](value)
            except ValueError as error:
                raise ValueError(f"[{name}] {key}: {error}") from None
        if name != DEFAULT and not made.get("recipients"):
            raise ValueError(
                f"[{name}] recipients: at least one pattern is needed, or nothing comes this way"
            )
        if name != DEFAULT and not made.get("servers"):
            raise ValueError(f"[{name}] servers: at least one is needed")
        if made.get("retry_min", 0) > made.get("retry_max", float("inf")):
            raise ValueError(f"[{name}] retry_max: must not be less than retry_min")
        found.append(Route(name, **({"servers": ()} | made)))
    return found


type Stamp = tuple[int, int, int]


def _stamp(path: Path | None) -> Stamp | None:
    """What tells one state of a file from another; None for one that is not there."""
    try:
        found = path.stat() if path else None
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size) if found else None


class Routes:
    """Every route there is; any thread."""

    def __init__(
        self,
        routes: list[Route],
        path: Path | None = None,
        default: Route | None = None,
        *,
        read: Stamp | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._default, self._clock = path, default or Route(DEFAULT, ()), clock
        self._read = read  # how the file looked before it was read
        self._seen, self._since = read, clock()  # how it looks, and since when
        self._looked = clock()
        self._use(routes)

    @classmethod
    def load(cls, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> "Routes":
        """The routes of the settings; raises SettingsError for what cannot be read."""
        try:
            servers = tuple(dict.fromkeys(parse_server(text) for text in settings.qmqp_servers))
        except ValueError as error:
            raise SettingsError(f"RELAY_QMQP_SERVERS: {error}") from None
        read = _stamp(settings.routes)
        try:
            routes = parse_routes(settings.routes.read_text()) if settings.routes else []
        except (ValueError, OSError) as error:
            remedy = "write that file, or leave RELAY_ROUTES empty"
            why = f"{error.strerror}; {remedy}" if isinstance(error, OSError) else error
            raise SettingsError(f"RELAY_ROUTES: {settings.routes}: {why}") from None
        return cls(routes, settings.routes, Route(DEFAULT, servers), read=read, clock=clock)

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
        """All routes, in the order in which they are asked; the last one takes the rest."""
        return tuple(self._now().values())

    def servers(self) -> dict[str, tuple[str, ...]]:
        """The names of the servers of each route."""
        return {
            name: tuple(server.name for server in route.servers)
            for name, route in self._now().items()
        }

    def max_size(self) -> int | None:
        """The least that a route takes, in bytes; None if none says."""
        return min(
            (route.max_size for route in self._now().values() if route.max_size), default=None
        )

    def _use(self, routes: list[Route]) -> None:
        named = {route.name: route for route in routes}
        default = named.pop(DEFAULT, self._default)
        if not default.servers:
            default = replace(default, servers=self._default.servers, recipients=())
        self._routes = named | {DEFAULT: default}

    def _now(self) -> dict[str, Route]:
        """The routes, read again if the file has changed and settled; looked at once a second at
        most."""
        now = self._clock()
        if self._path is not None and now - self._looked >= _LOOK_EVERY:
            self._looked = now
            stamp = _stamp(self._path)
            if stamp != self._seen:
                self._seen, self._since = stamp, now
            if stamp is not None and stamp != self._read and now - self._since >= SETTLED:
                self._read_again(self._path, stamp)
        return self._routes

    def _read_again(self, path: Path, stamp: Stamp) -> None:
        try:
            routes = parse_routes(path.read_text())
        except (ValueError, OSError) as error:
            log.error("routes not changed", file=str(path), reason=str(error))
        else:
            if _stamp(path) != stamp:
                return  # somebody has begun to write it
            self._use(routes)
            log.info("routes read", routes=list(self._routes))
        self._read = stamp
