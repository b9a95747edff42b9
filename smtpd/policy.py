"""Who may relay what to whom.

Closed by default: a client inside CLIENT_NETWORKS may send to anyone, everybody else only to RECIPIENT_DOMAINS (none
unless set) and to postmaster, whom a mail server must always take mail for (RFC 5321, 4.5.1). The refusal comes at
RCPT, before any content. A client that only reads the banner and quits is somebody's health check: nothing here or in
the session counts it as abuse.

The word `connected` in CLIENT_NETWORKS means the subnets of this machine's own interfaces, as they are at start. In a
container whose port is published to the world every client seems to come from such a subnet (the gateway's address),
so `connected` is refused unless RELAY_PUBLISH, which tells where the port is published, is loopback.
"""

import os
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path

from relay.settings import Network, SmtpdSettings, parse_network
from smtpd.addresses import Recipient, Refused

ROOM_KEPT_FREE = 4 * 1024 * 1024
"""Octets that must stay free on the spool's file system beside a message."""

_RELAY_DENIED = b"554 5.7.1 Relay access denied\r\n"
_TOO_MANY_RECIPIENTS = b"452 4.5.3 Too many recipients\r\n"
_TOO_BIG = b"552 5.3.4 Message exceeds the size limit\r\n"
_NO_ROOM = b"452 4.3.1 Insufficient system storage\r\n"


class PolicyError(ValueError):
    """A setting that the policy cannot be made of; the text names it."""


class Policy:
    """The rules for every client; `client` gives those for one. Raises PolicyError for settings it must not obey."""

    def __init__(self, settings: SmtpdSettings) -> None:
        self.max_message_size = settings.max_message_size
        self.max_recipients = settings.max_recipients
        self.room = Room(settings.spool_dir)
        self._networks = client_networks(settings.client_networks, settings.publish)
        domains = [domain.lower() for domain in settings.recipient_domains]
        self._domains = frozenset(domain for domain in domains if not domain.startswith("."))
        self._parents = tuple(domain for domain in domains if domain.startswith("."))
        self._postmaster = f"postmaster@{settings.hostname}".lower()
        self.client = lru_cache(maxsize=4096)(self._client)

    def _client(self, peer: str) -> "Client":
        """The rules for a client by its IP address in text."""
        address = plain_address(peer)
        trusted = any(address in network for network in self._networks if network.version == address.version)
        return Client(self, str(address), trusted)

    def receives_for(self, recipient: Recipient) -> bool:
        """Whether anyone may send to this recipient. `.example.org` in RECIPIENT_DOMAINS means what is below it."""
        domain = recipient.domain.lower()
        listed = domain in self._domains or domain.endswith(self._parents)
        return listed or recipient.address.lower() == self._postmaster


@dataclass(frozen=True, slots=True)
class Client:
    """What one client may do; fits session.Rules."""

    policy: Policy
    address: str
    trusted: bool

    def check_sender(self, size: int) -> None:
        """`size`: what SIZE declared (RFC 1870), octets; 0 if it was not said. Raises Refused."""
        if size > self.policy.max_message_size:
            raise Refused(_TOO_BIG)
        if not self.policy.room.holds(size):
            raise Refused(_NO_ROOM)

    def check_recipient(self, recipient: Recipient, accepted: int) -> None:
        """`accepted`: how many recipients the transaction has. Raises Refused."""
        if not self.trusted and not self.policy.receives_for(recipient):
            raise Refused(_RELAY_DENIED)
        if accepted >= self.policy.max_recipients:
            raise Refused(_TOO_MANY_RECIPIENTS)


class Room:
    """The room on a directory's file system, looked up at most once a second."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known_until = 0.0
        self._free = 0

    def holds(self, size: int) -> bool:
        """Whether `size` octets and a file fit. Yes if nobody can say: storing will tell why not."""
        now = time.monotonic()
        if now >= self._known_until:
            self._known_until = now + 1.0
            try:
                found = os.statvfs(self._directory)
            except OSError:
                self._free = 1 << 62
            else:
                no_files = found.f_files > 0 and found.f_favail == 0
                self._free = 0 if no_files else found.f_bavail * found.f_frsize
        return self._free >= size + ROOM_KEPT_FREE


def client_networks(words: Iterable[str], publish: str) -> tuple[Network, ...]:
    """Reads CLIENT_NETWORKS: networks, addresses, `connected`. Raises PolicyError."""
    networks: list[Network] = []
    for word in words:
        if word == "connected":
            if publish and not _is_loopback(publish):
                raise PolicyError(
                    f"RELAY_CLIENT_NETWORKS: `connected` would make an open relay of the port published on {publish} "
                    "(RELAY_PUBLISH), where every client looks like the gateway; name the networks that may relay"
                )
            networks.extend(connected_networks())
        else:
            networks.append(parse_network(word))
    return tuple(networks)


def plain_address(text: str) -> IPv4Address | IPv6Address:
    """A peer's address without a zone; an IPv4 one that came over an IPv6 socket as IPv4."""
    address = ip_address(text.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _is_loopback(publish: str) -> bool:
    """Reads a published port as compose writes it: `127.0.0.1:2525`, `[::1]:2525`, `2525` (which is every address)."""
    host = publish.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def connected_networks() -> tuple[Network, ...]:
    """The subnets of this machine's interfaces, as the kernel tells them (rtnetlink(7)). Raises PolicyError."""
    if not hasattr(socket, "AF_NETLINK"):
        raise PolicyError("RELAY_CLIENT_NETWORKS: `connected` is known on Linux only; name the networks")
    get_address, dump_request, done, error_message, address_attribute = 22, 0x301, 3, 2, 1
    networks: set[Network] = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.send(struct.pack("=IHHIIB3x", 20, get_address, dump_request, 1, 0, socket.AF_UNSPEC))
        while True:
            answer = kernel.recv(65536)
            while len(answer) >= 16:
                length, kind = struct.unpack_from("=IH", answer)
                if kind in (done, error_message):
                    return tuple(sorted(networks, key=str))
                family, prefix = struct.unpack_from("=BB", answer, 16)
                attributes = answer[24:length]
                while len(attributes) >= 4:
                    size, attribute = struct.unpack_from("=HH", attributes)
                    if attribute == address_attribute and family in (socket.AF_INET, socket.AF_INET6):
                        networks.add(ip_network((attributes[4:size], prefix), strict=False))
                    attributes = attributes[(size + 3) & ~3 :]
                answer = answer[(length + 3) & ~3 :]
