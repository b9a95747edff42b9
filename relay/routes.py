"""Routes: which servers a recipient's mail goes to. What, not how healthy: that the worker knows.

A message gets the name of its route when it is accepted; the servers behind the name are looked up at each attempt, so
that a change of the settings reaches mail that is queued already. QMQP_SERVERS is the route `default`.
"""

import re
from dataclasses import dataclass

from relay.settings import Settings

DEFAULT_PORT = 628  # IANA's, /etc/services
DEFAULT = "default"
NO_SERVER = "no QMQP server configured (RELAY_QMQP_SERVERS)"
_HOST = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_.])?"
_SERVER = re.compile(rf"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<host>{_HOST}))(?::(?P<port>\d+))?")


@dataclass(frozen=True, slots=True)
class Server:
    """One QMQP server; `name` is how logs and tables show it. Either host and port or the path of a Unix socket."""

    name: str
    host: str | None
    port: int
    path: str | None = None


def parse_server(text: str) -> Server:
    """`host`, `host:port`, `[v6]:port` or `unix:/path`; raises ValueError that names what is wrong."""
    if text.startswith("unix:"):
        if not text[5:].startswith("/"):
            raise ValueError(f"bad QMQP server {text!r}: unix: needs an absolute path")
        return Server(text, None, 0, text[5:])
    found = _SERVER.fullmatch(text)
    if not found:
        raise ValueError(f"bad QMQP server {text!r}: write host, host:port, [v6]:port or unix:/path")
    port = int(found["port"] or DEFAULT_PORT)
    if not 0 < port < 65536:
        raise ValueError(f"bad port in QMQP server {text!r}: 1 to 65535")
    host = found["v6"] or found["host"]
    return Server(f"[{host}]:{port}" if found["v6"] else f"{host}:{port}", host, port)


@dataclass(frozen=True, slots=True)
class Route:
    """Servers in the order of preference."""

    name: str
    servers: tuple[Server, ...]


class Routes:
    """Every route there is."""

    def __init__(self, routes: dict[str, Route]) -> None:
        self._routes = routes

    @classmethod
    def load(cls, settings: Settings) -> "Routes":
        """The routes of the settings; raises ValueError for a server that cannot be parsed."""
        servers = tuple(dict.fromkeys(parse_server(text) for text in settings.qmqp_servers))
        return cls({DEFAULT: Route(DEFAULT, servers)})

    def route_for(self, address: str) -> str:
        """The name of a recipient's route."""
        return DEFAULT

    def get(self, name: str) -> Route | None:
        """The route of that name now."""
        return self._routes.get(name)

    def names(self) -> tuple[str, ...]:
        """The names of all routes."""
        return tuple(self._routes)
