"""Settings: RELAY_* environment variables, one class for each role.

A field of a class below is a setting; its variable is RELAY_ and the field's name in capitals.
`RELAY_X_FILE` names a file from which X is read, for secrets. Durations are written `30s 5m 2h 5d`
and become seconds; sizes are written `64K 25M` and become bytes, of 1024 each (pydantic's ByteSize
counts 1000). The database, the spool and the workers' files stand below STATE_DIR by default.

What must stay true: a bad value stops the process before it touches anything, and the error names
the variable, the value and what to write; `load` validates all roles, so every command refuses the
same settings; an unknown RELAY_ name is reported (`unknown_names`); no password is printed
(`redacted`).
"""

import difflib
import os
import re
import socket
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

type Network = IPv4Network | IPv6Network

PREFIX = "RELAY_"
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?")
_SECONDS = {"ms": 0.001, None: 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d+)\s*([KMG]?)i?B?", re.IGNORECASE)
_PASSWORD = re.compile(r"(?<=password=)[^&\s]+")
_VALUE = re.compile(r"([?&][^=&?]*=)[^&]*")
_FACTOR = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?"
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_LITERAL = re.compile(r"\[(?:[0-9.]+|(?i:IPv6:)[0-9A-Fa-f:.]+)\]")
_DOMAIN_LIMIT = 255  # octets, RFC 5321 section 4.5.3.1.2


class SettingsError(ValueError):
    """Settings that cannot be used; the text has a line for each variable."""


def seconds(value: object) -> object:
    """`30s 5m 2h 5d` (or a bare number of seconds) as seconds."""
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value.strip())
    if not match:
        raise ValueError("is not a duration: write 30s, 5m, 2h or 5d")
    return float(match[1]) * _SECONDS[match[2]]


