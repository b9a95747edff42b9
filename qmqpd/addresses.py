"""Addresses of a QMQP request: which of them the relay accepts.

QMQP carries octets without quoting, and only clients that may relay come this far. So the grammar
of SMTP does not apply: an address that a QMQP server can deliver passes unchanged, and so do
qmail's magic senders (`#@[]`, `list-@host-@[]`). An address that servers read differently is
refused. So is an address beyond ASCII, because QMQP cannot ask the next server whether it accepts
that. A name without a domain gets this host's, as at SMTP.
"""

import re

from qmqp.request import MAX_ADDRESS, is_sendable
from reception.envelope import ASCII_ONLY, Recipient, Refused

_PRINTABLE = re.compile(rb"[ -~]+")
_BAD_SENDER = "553 5.1.7 Bad sender address"
_BAD_RECIPIENT = "553 5.1.3 Bad recipient address"


def parse_sender(address: bytes, hostname: str) -> str:
    """The sender as the relay stores it, '' for the null sender. `hostname` is the domain of a name
    that has none. Raises Refused."""
    return _mailbox(address, hostname, _BAD_SENDER) if address else ""


def parse_recipient(address: bytes, hostname: str) -> Recipient:
    """A recipient; `hostname` as in `parse_sender`. Raises Refused."""
    if not address:
        raise Refused(f"{_BAD_RECIPIENT}: it is empty")
    mailbox = _mailbox(address, hostname, _BAD_RECIPIENT)
    return Recipient(mailbox, mailbox, mailbox.rpartition("@")[2])


def _mailbox(address: bytes, hostname: str, refusal: str) -> str:
    if not address.isascii():
        raise Refused(ASCII_ONLY)
    if not _PRINTABLE.fullmatch(address):
        raise Refused(f"{refusal}: it has a control character")
    local, at, domain = address.decode("ascii").rpartition("@")
    if not at:
        local, domain = domain, hostname
    domain = domain.rstrip(".")
    if not local or not domain:
        raise Refused(f"{refusal}: empty local part or domain")
    mailbox = f"{local}@{domain}"
    if not is_sendable(mailbox.encode("ascii")):
        raise Refused(f"{refusal}: it begins with < or is longer than {MAX_ADDRESS} octets")
    return mailbox
