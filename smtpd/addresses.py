"""Paths and parameters of MAIL and RCPT: the grammar of RFC 5321, 4.1.2, and three deviations.

Every client may end a domain with a dot, which is dropped. Trusted clients may leave the domain out
(mail to `root` from a cron job gets this host's domain) and may use `_` in it, because hosts of
private networks have such names. For other clients both are errors.

A parsed address has the form that QMQP carries: no quoting, no source route, '' for the null
sender. It is printable ASCII with a non-empty local part and a real domain or address literal, and
`qmqp.request` accepts it. So no line end, NUL or magic sender of qmail (`#@[]`) gets further.
Case is kept. Parameters are checked and kept in capitals, except ENVID and ORCPT (RFC 3461).
"""

import re
from collections.abc import Mapping
from ipaddress import AddressValueError, IPv4Address, IPv6Address

from qmqp.request import MAX_ADDRESS, is_sendable
from reception.envelope import ASCII_ONLY, Recipient, Refused

_ATOM = rb"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = rb"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_DOMAIN = rb"%b(?:\.%b)*" % (_LABEL, _LABEL)
_LOCAL_LABEL = rb"[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?"
_LOCAL_DOMAIN = rb"%b(?:\.%b)*" % (_LOCAL_LABEL, _LOCAL_LABEL)
_MAILBOX = (
    rb"(?P<local>%b(?:\.%b)*|\"(?:[ !#-\[\]-~]|\\[ -~])*\")"
    rb"(?:@(?:(?P<domain>%b)\.?|(?P<literal>\[[A-Za-z0-9.:]+\])))?" % (_ATOM, _ATOM, _LOCAL_DOMAIN)
)
# The grammar has no space after the colon, but much older software sends one.
_ARGUMENT = re.compile(
    rb"(?i:(?P<word>FROM|TO): ?)<(?:(?:@%b(?:,@%b)*:)?%b)?>(?P<rest> .*)?"
    % (_DOMAIN, _DOMAIN, _MAILBOX),
    re.DOTALL,
)
_QUOTED_PAIR = re.compile(rb"\\(.)")
_PARAMETER = re.compile(rb"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([!-<>-~]+))?")
_XTEXT = rb"(?:[!-*,-<>-~]|\+[0-9A-F]{2})"
_CONDITION = rb"(?:SUCCESS|FAILURE|DELAY)"
_SENDER_PARAMETERS = {
    b"SIZE": re.compile(rb"[0-9]{1,20}"),
    b"BODY": re.compile(rb"(?i)7BIT|8BITMIME"),
    b"RET": re.compile(rb"(?i)FULL|HDRS"),
    b"ENVID": re.compile(rb"%b{1,100}" % _XTEXT),
    # RFC 4954 section 5: the first submitter. It is not trusted, so the value is not used.
    b"AUTH": re.compile(rb"<>|%b{1,500}" % _XTEXT),
    # RFC 6531, 3.4: it has no value.
    b"SMTPUTF8": re.compile(rb""),
}
_RECIPIENT_PARAMETERS = {
    b"NOTIFY": re.compile(rb"(?i)NEVER|%b(?:,%b){0,2}" % (_CONDITION, _CONDITION)),
    b"ORCPT": re.compile(rb"[A-Za-z0-9][A-Za-z0-9-]{0,63};%b{1,500}" % _XTEXT),
}
_CASE_SENSITIVE = (b"ENVID", b"ORCPT")
_BAD_PARAMETER = "501 5.5.4 Bad or repeated parameter"

DOMAIN_LIMIT = 255
"""Octets of a domain (RFC 5321, 4.5.3.1.2). That section's 64 octets of a local part and 256 of a
path are no limit here: a server must accept at least as many, VERP and SRS need more, and a bounce
to such a sender would be lost. MAX_ADDRESS limits the whole address."""


