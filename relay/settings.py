"""Settings: RELAY_* environment variables, one class for each role.

A field of a class below is a setting; its variable is RELAY_ and the field's name in capitals.
`RELAY_X_FILE` names a file from which X is read, for secrets. Durations are written `30s 5m 2h 5d`
and become seconds; sizes are written `64K 25M` and become bytes, of 1024 each (pydantic's ByteSize
counts 1000). The database, the spool and the workers' files stand below STATE_DIR by default.

What must stay true: a bad value stops the process before it touches anything, and the error names
the variable, the value and what to write; `load` validates all roles, so every command refuses the
same settings; an unknown RELAY_ name is reported (`unknown_names`); no password is printed
(`relay.redaction`).
"""

import difflib
import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from relay.listeners import Listener, parse_listen, parse_listener
from relay.plugin_entries import PluginEntry, parse_plugins
from relay.rate_limits import RateLimit, parse_rate_limit

type Network = IPv4Network | IPv6Network

PREFIX = "RELAY_"
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?")
_SECONDS = {"ms": 0.001, None: 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d+)\s*([KMG]?)i?B?", re.IGNORECASE)
_FACTOR = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?"
_NAME = rf"{_LABEL}(?:\.{_LABEL})*"
_LITERAL = r"\[(?:[0-9.]+|(?i:IPv6:)[0-9A-Fa-f:.]+)\]"
# At most 255 octets (RFC 5321, 4.5.3.1.2). The underscore is not in that grammar, but in names of
# containers.
_HOST = re.compile(rf"(?!.{{256}})(?:{_NAME}|{_LITERAL})")
_DOMAIN = re.compile(rf"(?!.{{256}})(?:\.?{_NAME}|{_LITERAL})")


class SettingsError(ValueError):
    """Settings that cannot be used; the text has a line for each variable, which it names."""


def seconds(text: str) -> float:
    """`30s 5m 2h 5d` (or a bare number of seconds) as seconds; raises ValueError."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise ValueError("is not a duration: write 30s, 5m, 2h or 5d")
    return float(match[1]) * _SECONDS[match[2]]


def size(text: str) -> int:
    """`64K 25M 1G` (or a bare number) as bytes; raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError("is not a size: write 64K, 25M or a number of bytes")
    return int(match[1]) * _FACTOR[match[2].upper()]


def parse_network(text: str) -> Network:
    """A network or an address of CLIENT_NETWORKS; raises ValueError.

    Host bits are refused, as Postfix does in mynetworks: 10.0.0.1/8 may mean one address or 16
    million.
    """
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise ValueError(
            f"{text!r} is not a network: write 192.0.2.0/24, 2001:db8::/32, one address, or"
            " connected"
        ) from None
    address = text.partition("/")[0]
    if ip_address(address) != network.network_address:
        raise ValueError(
            f"{text!r} is an address within a network: write {network}, or {address} for that"
            " address alone"
        )
    return network


def from_text(parse: Callable[[str], object]) -> BeforeValidator:
    """Parses a text; other values are valid as they are."""
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


def _checked(valid: Callable[[str], object], complaint: str = "") -> AfterValidator:
    """Keeps a text that is valid: `valid` returns something true and raises no ValueError.

    `{!r}` in the complaint is the text, which is not shown otherwise.
    """

    def check(text: str) -> str:
        if not valid(text):
            raise ValueError(complaint.format(text))
        return text

    return AfterValidator(check)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from None
    return True


def _is_proxy_network(text: str) -> bool:
    """`connected` would trust the header of every client that comes through a published port."""
    if text == "connected":
        raise ValueError("'connected' names no proxy: write its address, or its network")
    if not parse_network(text).prefixlen:
        raise ValueError(
            f"{text!r}: every peer could claim any address: write those of the proxies"
        )
    return True


def _is_broker(text: str) -> bool:
    try:
        url = urlsplit(text)
        host = url.scheme in ("redis", "rediss") and url.hostname and url.port != 0
    except ValueError:
        return False
    return bool(url.path if url.scheme == "redis+socket" else host)


def _word_list(text: str) -> tuple[str, ...]:
    """The parts between commas, blanks and line ends."""
    return tuple(re.findall(r"[^,\s]+", text))


def _pattern_list(text: str) -> tuple[str, ...]:
    """The parts between semicolons."""
    return tuple(filter(None, map(str.strip, text.split(";"))))


def _unless_off(text: str) -> float | None:
    return None if text.strip().lower() in {"", "off", "no", "0"} else seconds(text)


