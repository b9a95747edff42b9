"""The envelope of a message, and the refusal of a part of it: the terms that all front ends share.

A front end parses its protocol into these classes, `policy` decides about them, and `receiver`
stores them.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

TOO_BIG = "552 5.3.4 Message exceeds the size limit"
LOOP = "554 5.4.6 Too many hops, this mail is looping"
ASCII_ONLY = "553 5.6.7 Only ASCII addresses are accepted here"


_DOT_ATOM = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*")


def _quoted(local: str) -> str:
    """A local part as SMTP writes it if it is no dot-atom (RFC 5321, 4.1.2)."""
    return '"' + re.sub(r'([\\"])', r"\\\1", local) + '"'


class Refused(Exception):
    """A command, a sender or a recipient is refused.

    Its text is the reply without its line end: code, enhanced code (RFC 3463) and text. A reply 421
    also ends the session.
    """

    @property
    def closes(self) -> bool:
        """Whether the session ends."""
        return str(self).startswith("421")


@dataclass(frozen=True, slots=True)
class Recipient:
    """One mailbox: `address` as QMQP carries it, `path` as SMTP writes it (quoted, no brackets).

    `notify` and `orcpt` are the parameters of RCPT (RFC 3461), None if they were not sent.
    """

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
        """Equal for two recipients that are the same mailbox: only the local part is case-sensitive
        (RFC 5321, 2.4)."""
        return self.address[: -len(self.domain)] + self.domain.lower()

    @property
    def parameters(self) -> dict[str, str]:
        """The parameters of RCPT by name."""
        sent = {"NOTIFY": self.notify, "ORCPT": self.orcpt}
        return {name: value for name, value in sent.items() if value is not None}

    def rewritten(self, address: str) -> "Recipient":
        """This recipient with another address, which is `local@domain` without quoting."""
        local, _, domain = address.rpartition("@")
        path = address if _DOT_ATOM.fullmatch(local) else f"{_quoted(local)}@{domain}"
        return replace(self, address=address, path=path, domain=domain)

    def merge(self, repeat: "Recipient") -> "Recipient":
        """This recipient after the client has named it again.

        The result asks for every DSN that either of them asks for, because an unneeded DSN harms
        less than a missing one (RFC 3461 does not define a repeat). Without NOTIFY a recipient asks
        for FAILURE and DELAY.
        """
        notify = self.notify
        if notify != repeat.notify:
            both = f"{notify or 'FAILURE,DELAY'},{repeat.notify or 'FAILURE,DELAY'}"
            notify = ",".join(sorted(set(both.split(",")) - {"NEVER"}))
        return replace(self, notify=notify, orcpt=self.orcpt or repeat.orcpt)


class TlsState(NamedTuple):
    """What a TLS handshake settled. `subject` is that of a client certificate that
    RELAY_TLS_CLIENT_CA has signed, None without one."""

    protocol: str
    cipher: str
    subject: str | None = None

    def __str__(self) -> str:
        return f"{self.protocol} {self.cipher}"


@dataclass(slots=True)
class Envelope:
    """One transaction, `started` at this time (monotonic): `sender` is '' if it is null,
    `parameters` are those of MAIL, `helo` is '' if the protocol has no greeting, and `protocol` is
    the keyword of the trace field (RFC 3848; QMQP has none there and stands for itself). `tls` is
    protocol and cipher of the connection, `auth_user` the authenticated user, if any.

    Protocols that send the envelope after the content fill in sender and recipients at its end."""

    sender: str
    parameters: Mapping[bytes, str]
    helo: str
    protocol: str
    recipients: list[Recipient] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    tls: str | None = None
    auth_user: str | None = None
