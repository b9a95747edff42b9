"""The trace field that the relay puts before a message, and its separation from the content."""

import re
from email.utils import formatdate
from functools import lru_cache

from reception.envelope import Envelope

_MAX_PATH = 950  # octets in the trace field, whose lines have at most 998 (RFC 5322, 2.1.1)
_MAILBOX_LINES = re.compile(rb"(?:>*From [^\n]*\n?)+")
_UNPRINTABLE = re.compile(r"[^A-Za-z0-9.:_\[\]-]")


@lru_cache(maxsize=1)
def date(second: int) -> str:
    """A moment (seconds since the epoch) as RFC 5322 writes it, in this machine's zone."""
    return formatdate(second, localtime=True)


def received_field(
    envelope: Envelope, client: str, hostname: str, queue_id: str, when: str
) -> bytes:
    """The Received field (RFC 5321, 4.4) with LF line ends.

    It names the recipient of a message that has one. More names would disclose Bcc recipients. A
    client whose protocol has no greeting is named by its address alone.
    """
    literal = f"[IPv6:{client}]" if ":" in client else f"[{client}]"
    name = _UNPRINTABLE.sub("?", envelope.helo) or literal
    recipients = envelope.recipients
    single = len(recipients) == 1 and len(recipients[0].path) <= _MAX_PATH
    path = f"\n\tfor <{recipients[0].path}>; " if single else ";\n\t"
    tls = "\n\t(using {} with cipher {})".format(*envelope.tls.split()) if envelope.tls else ""
    return (
        f"Received: from {name} ({literal}){tls}\n"
        f"\tby {hostname} with {envelope.protocol} id {queue_id}{path}{when}\n"
    ).encode("ascii")


def separate(content: bytes) -> bytes:
    """Changes the beginning of a message's content (at least one block, or all of it) so that it
    can follow the trace field.

    Postfix' smtpd does the same. A first line that begins with a blank would continue the trace
    field (RFC 5322, 2.2.3), so an empty line ends the header before it. A line of a mailbox file
    (`From ann Mon Jan  1 ...`) is no field, so servers would end the header there and the client's
    header would become text: such lines become `X-Mailbox-Line` fields.
    """
    if content.startswith((b" ", b"\t")):
        return b"\n" + content
    match = _MAILBOX_LINES.match(content) if content.startswith((b"From ", b">")) else None
    if match is not None:
        return re.sub(rb"(?m)^(?=.)", b"X-Mailbox-Line: ", match[0]) + content[match.end() :]
    return content
