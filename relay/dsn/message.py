"""The text of a DSN or a delay warning (RFC 3461, 3464, 6522, 3834).

A DSN is a message from the null sender: a text for people, a `message/delivery-status` part for
programs, and the original or its header. `reduced` makes it again from its own text with less of
the original, which has left the spool by then. The MIME structure is written here and not by
`email.message`, because its generator changes bare CRs of the original.

What must stay true: a server's reply is quoted as printable ASCII in bounded lines and can add no
line and no field; only a server's reply becomes a `Diagnostic-Code`, and no reason of an operator
gives a status; an operator is never named; a message that may have been delivered is not called
undelivered.
"""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from email.utils import format_datetime
from enum import StrEnum

from relay.log import escaped
from relay.queue.outcome import Outcome
from relay.queue.states import ReasonSource
from relay.spool.journal.format import Place

_STATUS = re.compile(r"(?<![\d.])(?:#\s?)?([245])\.(\d{1,3})\.(\d{1,3})(?!\.?\d)")
_XTEXT_HEX = re.compile(r"\+([0-9A-F]{2})")
BY_OPERATOR = "bounced by an operator"  # how the reason of such a bounce begins
POSSIBLY_DELIVERED = (
    "It may have been delivered all the same: the whole message was sent to a server once, and no"
    " valid reply came."
)
_8BIT = "\nContent-Transfer-Encoding: 8bit"
_TEXT = "text/plain; charset=us-ascii"
_STATUS_PART = "message/delivery-status"
_HEADERS = "text/rfc822-headers"
_LONGEST_LINE = 900  # of a header, well below RFC 5322's 998
# An address cannot be folded, so this is the longest that a line can hold whole: RFC 5322 has 998
# characters for it and its < >. QMQP has up to 999 octets.
_LONGEST_PATH = 995
_ATOMS = re.compile(r"[\w!#$%&'*+/=?^`{|}~-]+(\.[\w!#$%&'*+/=?^`{|}~-]+)*", re.ASCII)


class Kind(StrEnum):
    """What a DSN reports."""

    BOUNCED = "bounced"
    EXPIRED = "expired"
    DELAYED = "delayed"


class Enclosure(StrEnum):
    """The part of the original that a DSN encloses (`messages.dsn_content`)."""

    FULL = "full"
    HEADER = "header"
    NONE = "none"

    @property
    def less(self) -> "Enclosure | None":
        """The part that the next DSN encloses after a server rejected this one; None if nothing
        is left to leave out."""
        return {Enclosure.FULL: Enclosure.HEADER, Enclosure.HEADER: Enclosure.NONE}.get(self)


class Withheld(StrEnum):
    """Why a sender gets no DSN that is pending (`deliveries.dsn_withheld`)."""

    RATE = "rate"
    POSTMASTER = "postmaster"
    ADDRESS = "address"


