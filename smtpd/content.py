"""What follows DATA: from SMTP's dotted CRLF lines to the LF text that QMQP carries, a block at a
time.

Nothing here goes line by line: a block is searched and translated whole, in C. Bytes that may be
the beginning of the end (`CR LF . CR LF`, cut anywhere) wait in a carry of at most four bytes for
the next block. The first line is made like every other by a carry that starts as CR LF; the LF that
this yields is taken off again.

Only <CRLF>.<CRLF> ends a message (RFC 5321, 4.1.1.4). A CR or LF on its own is never taken for a
line end, neither here nor by the next hop: LF alone is the line end of the stored form, so a bare
one could not be told from a real one (that is how mail is smuggled), and turning CRLF into LF would
not be reversible. Such content is read to its real end and refused. So is content over the limit
and content that has been through too many hops; from the first fault on nothing is decoded any
more, only the end is looked for, and the session stays in step with its client.

Bare CRs may be stripped instead (`strip_cr`), for clients that send CR CR LF. The end and the
stuffed dots are found first, on the bytes as they came: `CR LF . CR CR LF` and `CR LF CR . CR LF`
are no ends, although they look like one without the bare CR, and the dot of the latter is no
stuffed one. A CR before a LF always stays, so stripping can neither make nor hide a bare LF, which
is refused all the same.
"""

import re
from enum import Enum
from io import IncrementalNewlineDecoder

MAX_RECEIVED = 100
"""Trace fields a message may carry (RFC 5321, 6.3: at least 100)."""

_END = b"\r\n.\r\n"
_BEGINNINGS = (b"\r\n.\r", b"\r\n.", b"\r\n", b"\r")
_MESSAGE_ID = re.compile(rb"(?i)\nmessage-id:(?:\n?[ \t])*(<[!-;=?-~]{1,500}>)")
_KEPT_LINE = 1000


class Fault(Enum):
    """Why content is refused, as the reply that is due once its end has come."""

    BARE = b"550 5.6.11 Message contains a bare CR or LF\r\n"
    TOO_BIG = b"552 5.3.4 Message exceeds the size limit\r\n"
    LOOP = b"554 5.4.6 Too many hops, this mail is looping\r\n"


class Content:
    """Decodes one message. `limit` is in octets as SMTP counts them: line ends are two, stuffed
    dots and the end none. `strip_cr`: drop bare CRs (they count towards the limit).

    After the end (`feed` gave a rest): `fault`, `octets` and `header_message_id` (the header's,
    brackets included, at most 502 characters) are final.
    """

    __slots__ = ("_carry", "_header", "_limit", "_started", "_strip_cr", "fault", "octets")

    def __init__(self, limit: int, *, strip_cr: bool = False) -> None:
        self.fault: Fault | None = None
        self.octets = -2
        self._limit = limit
        self._strip_cr = strip_cr
        self._carry = b"\r\n"
        self._started = False
        self._header = HeaderScan()

    @property
    def header_message_id(self) -> str | None:
        return self._header.header_message_id

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        """Takes what came from the network; returns decoded text, and what came after the end
        (None: no end yet)."""
        block = self._carry + data
        rest = None
        dot = block.find(b"\r\n.")
        end = block.find(_END, dot) if dot >= 0 else -1
        if end >= 0:
            rest = block[end + 5 :]
            block = block[: end + 2]
        elif block.endswith(_BEGINNINGS):
            kept = next(len(beginning) for beginning in _BEGINNINGS if block.endswith(beginning))
            self._carry = block[-kept:]
            block = block[:-kept]
        else:
            self._carry = b""
        if self.fault is not None or not block:
            return b"", rest
        return self._decode(block, stuffed=dot >= 0), rest

    def _decode(self, block: bytes, *, stuffed: bool) -> bytes:
        if stuffed:
            block = block.replace(b"\r\n.", b"\r\n")
        lines = IncrementalNewlineDecoder(None, translate=True)
        text = lines.decode(block.decode("latin-1"), final=True).encode("latin-1")
        if lines.newlines not in (None, "\r\n"):
            if not self._strip_cr or block.count(b"\n") != block.count(b"\r\n"):
                self.fault = Fault.BARE
                return b""
            text = block.replace(b"\r\n", b"\n").replace(b"\r", b"")
        self.octets += len(block)
        if self.octets > self._limit:
            self.fault = Fault.TOO_BIG
            return b""
        if not self._started and text[1:2] in (b" ", b"\t"):
            self._header.complete = (
                True  # a first line that continues nothing: the receiver ends the header before it
            )
        if not self._header.complete:
            self._header.feed(text)
            if self._header.received > MAX_RECEIVED:
                self.fault = Fault.LOOP
                return b""
        if not self._started:
            self._started = True
            text = text[1:]
        return text


class HeaderScan:
    """Reads a header as it passes: counts Received fields, finds the Message-ID. Keeps one
    unfinished line, bounded.

    The text must begin with a LF that stands before the first line, so that every field is found as
    `LF name`.
    """

    __slots__ = ("_tail", "complete", "header_message_id", "received")

    def __init__(self) -> None:
        self.received = 0
        self.header_message_id: str | None = None
        self.complete = False
        self._tail = b""

    def feed(self, text: bytes) -> None:
        window = self._tail + text
        end = window.find(b"\n\n")
        self.complete = end >= 0
        # The last line may still grow: it is looked at when it is whole.
        cut = end if self.complete else window.rfind(b"\n")
        lines = window[:cut].lower()
        if self.header_message_id is None:
            at = lines.find(b"\nmessage-id:")
            if at >= 0:
                match = _MESSAGE_ID.match(window, at, end if self.complete else len(window))
                if match is not None:
                    self.header_message_id = match[1].decode("ascii")
                elif not self.complete and len(window) - at < _KEPT_LINE:
                    cut = at
                    lines = lines[:at]
        self.received += lines.count(b"\nreceived:")
        self._tail = window[cut : cut + _KEPT_LINE]