def _different(listeners: tuple[Listener, ...]) -> tuple[Listener, ...]:
    """Refuses an address or a socket that is named twice, whatever the options."""
    places = [replace(each, tls=False, auth=False, proxy=False) for each in listeners]
    for place in places:
        if place.port + len(place.socket_name) and places.count(place) > 1:
            raise ValueError(f"{place} is named twice")
    return listeners


def _qmqp_listener(text: str) -> Listener:
    return parse_listener(text, ("proxy",))


def _one_each(limits: tuple[RateLimit, ...]) -> tuple[RateLimit, ...]:
    """Refuses two limits of the same."""
    kinds = [(limit.subject, limit.what) for limit in limits]
    for limit, kind in zip(limits, kinds, strict=True):
        if kinds.count(kind) > 1:
            raise ValueError(f"{limit} is not the only limit of its kind")
    return limits


_WORDS = from_text(_word_list)
Duration = Annotated[float, from_text(seconds), Field(gt=0)]
Span = Annotated[float, from_text(seconds), Field(ge=0)]
Size = Annotated[int, from_text(size), Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Texts = Annotated[tuple[str, ...], _WORDS]
Listens = Annotated[tuple[Annotated[tuple[str, int], from_text(parse_listen)], ...], _WORDS]
Listeners = Annotated[
    tuple[Annotated[Listener, from_text(parse_listener)], ...],
    _WORDS,
    AfterValidator(_different),
]
QmqpListeners = Annotated[
    tuple[Annotated[Listener, from_text(_qmqp_listener)], ...],
    from_text(lambda text: () if text.strip().lower() == "off" else _word_list(text)),
    AfterValidator(_different),
]
ListensOrOff = Annotated[
    Listens, from_text(lambda text: () if text.strip().lower() == "off" else text)
]
Networks = Annotated[
    tuple[Annotated[str, _checked(lambda word: word == "connected" or parse_network(word))], ...],
    _WORDS,
]
RateLimits = Annotated[
    tuple[Annotated[RateLimit, from_text(parse_rate_limit)], ...],
    from_text(lambda text: () if text.strip().lower() == "off" else _word_list(text)),
    AfterValidator(_one_each),
]
ProxyNetworkTexts = Annotated[tuple[Annotated[str, _checked(_is_proxy_network)], ...], _WORDS]
Domains = Annotated[
    tuple[
        Annotated[
            str,
            _checked(
                _DOMAIN.fullmatch,
                "{!r} is not a domain: write example.org, or .example.org for every domain below"
                " it, with a comma or a blank between two",
            ),
        ],
        ...,
    ],
    _WORDS,
]
Patterns = Annotated[tuple[Annotated[str, _checked(_is_pattern)], ...], from_text(_pattern_list)]
# The name in the banner, in Received fields and after `postmaster@` (RFC 5321, 4.2 and 4.4).
Hostname = Annotated[
    str,
    _checked(
        _HOST.fullmatch,
        "is not a host name: write relay.example.org (letters, digits, - and _ between dots)",
    ),
]
# The error does not show the URL, because it may contain a password.
Broker = Annotated[
    str,
    _checked(
        _is_broker,
        "is not a broker URL: write redis://:password@host:6379/0, rediss://... or"
        " redis+socket:///path; in a password / # ? @ : % are spelt %2F %23 %3F %40 %3A %25",
    ),
]
WebAddress = Annotated[
    str,
    _checked(
        lambda text: not text or re.fullmatch(r"https?://[!-~]+", text),
        "{!r} is not the address of the page: write https://relay.example.org/",
    ),
]
# A token of RFC 9110 (5.6.2), with the characters that proxies pass.
HeaderName = Annotated[
    str,
    _checked(
        re.compile(r"[A-Za-z0-9-]{0,64}").fullmatch,
        "{!r} is not the name of a header: write X-Remote-User",
    ),
]
PluginEntries = Annotated[
    tuple[PluginEntry, ...],
    from_text(lambda text: parse_plugins(text, seconds)),
]
AbsolutePath = Annotated[Path, AfterValidator(Path.absolute)]


class Settings(BaseModel):
    """The settings of every role. They are read from the environment, unless they are given."""

    model_config = ConfigDict(extra="ignore", frozen=True, validate_default=True)

    state_dir: AbsolutePath = Path("var")
    database_url: str = Field(
        default_factory=lambda data: f"sqlite:///{data['state_dir']}/relay.db"
    )
    broker_url: Broker = Field(
        default_factory=lambda data: f"redis+socket://{data['state_dir']}/broker.sock"
    )
    spool_dir: AbsolutePath = Field(default_factory=lambda data: data["state_dir"] / "spool")
    qmqp_servers: Texts = ()
    routes: Path | None = None
    webhooks: Path | None = None
    hostname: Hostname = Field(default_factory=socket.gethostname)

    batch_size: Count = 64
    grace: Duration = 5.0
    queue_lifetime: Duration = 5 * 86400.0
    retention: Duration = 30 * 86400.0
    bounces: Literal["dsn", "off"] = "dsn"
    delay_warning: Annotated[float | None, from_text(_unless_off)] = None
    unsafe_durability: bool = False
    unauthorized_replies: Patterns = (
        "not authori[sz]ed to use",
        "client (host )?(is )?not (allowed|authori[sz]ed)",
        # mailfront's replies to a client that may not relay, for any recipient
        "not configured to accept that recipient",
        "not allowed to use this mail server",
    )

    plugins: PluginEntries = ()

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "console"] = "auto"
    log_addresses: Literal["full", "redacted"] = "full"
    metrics_listen: ListensOrOff = ()
    web_listen: Listens = (("127.0.0.1", 8025),)
    web_url: WebAddress = ""
    web_session: Duration = 8 * 3600.0
    web_proxy_networks: ProxyNetworkTexts = ()
    web_user_header: HeaderName = ""
    health_file: Path | None = None
    tls_certificate: AbsolutePath | None = None
    tls_key: AbsolutePath | None = None
    tls_minimum: Literal["1.2", "1.3"] = "1.2"

    session_timeout: Duration = 3600.0
    drain_timeout: Duration = 30.0

    @model_validator(mode="before")
    @classmethod
    def _with_environment(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {**_from_files(), **_from_environment(), **values}

    @model_validator(mode="after")
    def _key_has_a_certificate(self) -> Self:
        if self.tls_key and not self.tls_certificate:
            raise ValueError("RELAY_TLS_KEY needs RELAY_TLS_CERTIFICATE, the chain of this key")
        return self

    @model_validator(mode="after")
    def _header_has_a_proxy(self) -> Self:
        if self.web_user_header and not self.web_proxy_networks:
            raise ValueError(
                "RELAY_WEB_USER_HEADER needs RELAY_WEB_PROXY_NETWORKS, the proxies that set it"
            )
        return self


class SmtpdSettings(Settings):
    """The SMTP front end."""

    smtp_listen: Listeners = (Listener("127.0.0.1", 2525),)
    publish: str = ""
    client_networks: Networks = ("127.0.0.0/8", "::1")
    auth_plaintext_networks: Networks = ()
    qmqp_listen: QmqpListeners = ()
    qmqp_publish: str = ""
    qmqp_client_networks: Networks = ("127.0.0.0/8", "::1")
    recipient_domains: Domains = ()
    allow_untrusted_routing: bool = False
    bare_cr: Literal["reject", "strip"] = "reject"
    max_message_size: Size = 25 << 20
    max_recipients: Annotated[int, Field(ge=100)] = 1000
    max_connections: Count = 1000
    max_connections_per_client: Count = 50
    smtp_timeout: Duration = 300.0
    accept_deadline: Duration = 60.0
    journal_limit: Size = 1 << 30
    tls_client_ca: AbsolutePath | None = None
    proxy_networks: ProxyNetworkTexts = ()
    rate_limits: RateLimits = ()

    @model_validator(mode="after")
    def _listeners_have_what_they_need(self) -> Self:
        if self.tls_client_ca and not self.tls_certificate:
            raise ValueError("RELAY_TLS_CLIENT_CA needs RELAY_TLS_CERTIFICATE")
        for name, listener in (
            *(("SMTP", each) for each in self.smtp_listen),
            *(("QMQP", each) for each in self.qmqp_listen),
        ):
            if listener.tls and not self.tls_certificate:
                raise ValueError(
                    f"RELAY_SMTP_LISTEN: {listener} needs a certificate: set RELAY_TLS_CERTIFICATE"
                    " and RELAY_TLS_KEY"
                )
            if listener.auth and not (self.tls_certificate or self.auth_plaintext_networks):
                raise ValueError(
                    f"RELAY_SMTP_LISTEN: no client can log in at {listener}: set"
                    " RELAY_TLS_CERTIFICATE, or RELAY_AUTH_PLAINTEXT_NETWORKS"
                )
            if listener.proxy and not self.proxy_networks:
                raise ValueError(
                    f"RELAY_{name}_LISTEN: {listener} closes every connection: name the proxies in"
                    " RELAY_PROXY_NETWORKS"
                )
        return self


class WorkerSettings(Settings):
    """Delivery."""

    connect_timeout: Duration = 10.0
    io_timeout: Duration = 60.0
    reply_timeout: Duration = 600.0
    block_size: Annotated[int, from_text(size), Field(ge=512, le=16 << 20)] = 64 << 10
    worker_connections: Count = 128
    server_connections: Count = 50
    lease: Duration = 60.0
    retry_min: Duration = 30.0
    retry_max: Duration = 3600.0
    uncertain: Literal["retry", "hold"] = "retry"
    uncertain_delay: Span = 900.0
    poison_limit: Annotated[int, Field(ge=3)] = 5  # the quarantine begins after two crashes
    remote_control: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.retry_max < self.retry_min:
            raise ValueError("RELAY_RETRY_MAX must not be less than RELAY_RETRY_MIN")
        return self


ROLES: tuple[type[Settings], ...] = (Settings, SmtpdSettings, WorkerSettings)


def names() -> set[str]:
    """The variables of all roles."""
    return {PREFIX + field.upper() for role in ROLES for field in role.model_fields}


def _from_environment() -> dict[str, str]:
    """The texts of the variables, by field. An empty variable sets nothing."""
    texts = {name: os.environ.get(name) for name in names()}
    return {name.removeprefix(PREFIX).lower(): text for name, text in texts.items() if text}


def _from_files() -> dict[str, str]:
    """The contents of the files that RELAY_X_FILE variables name, by field; raises SettingsError.
    Like an empty variable, an empty file sets nothing."""
    contents = {}
    for name in names():
        if path := os.environ.get(f"{name}_FILE"):
            try:
                contents[name.removeprefix(PREFIX).lower()] = Path(path).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "it is not text"
                raise SettingsError(f"{name}_FILE: cannot read {path}: {why}") from None
    return {field: text for field, text in contents.items() if text}


def load[Role: Settings](role: type[Role], **overrides: Any) -> Role:
    """Read the settings of a role from the environment; raises SettingsError, a line for each bad
    variable.

    The settings of the other roles, the file of routes and that of webhooks are validated too:
    settings that one process refuses must not pass in another, or half of a relay would run.
    """
    from relay.routes import Routes  # which imports this module

    lines: dict[str, None] = {}  # roles share variables, and a variable has one line
    loaded: dict[type[Settings], Settings] = {}
    for each in ROLES:
        try:
            loaded[each] = each(**overrides)
        except ValidationError as error:
            lines |= dict.fromkeys(map(_line, error.errors()))
    if lines:
        raise SettingsError("\n".join(lines))
    Routes.load(loaded[role])
    if loaded[role].webhooks:
        from relay.events.webhooks import load_webhooks  # which needs more than most commands do

        load_webhooks(loaded[role])
    return cast(Role, loaded[role])


def reason(detail: Mapping[str, Any]) -> str:
    """The text of one of pydantic's errors."""
    return str(detail["msg"]).removeprefix("Value error, ")


def _line(detail: Mapping[str, Any]) -> str:
    if not detail["loc"]:
        return reason(detail)
    name = f"{PREFIX}{detail['loc'][0]}".upper()
    value = detail["input"]
    if len(detail["loc"]) > 1:  # one of several values
        value = os.environ.get(name, value)
    secret = "URL" in name or name == "RELAY_PLUGINS"  # whose arguments may be passwords
    return f"{name}{'' if secret else f' = {value!r}'}: {reason(detail)}"


def unauthorized_pattern(settings: Settings) -> re.Pattern[str]:
    """A pattern for replies about this relay and not about the mail; matches nothing if there are
    no patterns.

    A server that does not authorize the relay answers with the same D as for a bad recipient:
    Postfix replies "host[ip] is not authorized to use this service".
    """
    return re.compile("|".join(settings.unauthorized_replies) or r"(?!)", re.IGNORECASE)


def unknown_names(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The unknown RELAY_ variables, each with the most similar setting, or ''."""
    known = names() | {f"{name}_FILE" for name in names()}
    return {
        name: "".join(difflib.get_close_matches(name, known, 1))
        for name in sorted(environ.keys() - known)
        if name.startswith(PREFIX) and not name.startswith("RELAY_TEST")
    }
