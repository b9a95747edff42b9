"""Notices: what a sender is told about mail that could not be delivered, or not yet (RFC 3461,
3464, 6522, 3834).

A notice is a message from the null sender: words for people, a `message/delivery-status` for
programs, and the original or its header. This module only writes the text; when one is owed, and
that it is made exactly once, is `relay.dsn.generator`.

A server may refuse a notice for what it encloses. `reduced` makes it again from its own text, with
less of the original, which is gone from the spool by then.

Two things it is careful about. When a try ended without an answer nobody knows whether the message
arrived: it says so, and not that it could not be delivered. And what we say of a server is not what
the server said: only its own words become a `Diagnostic-Code`, ours are for people, and an
operator's name is for nobody.

What must stay true: the server's words are quoted as printable ASCII in bounded lines and can add
neither a line nor a header of their own; nothing is ever said about a notice (the null sender, and
qmail's `#@[]`).
"""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from email.utils import format_datetime
from enum import StrEnum

from qmqp.result import Outcome
from relay.log import escaped
from relay.queue.states import ReasonSource

_STATUS = re.compile(r"(?<![\d.])(?:#\s?)?([245])\.(\d{1,3})\.(\d{1,3})(?!\.?\d)")
_HEX = re.compile(r"\+([0-9A-F]{2})")
BY_OPERATOR = "bounced by an operator"  # how the reason of such a bounce begins
POSSIBLY_DELIVERED = "It may have arrived all the same: all of it was sent to a server once, and no valid answer came."
_EIGHT = "\nContent-Transfer-Encoding: 8bit"
_TEXT, _STATUS_PART, _HEADERS = (
    "text/plain; charset=us-ascii",
    "message/delivery-status",
    "text/rfc822-headers",
)
_LINE = 900  # of a header, well below RFC 5322's 998


class Kind(StrEnum):
    """What a notice is about."""

    BOUNCED = "bounced"
    EXPIRED = "expired"
    DELAYED = "delayed"


class Enclosure(StrEnum):
    """What a notice encloses of the original (`messages.dsn_content`)."""

    FULL = "full"
    HEADER = "header"
    NONE = "none"

    @property
    def less(self) -> "Enclosure | None":
        """What a notice encloses that is made again because this was refused; None if nothing is
        left to drop."""
        return {Enclosure.FULL: Enclosure.HEADER, Enclosure.HEADER: Enclosure.NONE}.get(self)


class Withheld(StrEnum):
    """Why a sender gets no notice that is due (`deliveries.dsn_withheld`)."""

    RATE = "rate"
    POSTMASTER = "postmaster"
    ADDRESS = "address"


