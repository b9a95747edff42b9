"""Who may relay what to whom.

Closed by default: a client inside CLIENT_NETWORKS may send to anyone, everybody else only to
RECIPIENT_DOMAINS (none unless set) and to postmaster, whom a mail server must always take mail for
(RFC 5321, 4.5.1). The refusal comes at RCPT, before any content. A domain in RECIPIENT_DOMAINS
opens that domain and no other: a local part that the next server could read as another address is
refused to everybody outside CLIENT_NETWORKS.

A client that only reads the banner and quits is somebody's health check: nothing here or in the
session counts it as abuse.

The word `connected` in CLIENT_NETWORKS means the subnets of this machine's own interfaces, as they
are at start. In a container whose port is published to the world every client seems to come from
such a subnet (the gateway's address), so `connected` is refused unless RELAY_PUBLISH, which tells
where the port is published, is loopback.
"""

import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path

from relay.settings import Network, SmtpdSettings, parse_network
from smtpd.addresses import CommandRefused, Recipient

ROOM_KEPT_FREE = 4 * 1024 * 1024
"""Octets that must stay free on the spool's file system beside a message."""
SHARE = 4
"""One part in so many of the room is the most that unfinished messages of one client that is not
trusted may take; as much is kept for the clients that are. Else a few strangers that begin messages
and never end them take it all."""
NETWORK_BITS = 64
"""What one client has of IPv6 addresses at least (RFC 6177): it is counted as one, whichever of
them it uses."""

_ROUTING = frozenset("@%!")

_RELAY_DENIED = b"554 5.7.1 Relay access denied\r\n"
_ROUTED = b"550 5.7.1 A local part with @, % or ! is not accepted from your address\r\n"
_TOO_MANY_RECIPIENTS = b"452 4.5.3 Too many recipients\r\n"
_TOO_BIG = b"552 5.3.4 Message exceeds the size limit\r\n"
_NO_ROOM = b"452 4.3.1 Insufficient system storage\r\n"


class PolicyError(ValueError):
    """A setting that the policy cannot be made of; the text names it."""


class Policy:
    """The rules for every client; `client` gives those for one. Raises PolicyError for settings it
    must not obey."""

    def __init__(self, settings: SmtpdSettings) -> None:
        self.max_message_size = settings.max_message_size
        self.max_recipients = settings.max_recipients
        self.room = FreeSpace(settings.spool_dir)
        self._networks = client_networks(settings.client_networks, settings.publish)
        domains = [domain.lower() for domain in settings.recipient_domains]
        self._domains = frozenset(domain for domain in domains if not domain.startswith("."))
        self._parents = tuple(domain for domain in domains if domain.startswith("."))
        self.strip_bare_cr = settings.bare_cr == "strip"
        self.allow_untrusted_routing = settings.allow_untrusted_routing
        self._postmaster = f"postmaster@{settings.hostname}".lower()
        self.client = lru_cache(maxsize=4096)(self._client)

    def _client(self, peer: str) -> "ClientPolicy":
        """The rules for a client by its IP address in text."""
        address = plain_address(peer)
        trusted = any(
            address in network for network in self._networks if network.version == address.version
        )
        return ClientPolicy(self, str(address), trusted, network_of(address))

    def receives_for(self, recipient: Recipient) -> bool:
        """Whether anyone may send to this recipient. `.example.org` in RECIPIENT_DOMAINS means what
        is below it."""
        domain = recipient.domain.lower()
        listed = domain in self._domains or domain.endswith(self._parents)
        return listed or recipient.address.lower() == self._postmaster


@dataclass(frozen=True, slots=True)
class ClientPolicy:
    """What one client may do; fits session.Rules."""

    policy: Policy
    address: str
    trusted: bool
    network: str  # what it is counted by

    @property
    def strips_cr(self) -> bool:
        """Only for clients of our own: what a stranger sends is to be taken as it is or not at
        all."""
        return self.trusted and self.policy.strip_bare_cr

    def check_sender(self, size: int) -> None:
        """`size`: what SIZE declared (RFC 1870), octets; 0 if it was not said. Raises Refused."""
        if size > self.policy.max_message_size:
            raise CommandRefused(_TOO_BIG)
        if not self.policy.room.holds(size, self._stranger):
            raise CommandRefused(_NO_ROOM)

    def claim(self, size: int) -> "SpaceClaim":
        """The claim of a message that begins; `size` as in `check_sender`."""
        return self.policy.room.claim(size, self._stranger)

    @property
    def _stranger(self) -> str:
        return "" if self.trusted else self.network

    def check_recipient(self, recipient: Recipient, accepted: int) -> None:
        """`delivered`: how many recipients the transaction has. Raises Refused."""
        if not self.trusted and not self.policy.receives_for(recipient):
            raise CommandRefused(_RELAY_DENIED)
        # `victim%evil.test@allowed.test` is mail to evil.test for a server that knows the percent
        # hack, and `!` and a quoted @ are other spellings of it. Postfix refuses them to strangers
        # (`allow_untrusted_routing = no`), but its qmqpd trusts its clients and sends such mail
        # outward. So the decision is made here. Address literals need no rule of their own, because
        # they are a domain like any other. Source routes were dropped (RFC 5321, app. C).
        if not (self.trusted or self.policy.allow_untrusted_routing) and not _ROUTING.isdisjoint(
            recipient.local
        ):
            raise CommandRefused(_ROUTED)
        if accepted >= self.policy.max_recipients:
            raise CommandRefused(_TOO_MANY_RECIPIENTS)