def size(value: object) -> object:
    """`64K 25M 1G` (or a bare number) as bytes."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if not match:
        raise ValueError("is not a size: write 64K, 25M or a number of bytes")
    return int(match[1]) * _FACTOR[match[2].upper()]


def _words(value: object) -> object:
    """The parts between commas, blanks and line ends."""
    return tuple(re.findall(r"[^,\s]+", value)) if isinstance(value, str) else value


def parse_listen(text: str) -> tuple[str, int]:
    """`host:port`, `[v6]:port` or `:port` (all addresses) as a pair; raises ValueError."""
    match = re.fullmatch(
        r"(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^:\[\]\s]*)):(?P<port>\d{1,5})", text
    )
    if not match or int(match["port"]) > 65535:
        raise ValueError(
            f"{text!r} is not an address to listen on: write 127.0.0.1:2525 or [::1]:2525"
        )
    return match["v6"] or match["host"], int(match["port"])


def parse_network(text: str) -> Network:
    """A network or an address of CLIENT_NETWORKS; raises ValueError.

    Host bits are refused, as Postfix does in mynetworks: 10.0.0.1/8 may mean one address or 16
    million.
    """
    try:
        return ip_network(text)
    except ValueError:
        pass
    try:
        around = ip_network(text, strict=False)
    except ValueError:
        raise ValueError(
            f"{text!r} is not a network: write 192.0.2.0/24, 2001:db8::/32, one address, or connected"
        ) from None
    address = text.partition("/")[0]
    raise ValueError(
        f"{text!r} is an address within a network: write {around}, or {address} for that address alone"
    )


def _network(word: str) -> str:
    if word != "connected":
        parse_network(word)
    return word


def _hostname(value: str) -> str:
    """The name in the banner, in Received fields and after `postmaster@` (RFC 5321 4.2 and 4.4).

    The underscore is not in that grammar, but in names of containers.
    """
    if not (_DOMAIN.fullmatch(value) or _LITERAL.fullmatch(value)) or len(value) > _DOMAIN_LIMIT:
        raise ValueError(
            "is not a host name: write relay.example.org (letters, digits, - and _ between dots)"
        )
    return value


def _domain(word: str) -> str:
    name = word.removeprefix(".")
    if not (_DOMAIN.fullmatch(name) or _LITERAL.fullmatch(word)) or len(word) > _DOMAIN_LIMIT:
        raise ValueError(
            f"{word!r} is not a domain: write example.org, or .example.org for every domain below it,"
            " with a comma or a blank between two"
        )
    return word


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from None
    return text


def _patterns(value: object) -> object:
    """The texts between semicolons."""
    if not isinstance(value, str):
        return value
    return tuple(text.strip() for text in value.split(";") if text.strip())


Duration = Annotated[float, BeforeValidator(seconds), Field(gt=0)]
Span = Annotated[float, BeforeValidator(seconds), Field(ge=0)]
Size = Annotated[int, BeforeValidator(size), Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)]
Networks = Annotated[
    tuple[Annotated[str, AfterValidator(_network)], ...], NoDecode, BeforeValidator(_words)
]
Domains = Annotated[
    tuple[Annotated[str, AfterValidator(_domain)], ...], NoDecode, BeforeValidator(_words)
]
Patterns = Annotated[
    tuple[Annotated[str, AfterValidator(_pattern)], ...], NoDecode, BeforeValidator(_patterns)
]
_Listen = Annotated[
    tuple[str, int],
    BeforeValidator(lambda value: parse_listen(value) if isinstance(value, str) else value),
]
Listens = Annotated[tuple[_Listen, ...], NoDecode, BeforeValidator(_words)]


def _broker(value: str) -> str:
    """A URL that the broker's client can read. The error does not show it, because it may contain a
    password."""
    try:
        url = urlsplit(value)
        known = (
            url.path
            if url.scheme == "redis+socket"
            else url.scheme in ("redis", "rediss") and url.hostname
        )
        _ = url.port  # raises if it is not a number
    except ValueError:
        known = None
    if not known:
        raise ValueError(
            "is not a broker URL: write redis://:password@host:6379/0, rediss://... or redis+socket:///path;"
            " in a password / # ? @ : % are spelt %2F %23 %3F %40 %3A %25"
        )
    return value


def _switch(value: object) -> object:
    return (
        None
        if isinstance(value, str) and value.strip().lower() in {"", "off", "no", "0"}
        else seconds(value)
    )


class Settings(BaseSettings):
    """The settings of every role."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="ignore", frozen=True, env_ignore_empty=True
    )
    role: ClassVar[str] = "relay"

    state_dir: Path = Path("var")
    database_url: str = ""
    broker_url: Annotated[str, AfterValidator(_broker)] = ""
    spool_dir: Path = Path()
    qmqp_servers: Words = ()
    routes: Path | None = None
    hostname: Annotated[str, AfterValidator(_hostname)] = ""

    batch_size: Count = 64
    grace: Duration = 5.0
    queue_lifetime: Duration = 5 * 86400.0
    retention: Duration = 30 * 86400.0
    bounces: Literal["dsn", "off"] = "dsn"
    delay_warning: Annotated[float | None, BeforeValidator(_switch)] = None
    unsafe_durability: bool = False
    unauthorized_replies: Patterns = (
        "not authori[sz]ed to use",
        "client (host )?(is )?not (allowed|authori[sz]ed)",
        # mailfront's replies to a client that may not relay, for any recipient
        "not configured to accept that recipient",
        "not allowed to use this mail server",
    )

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "console"] = "auto"
    log_addresses: Literal["full", "redacted"] = "full"
    metrics_listen: Listens = ()
    web_listen: Listens = (("127.0.0.1", 8025),)
    health_file: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = {**_from_files(), **values}
        state = Path(values.get("state_dir") or "var").absolute()
        values["state_dir"] = state
        values["database_url"] = values.get("database_url") or f"sqlite:///{state / 'relay.db'}"
        values["broker_url"] = values.get("broker_url") or f"redis+socket://{state / 'broker.sock'}"
        values["spool_dir"] = Path(values.get("spool_dir") or state / "spool").absolute()
        values["hostname"] = values.get("hostname") or socket.gethostname()
        if str(values.get("metrics_listen", "")).strip().lower() == "off":
            values["metrics_listen"] = ()
        return values


