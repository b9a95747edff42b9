"""The decoder of content: from dotted CRLF lines to the LF text that QMQP carries.

A block is searched and translated whole, in C, never line by line. Bytes that may begin the end
(`CR LF . CR LF`, cut anywhere) wait in a carry of at most four bytes for the next block. The carry
starts as CR LF, so that the first line is like every other; the LF that this yields is dropped.

Only <CRLF>.<CRLF> ends a message (RFC 5321, 4.1.1.4). Content with a bare CR or LF is read to its
real end and refused, because the stored form could not tell it from a line end (SMTP smuggling). So
is content that is too large or loops. After a fault nothing is decoded, only the end is searched.
"""

from enum import Enum
from io import IncrementalNewlineDecoder

from reception import envelope
from reception.header import MAX_RECEIVED, HeaderScanner

_END = b"\r\n.\r\n"
_PARTIAL_ENDS = (b"\r\n.\r", b"\r\n.", b"\r\n", b"\r")


class Fault(Enum):
    """Why content is refused: the reply to its end."""

    BARE = "550 5.6.11 Message contains a bare CR or LF"
    TOO_BIG = envelope.TOO_BIG
    LOOP = envelope.LOOP


class Content:
    """Decodes one message.

    `limit` is in octets as SMTP counts them: a line end has two, stuffed dots and the end have
    none. `strip_cr` drops bare CRs, which count towards the limit, for clients that send CR CR LF.
    The end and the stuffed dots are searched before that, in the bytes as they came, so stripping
    makes neither. A CR before a LF stays, so stripping never hides a bare LF, which is refused.

    `fault`, `octets` and `header` are final when `feed` has returned a rest.
    """

    __slots__ = (
        "_carry",
        "_limit",
        "_started",
        "_strip_cr",
        "fault",
        "header",
        "octets",
    )

    def __init__(self, limit: int, *, strip_cr: bool = False) -> None:
        self.fault: Fault | None = None
        self.octets = -2
        self.header = HeaderScanner()
        self._limit = limit
        self._strip_cr = strip_cr
        self._carry = b"\r\n"
        self._started = False

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        """Takes bytes from the network; returns the decoded text, and the bytes after the end (None
        if the end has not come)."""
        block = self._carry + data
        rest = None
        dot = block.find(b"\r\n.")
        end = block.find(_END, dot) if dot >= 0 else -1
        if end >= 0:
            rest = block[end + 5 :]
            block = block[: end + 2]
        else:
            self._carry = next(filter(block.endswith, _PARTIAL_ENDS), b"")
            block = block.removesuffix(self._carry)
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
        if not self._started:
            self._started = True
            text = text[1:]
        if not self.header.complete:
            self.header.feed(text)
            if self.header.received > MAX_RECEIVED:
                self.fault = Fault.LOOP
                return b""
        return text
