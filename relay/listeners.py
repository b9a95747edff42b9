"""A listener: an address where a front end accepts connections, and what it demands of them.

It is written `host:port/option/option`. With `tls` the TLS handshake comes before everything else,
with `auth` no client sends mail without authentication, with `proxy` each connection begins with a
PROXY header. `systemd:NAME` in the place of the address takes the sockets that systemd passes under
this name.

What must stay true: an option that is not known is an error that names it. A listener that silently
lacked its TLS, or that took every peer for a proxy, would be worse than none.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import ip_address

OPTIONS = ("tls", "auth", "proxy")
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^:\[\]\s/]*)):(\d{1,5})")
_SYSTEMD = re.compile(r"systemd:([^:/\s]{1,255})")


def parse_listen(text: str) -> tuple[str, int]:
    """`host:port`, `[v6]:port` or `:port` (all addresses) as a pair; raises ValueError."""
    match = _ADDRESS.fullmatch(text)
    if not match or int(match[3]) > 65535:
        raise ValueError(
            f"{text!r} is not an address to listen on: write 127.0.0.1:2525 or [::1]:2525"
        )
    return match[1] or match[2], int(match[3])


def format_address(host: str, port: int) -> str:
    """An address as `parse_listen` reads it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; '' means every address."""
    try:
        return host == "localhost" or ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Listener:
    """One element of a list of listeners. With a `socket_name` (of systemd) host and port are
    empty."""

    host: str
    port: int
    tls: bool = False
    auth: bool = False
    proxy: bool = False
    socket_name: str = ""

    def __str__(self) -> str:
        return self.at(self.host, self.port)

    def at(self, host: str, port: int) -> str:
        """This listener as it is written, with the address that it got."""
        name = f"systemd:{self.socket_name}"
        place = name if self.socket_name else format_address(host, port)
        return "/".join((place, *(option for option in OPTIONS if getattr(self, option))))


def parse_listener(text: str, allowed: Collection[str] = OPTIONS) -> Listener:
    """`0.0.0.0:465/tls`, `systemd:submission/tls/auth` and the like; raises ValueError.

    `allowed` are the options that the protocol of the front end has.
    """
    place, *options = text.split("/")
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"{text!r}: {option!r} is no option of this listener: write"
                f" {' or '.join(f'/{name}' for name in allowed)} behind the address"
            )
    if len(set(options)) < len(options):
        raise ValueError(f"{text!r} has an option twice")
    name = _SYSTEMD.fullmatch(place)
    host, port = ("", 0) if name else parse_listen(place)
    tls, auth, proxy = (option in options for option in OPTIONS)
    return Listener(host, port, tls, auth, proxy, name[1] if name else "")