def parse_sender(
    argument: bytes, hostname: str, *, trusted: bool = False
) -> tuple[str, dict[bytes, str]]:
    """Parses the argument of MAIL (`FROM:<path> parameters`) into the sender, '' if it is null, and
    its parameters by name.

    For a `trusted` client `hostname` is the domain of a name that has none. Raises Refused.
    """
    match = _match(argument, b"FROM", "501 5.1.7 Bad sender address syntax")
    address = ""
    if match["local"] is not None:
        default = hostname if trusted else None
        address, _, _ = _mailbox(match, "501 5.1.7 Bad sender address", default, trusted=trusted)
    return address, _parameters(match["rest"], _SENDER_PARAMETERS)


def parse_recipient(argument: bytes, hostname: str, *, trusted: bool = False) -> Recipient:
    """Parses the argument of RCPT (`TO:<path> parameters`).

    `hostname` is the domain of a bare `<Postmaster>` (RFC 5321, 4.1.1.3), and of every name without
    a domain from a `trusted` client. Raises Refused.
    """
    match = _match(argument, b"TO", "501 5.1.3 Bad recipient address syntax")
    if match["local"] is None:
        raise Refused("501 5.1.3 A recipient cannot be empty")
    default = hostname if trusted or match["local"].lower() == b"postmaster" else None
    mailbox = _mailbox(match, "501 5.1.3 Bad recipient address", default, trusted=trusted)
    values = _parameters(match["rest"], _RECIPIENT_PARAMETERS)
    return Recipient(*mailbox, values.get(b"NOTIFY"), values.get(b"ORCPT"))


def _match(argument: bytes, keyword: bytes, refusal: str) -> re.Match[bytes]:
    match = _ARGUMENT.fullmatch(argument)
    if match is None or match["word"].upper() != keyword:
        raise Refused(refusal if argument.isascii() else ASCII_ONLY)
    return match


def _mailbox(
    match: re.Match[bytes], refusal: str, default: str | None, *, trusted: bool
) -> tuple[str, str, str]:
    """Address, path and domain. `default` is the domain of a name that has none; None refuses such
    a name."""
    local, domain, literal = match.group("local", "domain", "literal")
    if literal is not None:
        domain = literal
        _check_literal(domain[1:-1].decode("ascii"), refusal)
    elif domain is None:
        if default is None:
            raise Refused(f"{refusal}: a domain is needed")
        domain = default.encode("ascii")
        if local.lower() == b"postmaster":
            local = b"postmaster"  # this local part is not case-sensitive (RFC 5321, 4.5.1)
    elif not trusted and b"_" in domain:
        raise Refused(f"{refusal}: _ in the domain")
    if len(domain) > DOMAIN_LIMIT:
        raise Refused(f"{refusal}: the domain is too long")
    bare = _QUOTED_PAIR.sub(rb"\1", local[1:-1]) if local.startswith(b'"') else local
    if not bare:
        raise Refused(f"{refusal}: empty local part")
    if not is_sendable(bare + b"@" + domain):
        raise Refused(f"{refusal}: it begins with < or is longer than {MAX_ADDRESS} octets")
    name = domain.decode("ascii")
    return f"{bare.decode('ascii')}@{name}", f"{local.decode('ascii')}@{name}", name


def _check_literal(text: str, refusal: str) -> None:
    try:
        IPv6Address(text[5:]) if text[:5].upper() == "IPV6:" else IPv4Address(text)
    except AddressValueError:
        raise Refused(f"{refusal}: bad address literal") from None


def _parameters(text: bytes | None, known: Mapping[bytes, re.Pattern[bytes]]) -> dict[bytes, str]:
    values: dict[bytes, str] = {}
    for word in filter(None, (text or b"").split(b" ")):
        match = _PARAMETER.fullmatch(word)
        if match is None:
            raise Refused(_BAD_PARAMETER)
        name = match[1].upper()
        if name not in known:
            raise Refused("555 5.5.4 Parameter not recognized or not implemented")
        value = match[2] or b""
        if name in values or not known[name].fullmatch(value):
            raise Refused(_BAD_PARAMETER)
        values[name] = (value if name in _CASE_SENSITIVE else value.upper()).decode("ascii")
    return values
