"""The policy: which client may send to which recipient.

The relay is closed by default. A client inside CLIENT_NETWORKS may send to every recipient, and so
may a user who has logged in, with the senders of that user. Other clients may send to
RECIPIENT_DOMAINS (empty unless set) and to postmaster, for whom every mail server must accept mail
(RFC 5321, 4.5.1). The refusal comes at RCPT, before any content.

What must stay true: a domain in RECIPIENT_DOMAINS opens no other domain, so untrusted clients may
not use a local part that the next server could read as another address. A client that reads the
banner and quits is a health check and never counts as abuse.
"""

import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from reception.envelope import Recipient, Refused
from reception.login import Login
from reception.rates import RateExceeded, Rates
from reception.space import FreeSpace, SpaceClaim
from relay import metrics
from relay.listeners import is_loopback
from relay.settings import Network, SettingsError, SmtpdSettings, parse_network

IPV6_PREFIX = 64
"""Bits of the smallest IPv6 network that one client has (RFC 6177). All of it counts as one."""


class Policy:
    """The rules of one door for all clients; `client` returns those for one, by its IP address as
    text.

    `networks`: those whose clients may relay (None: those of SMTP). `space` is that of the spool,
    `rates` has the tables of RATE_LIMITS: all doors share both (None: there is no other door).
    `on_rate_exceeded` may be set to be told of each refusal by a rate. Raises SettingsError for
    settings that would make an open relay.
    """

    on_rate_exceeded: Callable[[RateExceeded], None] | None = None

    def __init__(
        self,
        settings: SmtpdSettings,
        networks: tuple[Network, ...] | None = None,
        space: FreeSpace | None = None,
        rates: Rates | None = None,
    ) -> None:
        self.settings = settings
        self.space = FreeSpace(settings.spool_dir) if space is None else space
        limited = settings.rate_limits and rates is None
        self.rates = Rates(settings.rate_limits) if limited else rates
        self._networks = smtp_networks(settings) if networks is None else networks
        self._plaintext_networks = client_networks(
            settings.auth_plaintext_networks, settings.publish, "RELAY_AUTH_PLAINTEXT_NETWORKS"
        )
        domains = [domain.lower() for domain in settings.recipient_domains]
        self._domains = frozenset(domain for domain in domains if not domain.startswith("."))
        self._parents = tuple(domain for domain in domains if domain.startswith("."))
        self._postmaster = f"postmaster@{settings.hostname}".lower()
        self.client = lru_cache(maxsize=4096)(self._client)

    def _client(self, peer: str) -> "ClientPolicy":
        address = plain_address(peer)
        trusted = any(address in network for network in self._networks)
        plaintext = any(address in network for network in self._plaintext_networks)
        return ClientPolicy(self, str(address), trusted, network_of(address), plaintext)

    def serves(self, recipient: Recipient) -> bool:
        """Whether every client may send to this recipient. `.example.org` in RECIPIENT_DOMAINS
        means the domains below it."""
        domain = recipient.domain.lower()
        listed = domain in self._domains or domain.endswith(self._parents)
        return listed or recipient.address.lower() == self._postmaster


