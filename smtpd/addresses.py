"""Paths and parameters of MAIL and RCPT, by the grammar of RFC 5321 section 4.1.2 and nothing beside it.

An address leaves here in the form that QMQP carries: bare, its local part without SMTP's quoting (`"a b"@x` becomes
`a b@x`), without a source route, the null sender as the empty string. It was checked to be printable ASCII with a
non-empty local part and a real domain or address literal, so that nothing downstream can see a line end, a NUL or one
of qmail's magic senders (`#@[]`, `list-@host-@[]`): an empty literal is no domain. Domains and local parts keep their
case. No address leaves here that `qmqp.request` refuses, because a message with one could never be sent. The parameters
are checked, and kept as they were written: ENVID and ORCPT are case-significant (RFC 3461).

Every refusal is a `Refused` that carries the whole reply.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address

from qmqp.request import MAX_ADDRESS, is_sendable

_ATOM = rb"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = rb"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_DOMAIN = rb"%b(?:\.%b)*" % (_LABEL, _LABEL)
_MAILBOX = rb"(?P<local>%b(?:\.%b)*|\"(?:[ !#-\[\]-~]|\\[ -~])*\")@(?P<domain>%b|\[[A-Za-z0-9.:]+\])" % (
    _ATOM,
    _ATOM,
    _DOMAIN,
)
# One space after the colon is no part of the grammar, and much older software sends it.
_ARGUMENT = re.compile(
    rb"(?i:(?P<word>FROM|TO): ?)<(?:(?:@%b(?:,@%b)*:)?(?P<mailbox>%b)|(?P<postmaster>(?i:postmaster)))?>(?P<rest> .*)?"
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
    # RFC 4954 section 5: says who first submitted it; nobody authenticates here, so it is read and forgotten.
    b"AUTH": re.compile(rb"<>|%b{1,500}" % _XTEXT),
}
_RECIPIENT_PARAMETERS = {
    b"NOTIFY": re.compile(rb"(?i)NEVER|%b(?:,%b){0,2}" % (_WISH, _WISH)),
    b"ORCPT": re.compile(rb"[A-Za-z0-9][A-Za-z0-9-]{0,63};%b{1,500}" % _XTEXT),
}
_CASE_COUNTS = (b"ENVID", b"ORCPT")

LOCAL_LIMIT = 64
DOMAIN_LIMIT = 255
PATH_LIMIT = 256
"""Octets, RFC 5321 section 4.5.3.1; the path counts its angle brackets, the local part its quotes."""


class Refused(Exception):
    """A command that cannot be obeyed; `reply` is the whole answer, line end included."""

    def __init__(self, reply: bytes) -> None:
        super().__init__(reply.decode("ascii").rstrip())
        self.reply = reply


_UNKNOWN_PARAMETER = b"555 5.5.4 Parameter not recognized or not implemented\r\n"
_BAD_PARAMETER = b"501 5.5.4 Bad or repeated parameter\r\n"
_NO_SMTPUTF8 = b"553 5.6.7 Only ASCII addresses are accepted here\r\n"


@dataclass(frozen=True, slots=True)
class Recipient:
    """One mailbox: `address` as QMQP carries it, `path` as SMTP writes it (quoted, no brackets), and what RCPT said."""

    address: str
    path: str
    domain: str
    notify: str | None = None
    orcpt: str | None = None

    @property
    def local(self) -> str:
        """The local part without SMTP's quoting."""
        return self.address[: -len(self.domain) - 1]


def parse_sender(argument: bytes) -> tuple[str, dict[bytes, str]]:
    """Reads the argument of MAIL (`FROM:<path> parameters`): the sender ('' if null) and the parameters by name.

    Raises Refused. Words are in capitals, only ENVID is as it came.
    """
    match = _match(argument, b"FROM", b"501 5.1.7 Bad sender address syntax\r\n")
    if match["postmaster"] is not None:
        raise Refused(b"501 5.1.7 A sender needs a domain\r\n")
    address = _mailbox(match, b"501 5.1.7 Bad sender address")[0] if match["mailbox"] is not None else ""
    return address, _parameters(match["rest"], _SENDER_PARAMETERS)


def parse_recipient(argument: bytes, hostname: str) -> Recipient:
    """Reads the argument of RCPT; a bare `<Postmaster>` (RFC 5321, 4.1.1.3) is that of `hostname`. Raises Refused."""
    match = _match(argument, b"TO", b"501 5.1.3 Bad recipient address syntax\r\n")
    if match["postmaster"] is not None:
        address = path = f"postmaster@{hostname}"
        domain = hostname
    elif match["mailbox"] is not None:
        address, path, domain = _mailbox(match, b"501 5.1.3 Bad recipient address")
    else:
        raise Refused(b"501 5.1.3 A recipient cannot be empty\r\n")
    values = _parameters(match["rest"], _RECIPIENT_PARAMETERS)
    return Recipient(address, path, domain, values.get(b"NOTIFY"), values.get(b"ORCPT"))


def _match(argument: bytes, word: bytes, refusal: bytes) -> re.Match[bytes]:
    match = _ARGUMENT.fullmatch(argument)
    if match is None or match["word"].upper() != word:
        raise Refused(refusal if argument.isascii() else _NO_SMTPUTF8)
    return match


def _mailbox(match: re.Match[bytes], refusal: bytes) -> tuple[str, str, str]:
    path, local, domain = match["mailbox"], match["local"], match["domain"]
    if len(local) > LOCAL_LIMIT or len(domain) > DOMAIN_LIMIT or len(path) + 2 > PATH_LIMIT:
        raise Refused(refusal + b": too long\r\n")
    if domain[0] == 0x5B and not _is_literal(domain[1:-1].decode("ascii")):
        raise Refused(refusal + b": bad address literal\r\n")
    text = path.decode("ascii")
    name = domain.decode("ascii")
    bare = local if local[0] != 0x22 else _QUOTED_PAIR.sub(rb"\1", local[1:-1])
    if not bare:
        raise Refused(refusal + b": empty local part\r\n")
    address = b"%b@%b" % (bare, domain)
    if not is_sendable(address):
        raise Refused(refusal + b": it begins with < or is longer than %d octets\r\n" % MAX_ADDRESS)
    return address.decode("ascii"), text, name


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
            raise Refused(_BAD_PARAMETER)
        name = match[1].upper()
        if name not in known:
            raise Refused(_UNKNOWN_PARAMETER)
        value = match[2]
        if name in values or value is None or not known[name].fullmatch(value):
            raise Refused(_BAD_PARAMETER)
        values[name] = (value if name in _CASE_COUNTS else value.upper()).decode("ascii")
    return values
