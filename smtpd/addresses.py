"""Paths and parameters of MAIL and RCPT, by the grammar of RFC 5321 section 4.1.2 and a few forms
that clients need.

All clients may end a domain with a dot, which is dropped. Trusted clients may leave the domain out
(the `root` of a cron job gets that of this host) and may use `_` in it, as the names of many hosts
in private networks do; a program on such a host could not send its mail otherwise. For other
clients both are errors, as on the Internet.

An address leaves here in the form that QMQP carries: bare, its local part without SMTP's quoting
(`"a b"@x` becomes `a b@x`), without a source route, the null sender as the empty string. It was
checked to be printable ASCII with a non-empty local part and a real domain or address literal, so
that nothing downstream can see a line end, a NUL or one of qmail's magic senders (`#@[]`,
`list-@host-@[]`): an empty literal is no domain. Domains and local parts keep their case. No
address leaves here that `qmqp.request` refuses, because a message with one could never be sent. The
parameters are checked, and kept as they were written: ENVID and ORCPT are case-significant (RFC
3461).

Every refusal is a `CommandRefused` that carries the whole reply.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from ipaddress import AddressValueError, IPv4Address, IPv6Address

from qmqp.request import MAX_ADDRESS, is_sendable

_ATOM = rb"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = rb"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_DOMAIN = rb"%b(?:\.%b)*" % (_LABEL, _LABEL)
_LOCAL_LABEL = rb"[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?"
_LOCAL_DOMAIN = rb"%b(?:\.%b)*" % (_LOCAL_LABEL, _LOCAL_LABEL)
_MAILBOX = (
    rb"(?P<local>%b(?:\.%b)*|\"(?:[ !#-\[\]-~]|\\[ -~])*\")(?:@(?:(?P<domain>%b)\.?|(?P<literal>\[[A-Za-z0-9.:]+\])))?"
    % (_ATOM, _ATOM, _LOCAL_DOMAIN)
)
# One space after the colon is no part of the grammar, and much older software sends it.
_ARGUMENT = re.compile(
    rb"(?i:(?P<word>FROM|TO): ?)<(?:(?:@%b(?:,@%b)*:)?%b)?>(?P<rest> .*)?"
    % (_DOMAIN, _DOMAIN, _MAILBOX),
    re.DOTALL,
)
_QUOTED_PAIR = re.compile(rb"\\(.)")
_PARAMETER = re.compile(rb"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([!-<>-~]+))?")
_XTEXT = rb"(?:[!-*,-<>-~]|\+[0-9A-F]{2})"
_WISH = rb"(?:SUCCESS|FAILURE|DELAY)"
_SENDER_PARAMETERS = {
    b"SIZE": re.compile(rb"[0-9]{1,20}"),
    b"BODY": re.compile(rb"(?i)7BIT|8BITMIME"),
    b"RET": re.compile(rb"(?i)FULL|HDRS"),
    b"ENVID": re.compile(rb"%b{1,100}" % _XTEXT),
    # RFC 4954 section 5: says who first submitted it; nobody authenticates here, so it is read and
    # forgotten.
    b"AUTH": re.compile(rb"<>|%b{1,500}" % _XTEXT),
    # RFC 6531, 3.4: it has no value.
    b"SMTPUTF8": re.compile(rb""),
}
_RECIPIENT_PARAMETERS = {
    b"NOTIFY": re.compile(rb"(?i)NEVER|%b(?:,%b){0,2}" % (_WISH, _WISH)),
    b"ORCPT": re.compile(rb"[A-Za-z0-9][A-Za-z0-9-]{0,63};%b{1,500}" % _XTEXT),
}
_CASE_COUNTS = (b"ENVID", b"ORCPT")

DOMAIN_LIMIT = 255
"""Octets, RFC 5321 section 4.5.3.1.2. The 64 of a local part and the 256 of a path there are what
must be taken at least. VERP and SRS make longer ones, and a bounce to such a sender would be lost.
MAX_ADDRESS limits the address."""


class CommandRefused(Exception):
    """A command that cannot be obeyed; `reply` is the whole answer, line end included."""

    def __init__(self, reply: bytes) -> None:
        super().__init__(reply.decode("ascii").rstrip())
        self.reply = reply


_UNKNOWN_PARAMETER = b"555 5.5.4 Parameter not recognized or not implemented\r\n"
_BAD_PARAMETER = b"501 5.5.4 Bad or repeated parameter\r\n"
_NO_SMTPUTF8 = b"553 5.6.7 Only ASCII addresses are accepted here\r\n"


@dataclass(frozen=True, slots=True)
class Recipient:
    """One mailbox: `address` as QMQP carries it, `path` as SMTP writes it (quoted, no brackets),
    and what RCPT said."""

    address: str
    path: str
    domain: str
    notify: str | None = None
    orcpt: str | None = None

    @property
    def local(self) -> str:
        """The local part without SMTP's quoting."""
        return self.address[: -len(self.domain) - 1]

    @property
    def mailbox(self) -> str:
        """Equal for two recipients that are the same one: capitals count in the local part alone
        (RFC 5321, 2.4)."""
        return self.address[: -len(self.domain)] + self.domain.lower()

    def with_repeat(self, repeat: "Recipient") -> "Recipient":
        """This recipient after the client has named it once more.

        The sender is told of everything that either asked for, because a notice too many harms less
        than one that is missed (RFC 3461 does not say what a repeat means). What is asked for if
        nothing is said is FAILURE and DELAY.
        """
        if self.notify == repeat.notify:
            notify = self.notify
        else:
            asked = {
                wish
                for one in (self, repeat)
                for wish in (one.notify or "FAILURE,DELAY").split(",")
            } - {"NEVER"}
            notify = ",".join(sorted(asked))
        return replace(self, notify=notify, orcpt=self.orcpt or repeat.orcpt)