_REDUCED = {
    Enclosure.HEADER: "Only its header is returned: a mail server refused this notice with the whole message.",
    Enclosure.NONE: "Your message is not returned: a mail server refused this notice with its header.",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """One recipient that a notice is about, and the last that is known of its delivery.

    `outcome`: of the last try, None if there was none; `reply`: why the delivery is where it is, and
    `reason_source` says whose text that is; `doubt`: some try of it ended so that it may have arrived.
    """

    address: str
    orcpt: str | None
    kind: Kind
    reply: str
    server: str | None
    attempted_at: datetime | None
    expires_at: datetime
    outcome: str | None
    reason_source: str | None
    doubt: bool = False

    @property
    def server_reply(self) -> str:
        """The server's reply; empty if the text is not a server's."""
        return self.reply if self.reason_source == ReasonSource.SERVER else ""

    @property
    def bounced_by_operator(self) -> bool:
        """Whether an operator bounced it, and not a server."""
        return self.kind is Kind.BOUNCED and self.reason_source == ReasonSource.OPERATOR


@dataclass(frozen=True, slots=True)
class Original:
    """The message that a notice is about."""

    id: str
    sender: str
    received_at: datetime
    header_message_id: str | None
    envid: str | None


def unxtext(text: str) -> str:
    """Decode xtext (RFC 3461 4), as one line of printable ASCII."""
    return escaped(
        _HEX.sub(lambda found: chr(int(found[1], 16)), text).encode("latin-1", "replace"), _LINE
    )


def status_of(kind: Kind, reply: str) -> str:
    """The enhanced status code (RFC 3463): the server's own if its class fits, else the
    plainest."""
    if kind is Kind.EXPIRED:
        return "5.4.7"
    wanted = "5" if kind is Kind.BOUNCED else "4"
    found = next((f for f in _STATUS.finditer(reply) if f[1] == wanted), None)
    return f"{found[1]}.{int(found[2])}.{int(found[3])}" if found else f"{wanted}.0.0"


def quoted(address: str) -> str:
    """A stored address as a mail path spells it: QMQP's local parts are bare, RFC 5321's may need
    quotes."""
    address = escaped(address, _LINE)
    local, at, domain = address.rpartition("@")
    if not at or re.fullmatch(
        r"[\w!#$%&'*+/=?^`{|}~-]+(\.[\w!#$%&'*+/=?^`{|}~-]+)*", local, re.ASCII
    ):
        return address
    return '"' + re.sub(r'(["\\])', r"\\\1", local) + '"@' + domain


def compose(
    notice_id: str,
    hostname: str,
    now: datetime,
    original: Original,
    failures: Sequence[Failure],
    content: bytes | None,
    *,
    full: bool,
    left_out: str = "",
) -> bytes:
    """The whole notice in LF form.

    `content`: the original (or, unless `full`, its header); None if it is not there. `left_out`:
    what is said of what is not returned.
    """
    delayed = all(failure.kind is Kind.DELAYED for failure in failures)
    words = _words(hostname, original, failures, left_out, delayed=delayed)
    parts = [
        (_TEXT, words.encode("ascii")),
        (_STATUS_PART, _report(hostname, original, failures).encode("ascii")),
    ]
    if content is not None:
        parts.append(("message/rfc822" if full else _HEADERS, content))
    eight = content is not None and not content.isascii()
    subject = "Undelivered mail returned to sender"
    if delayed:
        subject = "Delayed mail (still being retried)"
    elif all(failure.doubt for failure in failures):
        subject = "Mail that may not have been delivered"
    return _joined(
        notice_id,
        _header(notice_id, hostname, now, original, subject, eight=eight).encode("ascii"),
        parts,
    )


def reduced(wire: bytes, notice_id: str, new_id: str, content: Enclosure) -> bytes:
    """The notice `notice_id`, whose text is `wire`, as another one that encloses `content` of the
    original and no more.

    Raises ValueError if `wire` is no notice of ours.
    """
    # The original cannot hold the boundary: it came before the id was made that the boundary
    # consists of.
    pieces = wire.removesuffix(f"\n--=_{notice_id}--\n".encode()).split(
        f"\n--=_{notice_id}\n".encode(), 3
    )
    head, words, report, *originals = (
        pieces[0],
        *(piece.partition(b"\n\n")[2] for piece in pieces[1:]),
    )
    told, last, number = words.rpartition(b"\nQueue id:")
    left_out = "\n".join(["", "", *textwrap.wrap(_REDUCED[content], 76), ""]).encode("ascii")
    parts = [(_TEXT, told + last + number.partition(b"\n")[0] + left_out), (_STATUS_PART, report)]
    if content is Enclosure.HEADER:
        parts.append((_HEADERS, originals[0].partition(b"\n\n")[0] + b"\n"))
    if all(body.isascii() for _, body in parts):
        head = head.replace(_EIGHT.encode("ascii"), b"")
    return _joined(new_id, head.replace(notice_id.encode("ascii"), new_id.encode("ascii")), parts)


def _joined(notice_id: str, head: bytes, parts: Sequence[tuple[str, bytes]]) -> bytes:
    """A notice from its header and its parts, each a type and a body."""
    made = [head]
    for kind, body in parts:
        encoding = "" if body.isascii() else _EIGHT
        made.append(f"\n--=_{notice_id}\nContent-Type: {kind}{encoding}\n\n".encode() + body)
    return b"".join(made) + f"\n--=_{notice_id}--\n".encode()


def _header(
    notice_id: str, hostname: str, now: datetime, original: Original, subject: str, *, eight: bool
) -> str:
    date = format_datetime(now)
    lines = [
        f"Received: by {hostname} (qmqp-relay) id {notice_id};\n\t{date}",
        f"Date: {date}",
        f"From: Mail Delivery System <MAILER-DAEMON@{hostname}>",
        f"To: {quoted(original.sender)}",
        f"Subject: {subject}",
        f"Message-ID: <{notice_id}@{hostname}>",
        "Auto-Submitted: auto-replied",
        "MIME-Version: 1.0",
        f'Content-Type: multipart/report; report-type=delivery-status;\n\tboundary="=_{notice_id}"',
    ]
    if original.header_message_id:
        lines.insert(6, f"References: {escaped(original.header_message_id, _LINE)}")
    if eight:
        lines[-1] += _EIGHT
    return "\n".join([*lines, "", "This is a MIME-encapsulated message.", ""])


def _words(
    hostname: str, original: Original, failures: Sequence[Failure], left_out: str, *, delayed: bool
) -> str:
    if delayed:
        opening = "Your message could not be delivered yet. It is still being retried; you need not send it again."
    elif any(failure.doubt for failure in failures):
        opening = (
            "Your message could not be delivered to the recipients below, or nobody knows whether it was. It will not"
            " be tried again for them."
        )
    else:
        opening = "Your message could not be delivered to the recipients below. It will not be tried again for them."
    lines = [f"This is the mail relay at {hostname}.", "", *textwrap.wrap(opening, 76), ""]
    for failure in failures:
        why = f"{_why(failure)} {POSSIBLY_DELIVERED}" if failure.doubt else _why(failure)
        lines += [
            f"<{quoted(failure.address)}>",
            *textwrap.wrap(why, 72, initial_indent="    ", subsequent_indent="    "),
            "",
        ]
    lines += [
        f"Received here: {format_datetime(original.received_at)}",
        f"Queue id:      {original.id}",
        "",
    ]
    lines += (
        [*textwrap.wrap(left_out, 76), ""] if left_out else []
    )  # the last: `reduced` puts other words there
    return "\n".join(lines)


def _why(failure: Failure) -> str:
    """What happened to one recipient, in a sentence or two."""
    server_reply, ours = escaped(failure.server_reply, 1000), escaped(failure.reply, 1000)
    if failure.bounced_by_operator:
        reason = ours.removeprefix(BY_OPERATOR) or "."
        return f"It was sent back by an operator of this relay{reason}"
    if failure.kind is Kind.BOUNCED and failure.outcome == Outcome.UNSENDABLE:
        return "It was not sent: no mail server can be given this address."
    if failure.kind is Kind.BOUNCED:
        return (
            f"The mail server refused it: {server_reply}"
            if server_reply
            else "The mail server refused it and gave no reason."
        )
    if server_reply:
        last = f"The last thing heard was: {server_reply}"
    elif failure.outcome is None:
        last = "It was not tried yet."
    else:
        last = "The last try failed" + (
            f": {ours}" if ours and failure.reason_source != ReasonSource.OPERATOR else "."
        )
    if failure.kind is Kind.DELAYED:
        return f"Retried until {format_datetime(failure.expires_at)}. {last}"
    return (
        f"{'Nobody confirmed it' if failure.doubt else 'It could not be delivered'} in time. {last}"
    )


def _report(hostname: str, original: Original, failures: Sequence[Failure]) -> str:
    """The machine-readable part (RFC 3464 2): a group about the message, one about each
    recipient."""
    about = [
        f"Reporting-MTA: dns; {hostname}",
        f"Arrival-Date: {format_datetime(original.received_at)}",
    ]
    if original.envid:
        about.insert(0, f"Original-Envelope-Id: {unxtext(original.envid)}")
    groups = ["\n".join(about)]
    for failure in failures:
        lines = [f"Final-Recipient: rfc822; {quoted(failure.address)}"]
        if failure.orcpt and ";" in failure.orcpt:
            kind, _, address = failure.orcpt.partition(";")
            lines.insert(0, f"Original-Recipient: {escaped(kind, 64)}; {unxtext(address)}")
        lines.append(f"Action: {'delayed' if failure.kind is Kind.DELAYED else 'failed'}")
        lines.append(f"Status: {status_of(failure.kind, failure.reply)}")
        if failure.server and not failure.server.startswith("unix:"):
            lines.append(f"Remote-MTA: dns; {failure.server.rpartition(':')[0]}")
        if failure.server_reply:
            lines.append(f"Diagnostic-Code: x-qmqp; {escaped(failure.server_reply, _LINE - 50)}")
        if failure.attempted_at:
            lines.append(f"Last-Attempt-Date: {format_datetime(failure.attempted_at)}")
        if failure.kind is Kind.DELAYED:
            lines.append(f"Will-Retry-Until: {format_datetime(failure.expires_at)}")
        groups.append("\n".join(lines))
    return "\n\n".join(groups) + "\n"
