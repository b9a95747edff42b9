"""The objects that hooks get: the session of a client, and its transaction.

Both have `notes`, a dictionary in which plugins keep what they want to remember until the session,
or the transaction, ends. The other attributes are for reading, unless their text says otherwise.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from qmqp.request import MAX_ADDRESS, is_sendable
from qmqp_relay.content import MessageContent

HEADER_LIMIT = 16 * 1024
"""Octets of all the fields that plugins add to one message."""
LONGEST_LINE = 998
"""Octets of a line of a header (RFC 5322, 2.1.1)."""
LONGEST_REASON = 500
_FIELD_NAME = re.compile(r"[!-9;-~]{1,100}")
_ADDRESS = re.compile(r"[!-;=?-~]+@[!-;=?-~]+")


@dataclass(frozen=True, slots=True)
class Address:
    """An envelope address, as QMQP carries it: without brackets and quoting; '' is the null
    sender."""

    address: str

    @property
    def local(self) -> str:
        """What stands before the last `@`."""
        return self.address.rpartition("@")[0]

    @property
    def domain(self) -> str:
        """What stands behind the last `@`."""
        return self.address.rpartition("@")[2]

    def __str__(self) -> str:
        return self.address


@dataclass(frozen=True, slots=True)
class RewritableAddress(Address):
    """The recipient that `rcpt` is asked about."""

    _rewritten: list[str] = field(default_factory=list, compare=False, repr=False)

    def rewrite(self, address: str) -> None:
        """Has the mail go to this address and not to the one that the client named. The client is
        not told. Raises ValueError unless it is `local@domain` in printable ASCII without blanks
        and angle brackets."""
        valid = _ADDRESS.fullmatch(address) and is_sendable(address.encode("ascii"))
        if not valid:
            raise ValueError(
                f"{address!r:.100} is no address: write local@domain in printable ASCII, with at"
                f" most {MAX_ADDRESS} characters and no blank"
            )
        self._rewritten.append(address)

    @property
    def rewritten(self) -> str | None:
        """The address of the last `rewrite`; None without one."""
        return self._rewritten[-1] if self._rewritten else None


@dataclass(eq=False)
class Session:
    """The connection of one client.

    `door` is `smtp` or `qmqp`; `client_address` its IP address; `trusted`: it may relay, by its
    network, its certificate or its login; `helo` the name of HELO or EHLO ('' before it); `tls` the
    version and the cipher (None in plain text); `user` the name that it has logged in with.
    """

    door: str
    client_address: str
    trusted: bool = False
    helo: str = ""
    tls: str | None = None
    user: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)


class Transaction:
    """One message of a session, from MAIL on."""

    def __init__(
        self,
        session: Session,
        sender: str,
        recipients: Callable[[], list[str]],
        routes: Callable[[], Collection[str]],
    ) -> None:
        self.session = session
        self.sender = Address(sender)
        self.notes: dict[str, Any] = {}
        self.queue_id: str | None = None
        """The id in the reply and in the log; None before the content has come."""
        self.hold_reason: str | None = None
        self.held_by: str | None = None
        """The plugin that has held the message."""
        self.discarded = False
        self._recipients = recipients
        self._routes = routes
        self._route: str | None = None
        self._added: list[bytes] = []
        self._content: MessageContent | None = None

    @property
    def recipients(self) -> list[Address]:
        """The recipients that were accepted so far; rewritten ones as they are now."""
        return [Address(one) for one in self._recipients()]

    @property
    def content(self) -> MessageContent:
        """The message, in `message` and `queue`. Raises RuntimeError in other hooks."""
        if self._content is None:
            raise RuntimeError("only the hooks `message` and `queue` can read the content")
        return self._content

    @content.setter
    def content(self, content: MessageContent | None) -> None:
        self._content = content
        if content is not None:
            content.added = self.prefix

    @property
    def header(self) -> Any:
        """The header of the message (an `email.message.EmailMessage`), in `message` and `queue`."""
        return self.content.header

    @property
    def prefix(self) -> bytes:
        """The fields that were added, as they stand before the message."""
        return b"".join(reversed(self._added))

    def add_header(self, name: str, value: str) -> None:
        """Adds a field at the top of the message, whatever its size.

        A value of several lines is folded: each line but the first begins with a blank or a tab.
        Raises ValueError for what is no field (RFC 5322, 2.2), a line of more than 998 octets, and
        fields of more than 16 KiB in all.
        """
        if not _FIELD_NAME.fullmatch(name):
            raise ValueError(f"{name!r:.100} is no name of a field: write it without blanks and :")
        octets = f"{name}: {value}\n".encode()
        first, *folded = octets[:-1].split(b"\n")
        if any(line[:1] not in (b" ", b"\t") or not line.strip() for line in folded):
            raise ValueError(f"{name}: a line of the value does not begin with a blank or a tab")
        if any((c < 32 and c not in b"\t\n") or c == 127 for c in octets):
            raise ValueError(f"{name}: the value has a control character")
        if max(map(len, (first, *folded))) > LONGEST_LINE:
            raise ValueError(f"{name}: a line is longer than {LONGEST_LINE} octets")
        if sum(map(len, self._added)) + len(octets) > HEADER_LIMIT:
            raise ValueError(f"{name}: the added fields are longer than {HEADER_LIMIT} octets")
        self._added.append(octets)
        if self._content is not None:
            self._content.added = self.prefix

    @property
    def route(self) -> str | None:
        """The route of all recipients; None: the patterns of the routes decide. May be set, to the
        name of a route. Raises ValueError for another name."""
        return self._route

    @route.setter
    def route(self, name: str | None) -> None:
        if name is not None and name not in self._routes():
            known = ", ".join(self._routes())
            raise ValueError(f"there is no route {name!r:.100}; there are {known}")
        self._route = name

    def hold(self, reason: str) -> None:
        """Has the message stored and not sent, until an operator releases it. The operator sees the
        reason behind the name of the plugin."""
        text = "".join(c if c.isprintable() else "?" for c in reason[:LONGEST_REASON])
        self.hold_reason = text or "no reason given"

    def discard(self) -> None:
        """Has the client hear 250, and the message be dropped: it is not stored, and only the log
        has it."""
        self.discarded = True