@dataclass(frozen=True, slots=True)
class ClientPolicy:
    """The rules for one client. `network` is the key that its connections are counted by.

    `plaintext_auth`: it may send a password without TLS. `login`: the user that has logged in.
    """

    policy: Policy
    address: str
    trusted: bool
    network: str
    plaintext_auth: bool = False
    login: Login | None = None

    def as_user(self, login: Login) -> "ClientPolicy":
        """The rules after a login: it may relay, like a client in CLIENT_NETWORKS."""
        return replace(self, trusted=True, login=login)

    @property
    def strips_cr(self) -> bool:
        """Whether bare CRs are dropped from the content. Content of untrusted clients is accepted
        unchanged or refused."""
        return self.trusted and self.policy.settings.bare_cr == "strip"

    @property
    def _claims_as(self) -> str:
        return "" if self.trusted else self.network

    def check_sender(self, sender: str, size: int) -> None:
        """`sender` is '' if it is null, or not known yet; `size` is the octets that SIZE declares
        (RFC 1870), 0 without it. Raises Refused."""
        if self.login is not None:
            try:
                self.login.begin_message(sender)
            except RateExceeded as exceeded:
                self._count(exceeded)
                raise
        if not self.policy.space.has(size, self._claims_as):
            raise Refused("452 4.3.1 Insufficient system storage")

    def check_rate(self, what: str, sender: str = "", user: str | None = None) -> None:
        """Counts a message, a recipient or a connection by RATE_LIMITS. Raises Refused."""
        rates = self.policy.rates
        if rates is not None:
            try:
                rates.take(what, {"client": self.network, "sender": sender, "user": user})
            except RateExceeded as exceeded:
                self._count(exceeded)
                raise

    def _count(self, exceeded: RateExceeded) -> None:
        metrics.RATE_LIMITED.labels(exceeded.subject, exceeded.what).inc()
        if self.policy.on_rate_exceeded is not None:
            self.policy.on_rate_exceeded(exceeded)

    def claim(self, size: int) -> SpaceClaim:
        """The claim of a message that begins; `size` as in `check_sender`. The declared octets are
        claimed at once, if they fit; what arrives is claimed in any case."""
        claim = SpaceClaim(self.policy.space, self._claims_as)
        if size:
            claim.reserve(size)
        return claim

    def check_recipient(self, recipient: Recipient, accepted: int) -> None:
        """`accepted` is the number of recipients of the transaction so far. Raises Refused."""
        if not self.trusted and not self.policy.serves(recipient):
            raise Refused("554 5.7.1 Relay access denied")
        # `victim%evil.test@allowed.test` is mail to evil.test for a server that knows the percent
        # hack; `!` and a quoted @ are other spellings of it. Postfix refuses them from untrusted
        # clients (`allow_untrusted_routing = no`), but its qmqpd trusts its clients and sends such
        # mail out, so the relay must decide. Address literals need no rule, because they are
        # domains. Source routes were dropped (RFC 5321, app. C).
        routing_allowed = self.trusted or self.policy.settings.allow_untrusted_routing
        if not routing_allowed and not set("@%!").isdisjoint(recipient.local):
            raise Refused("550 5.7.1 A local part with @, % or ! is not accepted from your address")
        if accepted >= self.policy.settings.max_recipients:
            raise Refused("452 4.5.3 Too many recipients")


def smtp_networks(settings: SmtpdSettings) -> tuple[Network, ...]:
    """The networks whose clients may relay by SMTP. Raises SettingsError."""
    return client_networks(settings.client_networks, settings.publish)


def qmqp_networks(settings: SmtpdSettings) -> tuple[Network, ...]:
    """The networks whose clients may send by QMQP. Raises SettingsError."""
    names = ("RELAY_QMQP_CLIENT_NETWORKS", "RELAY_QMQP_PUBLISH")
    return client_networks(settings.qmqp_client_networks, settings.qmqp_publish, *names)


def client_networks(
    entries: Iterable[str],
    publish: str,
    setting: str = "RELAY_CLIENT_NETWORKS",
    publish_setting: str = "RELAY_PUBLISH",
) -> tuple[Network, ...]:
    """Parses the networks of clients: networks, addresses, and `connected`, which means the subnets
    of this machine's interfaces at start. The last two parameters name the settings.

    `publish` is the address of the published port of a container. On such a port every client seems
    to come from the gateway, which is in a connected subnet, so `connected` is only allowed if
    `publish` is loopback; else it would make an open relay. Raises SettingsError.
    """
    networks: list[Network] = []
    for entry in entries:
        if entry != "connected":
            networks.append(parse_network(entry))
        elif publish and not _is_loopback(publish):
            raise SettingsError(
                f"{setting}: `connected` would mean every client of the port published on {publish}"
                f" ({publish_setting}), because each of them looks like the gateway; name the"
                " networks"
            )
        else:
            networks += connected_networks()
    return tuple(networks)


def connected_networks() -> tuple[Network, ...]:
    """The subnets of this machine's interfaces."""
    import psutil  # only for a setting that names them

    networks: set[Network] = {
        ip_network(
            (plain_address(entry.ptp or entry.address), int(ip_address(entry.netmask)).bit_count()),
            strict=False,
        )
        for interface in psutil.net_if_addrs().values()
        for entry in interface
        if entry.family in (socket.AF_INET, socket.AF_INET6) and entry.netmask
    }
    return tuple(sorted(networks, key=str))


def plain_address(text: str) -> IPv4Address | IPv6Address:
    """An address without its zone; an IPv4-mapped IPv6 address as IPv4."""
    address = ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def network_of(address: IPv4Address | IPv6Address) -> str:
    """The key that a client is counted by: its IPv4 address, or its IPv6 network."""
    if isinstance(address, IPv4Address):
        return str(address)
    return str(ip_network((address, IPV6_PREFIX), strict=False))


def _is_loopback(publish: str) -> bool:
    """Parses a published port as compose writes it: `127.0.0.1:2525`, `[::1]:2525`, or `2525`,
    which means every address."""
    return is_loopback(publish.rpartition(":")[0].strip("[]"))
