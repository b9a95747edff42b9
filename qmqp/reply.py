"""A reply as bytes: a netstring that begins with what became of the whole request.

    K   accepted: the server answers for every recipient, as RFC 1123 section 5.3.3 has it
    Z   not now: the same request may be sent again later
    D   never: no recipient got it

What follows the first byte is for people and may be any bytes: NUL, line ends, no charset (the text
of QMTP, section 5, about the same replies: "the client should be ready for arbitrary bytes"). A
reply is as long as the server likes, so what is kept of its text is bounded while what is accepted
is not: a long K is still a K, and who refuses it sends the message twice. An empty reply, another
first byte and anything that is no netstring is no verdict at all; a client must not look for the
first K, Z or D among the bytes (qmail-qmqpc.c does), as `SSH-2.0-OpenSSH_9.2p1 Debian` has one.
After its reply the server closes; what some send after it, a line feed for one, means nothing.
"""

from typing import NamedTuple

from qmqp.netstring import NetstringError, read_length

KEPT_TEXT = 4096
"""How much of a reply's text is kept, in bytes."""


class MalformedReply(ValueError):
    """A reply that is no netstring, is empty, or begins with none of K, Z, D. `received` is how it
    began."""

    def __init__(self, why: str, received: bytes) -> None:
        super().__init__(why)
        self.received = received


class Reply(NamedTuple):
    """What a server said: `status` is b"K", b"Z" or b"D"; `text` its words, of which KEPT_TEXT
    bytes are kept; `truncated` if the connection ended before the reply did."""

    status: bytes
    text: bytes
    truncated: bool = False


class ReplyParser:
    """Reads one reply, however it is cut up. `extra` counts the bytes that came after it, which
    mean nothing."""

    __slots__ = ("_kept", "_left", "_reply", "extra")

    def __init__(self) -> None:
        self._kept = b""
        self._left = -1
        self._reply: Reply | None = None
        self.extra = 0

    @property
    def received(self) -> bytes:
        """How the reply began, as far as it is kept."""
        return self._kept

    def feed(self, data: bytes) -> Reply | None:
        """Take the next bytes; return the reply once it is whole. Raises MalformedReply at the
        first byte that is wrong."""
        if self._reply is not None:
            self.extra += len(data)
            return self._reply
        if self._left < 0:
            data = self._kept + data
            self._kept = data[:KEPT_TEXT]
            try:
                found = read_length(data)
            except NetstringError as error:
                raise MalformedReply(str(error), self._kept) from None
            if found is None:
                return None
            self._left, begin = found
            data = data[begin:]
            self._kept = b""
            if not self._left:
                raise MalformedReply("an empty reply", b"0:")
        piece = data[: self._left]
        if len(self._kept) <= KEPT_TEXT:
            self._kept += piece[: KEPT_TEXT + 1 - len(self._kept)]
        if self._kept and self._kept[0] not in b"KZD":
            raise MalformedReply("a reply that begins with none of K, Z, D", self._kept)
        self._left -= len(piece)
        if self._left or len(data) == len(piece):
            return None
        if data[len(piece)] != 0x2C:
            raise MalformedReply("a reply that does not end with a comma", self._kept)
        self.extra = len(data) - len(piece) - 1
        self._reply = Reply(self._kept[:1], self._kept[1:])
        return self._reply

    def eof(self) -> Reply | None:
        """The stream has ended: the part of a reply that came, marked truncated, if its status byte
        stood after a valid length; else None."""
        if self._left < 0 or not self._kept:
            return None
        return Reply(self._kept[:1], self._kept[1:], truncated=True)