def parse_sender(
    argument: bytes, hostname: str, *, trusted: bool = False
) -> tuple[str, dict[bytes, str]]:
    """Reads the argument of MAIL (`FROM:<path> parameters`): the sender ('' if null) and the
    parameters by name.

    A name without a domain is one of `hostname`, if the client is `trusted`. Raises Refused. Words
    are in capitals, only ENVID is as it came.
    """
    match = _match(argument, b"FROM", b"501 5.1.7 Bad sender address syntax\r\n")
    address = ""
    if match["local"] is not None:
        address, _, _ = _mailbox(
            match, b"501 5.1.7 Bad sender address", hostname if trusted else None, trusted=trusted
        )
    return address, _parameters(match["rest"], _SENDER_PARAMETERS)


def parse_recipient(argument: bytes, hostname: str, *, trusted: bool = False) -> Recipient:
    """Reads the argument of RCPT. Raises Refused.

    A bare `<Postmaster>` (RFC 5321, 4.1.1.3) is that of `hostname`, and so is any name from a
    `trusted` client.
    """
    match = _match(argument, b"TO", b"501 5.1.3 Bad recipient address syntax\r\n")
    if match["local"] is None:
        raise CommandRefused(b"501 5.1.3 A recipient cannot be empty\r\n")
    home = hostname if trusted or match["local"].lower() == b"postmaster" else None
    address, path, domain = _mailbox(
        match, b"501 5.1.3 Bad recipient address", home, trusted=trusted
    )
    values = _parameters(match["rest"], _RECIPIENT_PARAMETERS)
    return Recipient(address, path, domain, values.get(b"NOTIFY"), values.get(b"ORCPT"))


def _match(argument: bytes, word: bytes, refusal: bytes) -> re.Match[bytes]:
    match = _ARGUMENT.fullmatch(argument)
    if match is None or match["word"].upper() != word:
        raise CommandRefused(refusal if argument.isascii() else _NO_SMTPUTF8)
    return match


def _mailbox(
    match: re.Match[bytes], refusal: bytes, home: str | None, *, trusted: bool
) -> tuple[str, str, str]:
    """Address, path and domain. `home`: the domain of a name that has none, None if it needs
    one."""
    local, domain, literal = match.group("local", "domain", "literal")
    if literal is not None:
        domain = literal
        if not _is_literal(domain[1:-1].decode("ascii")):
            raise CommandRefused(refusal + b": bad address literal\r\n")
    elif domain is None:
        if home is None:
            raise CommandRefused(refusal + b": a domain is needed\r\n")
        domain = home.encode("ascii")
        if local.lower() == b"postmaster":
            local = b"postmaster"  # capitals mean nothing in this one (RFC 5321, 4.5.1)
    elif not trusted and 0x5F in domain:
        raise CommandRefused(refusal + b": _ in the domain\r\n")
    if len(domain) > DOMAIN_LIMIT:
        raise CommandRefused(refusal + b": the domain is too long\r\n")
    bare = local if local[0] != 0x22 else _QUOTED_PAIR.sub(rb"\1", local[1:-1])
    if not bare:
        raise CommandRefused(refusal + b": empty local part\r\n")
    address = bare + b"@" + domain
    if not is_sendable(address):
        raise CommandRefused(
            refusal + b": it begins with < or is longer than %d octets\r\n" % MAX_ADDRESS
        )
    text = address.decode("ascii")
    name = text[len(bare) + 1 :]
    return text, text if bare is local else f"{local.decode('ascii')}@{name}", name


def _is_literal(text: str) -> bool:
    try:
        if text[:5].upper() == "IPV6:":
            IPv6Address(text[5:])
        else:
            IPv4Address(text)
    except AddressValueError:
        return False
    return True


def _parameters(text: bytes | None, known: Mapping[bytes, re.Pattern[bytes]]) -> dict[bytes, str]:
    values: dict[bytes, str] = {}
    for word in filter(None, (text or b"").split(b" ")):
        match = _PARAMETER.fullmatch(word)
        if match is None:
            raise CommandRefused(_BAD_PARAMETER)
        name = match[1].upper()
        if name not in known:
            raise CommandRefused(_UNKNOWN_PARAMETER)
        value = match[2] or b""
        if name in values or not known[name].fullmatch(value):
            raise CommandRefused(_BAD_PARAMETER)
        values[name] = (value if name in _CASE_COUNTS else value.upper()).decode("ascii")
    return values