_REDUCED = {
    Enclosure.HEADER: "Only its header is returned, because a mail server rejected this report"
    " with the whole message.",
    Enclosure.NONE: "Your message is not returned, because a mail server rejected this report"
    " with its header.",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """A recipient, and the last state of its delivery.

    `kind`: what a DSN reports (None: nothing); `reply`: the last server's reply, or the relay's or
    an operator's reason, as `reason_source` says; `outcome`: of the last attempt, None before the
    first; `possibly_delivered`: a server may have accepted the message; `number`: of the delivery;
    `warned`: the sender has had a delay warning.
    """

    address: str
    orcpt: str | None
    kind: Kind | None
    reply: str
    server: str | None
    attempted_at: datetime | None
    expires_at: datetime
    outcome: str | None
    reason_source: str | None
    possibly_delivered: bool = False
    number: int = 1
    notify: str | None = None
    warned: bool = False

    @property
    def server_reply(self) -> str:
        """The server's reply; empty if the reason is not a server's."""
        return self.reply if self.reason_source == ReasonSource.SERVER else ""

    @property
    def bounced_by_operator(self) -> bool:
        """Whether an operator bounced it, and not a server."""
        return self.kind is Kind.BOUNCED and self.reason_source == ReasonSource.OPERATOR

    @property
    def unsendable(self) -> bool:
        """Whether it bounced because QMQP cannot carry its envelope."""
        return (self.kind, self.outcome, self.reason_source) == (
            Kind.BOUNCED,
            Outcome.UNSENDABLE,
            ReasonSource.RELAY,
        )


@dataclass(frozen=True, slots=True)
class Original:
    """The message that a DSN is about.

    `size`: of its body, in bytes; `client_trusted`: whether the policy trusts the client that sent
    it (None: no policy, or a row of an older version); `dsn_content`, `dsn_of`: what it encloses,
    and the message that it is about, if it is a DSN itself; `place`: that of its body in the
    journal (None: a file); `prefix`: the fields that plugins have added before the body.
    """

    id: str
    sender: str
    received_at: datetime
    header_message_id: str | None
    envid: str | None
    size: int = 0
    ret: str | None = None
    client_trusted: bool | None = None
    dsn_content: str | None = None
    dsn_of: str | None = None
    place: Place | None = None
    prefix: str | None = None

    @property
    def from_untrusted_client(self) -> bool:
        """Whether the policy does not trust the client that sent it."""
        return self.client_trusted is not None and not self.client_trusted


def unxtext(text: str) -> str:
    """Decode xtext (RFC 3461 4), as one line of printable ASCII."""
    decoded = _XTEXT_HEX.sub(lambda match: chr(int(match[1], 16)), text)
    return escaped(decoded.encode("latin-1", "replace"), _LONGEST_LINE)


def status_of(kind: Kind | None, reply: str) -> str:
    """The enhanced status code (RFC 3463): that of the reply if its class fits, else X.0.0."""
    if kind is Kind.EXPIRED:
        return "5.4.7"
    class_ = "5" if kind is Kind.BOUNCED else "4"
    match = next((match for match in _STATUS.finditer(reply) if match[1] == class_), None)
    return f"{class_}.{int(match[2])}.{int(match[3])}" if match else f"{class_}.0.0"


def quoted(address: str) -> str:
    """An address as an RFC 5321 path; a stored local part, as QMQP's, has no quotes. A path of more
    than _LONGEST_PATH characters is cut."""
    local, at, domain = escaped(address, _LONGEST_PATH).rpartition("@")
    if at and not _ATOMS.fullmatch(local):
        local = '"' + re.sub(r'(["\\])', r"\\\1", local) + '"'
    return escaped(local + at + domain, _LONGEST_PATH)


def _addressed(field: str, address: str) -> str:
    """A field that ends in an address, folded before it if it does not fit into one line."""
    path = quoted(address)
    gap = " " if len(field) + len(path) < _LONGEST_PATH else "\n "
    return field + gap + path


def compose(
    dsn_id: str,
    hostname: str,
    now: datetime,
    original: Original,
    failures: Sequence[Failure],
    content: bytes | None,
    *,
    full: bool,
    left_out: str = "",
) -> bytes:
    """The whole DSN, lines ending in LF.

    `content`: the original (or, unless `full`, its header); None if it cannot be read. `left_out`:
    a sentence that says which part of the original is missing, and why.
    """
    delayed = all(failure.kind is Kind.DELAYED for failure in failures)
    text = _text(hostname, original, failures, left_out, delayed=delayed)
    parts = [
        (_TEXT, text.encode("ascii")),
        (_STATUS_PART, _report(hostname, original, failures).encode("ascii")),
    ]
    if content is not None:
        parts.append(("message/rfc822" if full else _HEADERS, content))
    subject = "Undelivered mail returned to sender"
    if delayed:
        subject = "Delayed mail (still being retried)"
    elif all(failure.possibly_delivered for failure in failures):
        subject = "Mail that may not have been delivered"
    date = format_datetime(now)
    message_id = original.header_message_id
    head = _lines(
        f"Received: by {hostname} (qmqp-relay) id {dsn_id};\n\t{date}",
        f"Date: {date}",
        f"From: Mail Delivery System <MAILER-DAEMON@{hostname}>",
        _addressed("To:", original.sender),
        f"Subject: {subject}",
        f"Message-ID: <{dsn_id}@{hostname}>",
        message_id and f"References: {escaped(message_id, _LONGEST_LINE)}",
        "Auto-Submitted: auto-replied",
        "MIME-Version: 1.0",
        f'Content-Type: multipart/report; report-type=delivery-status;\n\tboundary="=_{dsn_id}"',
    )
    head += "" if content is None or content.isascii() else _8BIT
    head += "\n\nThis is a MIME-encapsulated message.\n"
    return _joined(dsn_id, head.encode("ascii"), parts)


def reduced(wire: bytes, dsn_id: str, new_id: str, content: Enclosure) -> bytes:
    """The DSN `dsn_id`, whose text is `wire`, as the DSN `new_id` that encloses no more than
    `content` of the original.

    Raises ValueError if `wire` is not a DSN of this relay.
    """
    # The original cannot contain the boundary: it was received before the id in the boundary was
    # made.
    wire = wire.removesuffix(f"\n--=_{dsn_id}--\n".encode())
    head, *parts_before = wire.split(f"\n--=_{dsn_id}\n".encode(), 3)
    text, report, *originals = (part.partition(b"\n\n")[2] for part in parts_before)
    before, label, after = text.rpartition(b"\nQueue id:")
    text = before + label + after.partition(b"\n")[0]
    left_out = "\n".join(["", "", *textwrap.wrap(_REDUCED[content], 76), ""])
    parts = [(_TEXT, text + left_out.encode("ascii")), (_STATUS_PART, report)]
    if content is Enclosure.HEADER:
        parts.append((_HEADERS, originals[0].partition(b"\n\n")[0] + b"\n"))
    if all(body.isascii() for _, body in parts):
        head = head.replace(_8BIT.encode("ascii"), b"")
    return _joined(new_id, head.replace(dsn_id.encode("ascii"), new_id.encode("ascii")), parts)


def _joined(dsn_id: str, head: bytes, parts: Sequence[tuple[str, bytes]]) -> bytes:
    """A DSN from its header and its parts, each a type and a body."""
    pieces = [head]
    for kind, body in parts:
        encoding = "" if body.isascii() else _8BIT
        pieces.append(f"\n--=_{dsn_id}\nContent-Type: {kind}{encoding}\n\n".encode() + body)
    return b"".join(pieces) + f"\n--=_{dsn_id}--\n".encode()


def _text(
    hostname: str, original: Original, failures: Sequence[Failure], left_out: str, *, delayed: bool
) -> str:
    """The part for people."""
    opening = "Your message could not be delivered to the recipients below"
    if delayed:
        opening = (
            "Your message could not be delivered yet. It is still being retried; you need not send"
            " it again."
        )
    elif any(failure.possibly_delivered for failure in failures):
        opening += ", or the relay cannot know whether it was. It will not be tried again for them."
    else:
        opening += ". It will not be tried again for them."
    lines = [f"This is the mail relay at {hostname}.", "", *textwrap.wrap(opening, 76), ""]
    for failure in failures:
        why = _why(failure) + (f" {POSSIBLY_DELIVERED}" if failure.possibly_delivered else "")
        indented = textwrap.wrap(why, 72, initial_indent="    ", subsequent_indent="    ")
        lines += [f"<{quoted(failure.address)}>", *indented, ""]
    lines += [
        f"Received here: {format_datetime(original.received_at)}",
        f"Queue id:      {original.id}",
        "",
    ]
    if left_out:  # stands last: `reduced` replaces it
        lines += [*textwrap.wrap(left_out, 76), ""]
    return "\n".join(lines)


def _why(failure: Failure) -> str:
    """The state of one recipient in one or two sentences."""
    server_reply, ours = escaped(failure.server_reply, 1000), escaped(failure.reply, 1000)
    if failure.bounced_by_operator:
        reason = ours.removeprefix(BY_OPERATOR) or "."
        return f"An operator of this relay bounced it{reason}"
    if failure.unsendable:
        return "It was not sent: no mail server can be given this address."
    if failure.kind is Kind.BOUNCED:
        return (
            f"The mail server rejected it: {server_reply}"
            if server_reply
            else "The mail server rejected it and gave no reason."
        )
    if server_reply:
        last = f"The last reply was: {server_reply}"
    elif failure.outcome is None:
        last = "It has not been tried yet."
    else:
        last = "The last attempt failed" + (
            f": {ours}" if ours and failure.reason_source != ReasonSource.OPERATOR else "."
        )
    if failure.kind is Kind.DELAYED:
        return f"Retried until {format_datetime(failure.expires_at)}. {last}"
    what = "No server confirmed it" if failure.possibly_delivered else "It could not be delivered"
    return f"{what} in time. {last}"


def _report(hostname: str, original: Original, failures: Sequence[Failure]) -> str:
    """The part for programs (RFC 3464 2): a group about the message, and one about each
    recipient."""
    envid = original.envid and unxtext(original.envid)
    groups = [
        _lines(
            envid and f"Original-Envelope-Id: {envid}",
            f"Reporting-MTA: dns; {hostname}",
            f"Arrival-Date: {format_datetime(original.received_at)}",
        )
    ]
    for failure in failures:
        delayed = failure.kind is Kind.DELAYED
        kind, given, address = (failure.orcpt or "").partition(";")
        server = failure.server or "unix:"
        reply = escaped(failure.server_reply, _LONGEST_LINE - 50)
        attempted_at = failure.attempted_at
        # The relay's reason for an envelope that cannot be sent has a status. An operator may write
        # any number into a reason.
        status = status_of(
            failure.kind, failure.reply if failure.unsendable else failure.server_reply
        )
        groups.append(
            _lines(
                given and f"Original-Recipient: {escaped(kind, 64)}; {unxtext(address)}",
                _addressed("Final-Recipient: rfc822;", failure.address),
                f"Action: {'delayed' if delayed else 'failed'}",
                f"Status: {status}",
                not server.startswith("unix:") and f"Remote-MTA: dns; {server.rpartition(':')[0]}",
                reply and f"Diagnostic-Code: x-qmqp; {reply}",
                attempted_at and f"Last-Attempt-Date: {format_datetime(attempted_at)}",
                delayed and f"Will-Retry-Until: {format_datetime(failure.expires_at)}",
            )
        )
    return "\n\n".join(groups) + "\n"


def _lines(*lines: object) -> str:
    """Those of the values that are text and not empty, as lines."""
    return "\n".join(line for line in lines if isinstance(line, str) and line)