class SmtpdSettings(Settings):
    """The SMTP front end."""

    role: ClassVar[str] = "smtpd"

    smtp_listen: Listens = (("127.0.0.1", 2525),)
    publish: str = ""
    client_networks: Networks = ("127.0.0.0/8", "::1")
    recipient_domains: Domains = ()
    allow_untrusted_routing: bool = False
    bare_cr: Literal["reject", "strip"] = "reject"
    max_message_size: Size = 25 << 20
    max_recipients: Annotated[int, Field(ge=100)] = 1000
    max_connections: Count = 1000
    max_connections_per_client: Count = 50
    smtp_timeout: Duration = 300.0
    session_timeout: Duration = 3600.0
    accept_deadline: Duration = 60.0
    drain_timeout: Duration = 30.0


class WorkerSettings(Settings):
    """Delivery."""

    role: ClassVar[str] = "worker"

    connect_timeout: Duration = 10.0
    io_timeout: Duration = 60.0
    reply_timeout: Duration = 600.0
    session_timeout: Duration = 3600.0
    block_size: Annotated[int, BeforeValidator(size), Field(ge=512, le=16 << 20)] = 64 << 10
    worker_connections: Count = 128
    server_connections: Count = 50
    lease: Duration = 60.0
    drain_timeout: Duration = 30.0
    retry_min: Duration = 30.0
    retry_max: Duration = 3600.0
    uncertain: Literal["retry", "hold"] = "retry"
    uncertain_delay: Span = 900.0
    poison_limit: Annotated[int, Field(ge=3)] = 5  # a delivery is sent alone from the third time on
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


def _from_files() -> dict[str, str]:
    """The contents of the files that RELAY_X_FILE variables name, by field; raises SettingsError."""
    contents = {}
    for name, path in os.environ.items():
        target = name.removesuffix("_FILE")
        if name.endswith("_FILE") and target in names() and name not in names():
            try:
                contents[target.removeprefix(PREFIX).lower()] = Path(path).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "it is not text"
                raise SettingsError(f"{name}: cannot read {path}: {why}") from None
    return contents


def load[Role: Settings](role: type[Role], **overrides: Any) -> Role:
    """Read the settings of a role from the environment; raises SettingsError, a line for each bad
    variable.

    The settings of the other roles and the file of routes are validated too: settings that one
    process refuses must not pass in another, or half of a relay would run.
    """
    from relay.routes import Routes  # which imports this module

    lines: dict[str, None] = {}  # roles share variables, and a variable has one line
    loaded: dict[type[Settings], Settings] = {}
    for each in ROLES:
        fields = {name: value for name, value in overrides.items() if name in each.model_fields}
        try:
            loaded[each] = each(**fields)
        except ValidationError as error:
            lines |= dict.fromkeys(map(_line, error.errors()))
    if lines:
        raise SettingsError("\n".join(lines))
    Routes.load(loaded[role])
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
    return f"{name}{'' if 'URL' in name else f' = {value!r}'}: {reason(detail)}"


def unwanted(settings: Settings) -> re.Pattern[str]:
    """A pattern for replies about this relay and not about the mail; matches nothing if there are
    no patterns.

    A server that does not authorize the relay answers with the same D as for a bad recipient:
    Postfix says "host[ip] is not authorized to use this service".
    """
    return re.compile("|".join(settings.unauthorized_replies) or r"(?!)", re.IGNORECASE)


def unknown_names(environ: Mapping[str, str] = os.environ) -> list[str]:
    """A warning for each unknown RELAY_ variable, with the most similar known one."""
    known = names() | {name + "_FILE" for name in names()}
    warnings = []
    for name in sorted(environ.keys() - known):
        if name.startswith(PREFIX) and not name.startswith("RELAY_TEST"):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            warnings.append(f"ignoring {name}, which is not a setting{hint}")
    return warnings


def redacted(text: str) -> str:
    """A URL, or a text with one, without the password and the values of the parameters.

    A password may contain characters that should have been escaped, so it reaches to the last `@`.
    Any parameter may be a secret of a driver (`sslpassword`), so no value is shown.
    """
    start, scheme, rest = text.partition("://")
    user, colon, secret = rest.partition(":")
    secret, at, host = secret.rpartition("@")
    if colon and at:
        # the `@` may belong to the value of a parameter
        if "=" in secret.partition("?")[2].rpartition("&")[2]:
            host = host.partition("&")[2]
        rest = f"{user}:***@{host}"
    return _PASSWORD.sub("***", start) + scheme + _PASSWORD.sub("***", _VALUE.sub(r"\1***", rest))