class FreeSpace:
    """The room on a directory's file system, looked up at most once a second, and what unfinished
    messages take of it.

    Of what was free at the last look everything is taken that is claimed and was not in a file by
    then. What was finished since stays taken until the next look; what was thrown away is free at
    once, unless it was in a file by then. A `stranger` is the network of a client that is not
    trusted, or empty.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known_until = 0.0
        self._free = 0
        self._room = 0  # that there would be without unfinished messages
        self._taken = 0  # of the free room
        self._claimed = self._stored = (
            0  # octets of unfinished messages, and those of them that are in files
        )
        self.looks = 0
        self._strangers: Counter[str] = Counter()  # of that
        self._strange = 0  # their sum

    def holds(self, size: int, stranger: str = "") -> bool:
        """Whether `size` octets and a file fit. Yes if nobody can say: storing will tell why
        not."""
        now = time.monotonic()
        if now >= self._known_until:
            self._known_until = now + 1.0
            self._look()
        if self._free - self._taken < size + ROOM_KEPT_FREE:
            return False
        part = self._room // SHARE
        return not stranger or (
            self._strangers[stranger] + size <= part and self._strange + size <= self._room - part
        )

    def claim(self, size: int, stranger: str) -> "SpaceClaim":
        """Begin a message. What was declared is claimed at once, if that can be had; what comes in
        any case."""
        claim = SpaceClaim(self, stranger)
        if size and self.holds(size, stranger):
            self.take(size, stranger)
            claim.octets = size
        return claim

    def take(self, size: int, stranger: str) -> None:
        """Count more octets that are claimed (negative: fewer)."""
        self._claimed += size
        self._taken += size
        if stranger:
            self._strange += size
            self._strangers[stranger] += size
            if not self._strangers[stranger]:
                del self._strangers[stranger]

    def store(self, size: int, taken: int = 0) -> None:
        """Count more octets in files of unfinished messages (negative: fewer), and more of the free
        room."""
        self._stored += size
        self._taken += taken

    def _look(self) -> None:
        self.looks += 1
        try:
            found = os.statvfs(self._directory)
        except OSError:
            self._free = 1 << 62
        else:
            no_files = found.f_files > 0 and found.f_favail == 0
            self._free = 0 if no_files else found.f_bavail * found.f_frsize
        self._taken = self._claimed - self._stored
        self._room = max(0, self._free + self._stored - ROOM_KEPT_FREE)


@dataclass(slots=True)
class SpaceClaim:
    """What one unfinished message takes of the room: what its client declared, or what has come, if
    that is more."""

    room: FreeSpace
    stranger: str
    octets: int = 0
    came: int = 0
    stored: int = 0
    seen: int = 0  # of that, at the room's last look
    looks: int = 0

    def grow(self, size: int) -> bool:
        """More octets have come; False if there is no room for them."""
        self.came += size
        more = self.came - self.octets
        if more > 0:
            if not self.room.holds(more, self.stranger):
                return False
            self.room.take(more, self.stranger)
            self.octets += more
        return True

    def store(self, size: int) -> None:
        """More octets were written to a file."""
        self._see()
        self.stored += size
        self.room.store(size)

    def end(self, *, kept: bool = False) -> None:
        """The message is finished and `kept`, or gone; a second time changes nothing."""
        self._see()
        self.room.take(-self.octets, self.stranger)
        self.room.store(-self.stored, self.came if kept else self.seen)
        self.octets = self.stored = self.came = self.seen = 0

    def _see(self) -> None:
        if self.looks != self.room.looks:
            self.seen, self.looks = self.stored, self.room.looks


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


def network_of(address: IPv4Address | IPv6Address) -> str:
    """What a client is counted by: its IPv4 address, or the network that its IPv6 address is
    from."""
    if isinstance(address, IPv4Address):
        return str(address)
    return str(ip_network((address, NETWORK_BITS), strict=False))


def _is_loopback(publish: str) -> bool:
    """Reads a published port as compose writes it: `127.0.0.1:2525`, `[::1]:2525`, `2525` (which is
    every address)."""
    host = publish.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def connected_networks() -> tuple[Network, ...]:
    """The subnets of this machine's interfaces, as the kernel tells them (rtnetlink(7)). Raises
    PolicyError."""
    if not hasattr(socket, "AF_NETLINK"):
        raise PolicyError(
            "RELAY_CLIENT_NETWORKS: `connected` is known on Linux only; name the networks"
        )
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
                    if attribute == address_attribute and family in (
                        socket.AF_INET,
                        socket.AF_INET6,
                    ):
                        networks.add(ip_network((attributes[4:size], prefix), strict=False))
                    attributes = attributes[(size + 3) & ~3 :]
                answer = answer[(length + 3) & ~3 :]
