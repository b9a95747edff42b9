"""A request as bytes, without any I/O.

`Request` knows the whole length before the first byte is sent, so that a client can stream a
message of any size from a file: a head, `size` bytes of the message, a tail. The last byte of the
tail is the commit point. It refuses addresses that some server would misread.

qmqp/reader.py is the other side.
"""

import re
from collections.abc import Sequence

from qmqp.netstring import length_of

# Every server accepts an address of this length: qmail-qmqpd refuses 1,000 bytes, Postfix 2,049.
MAX_ADDRESS = 999

_SENDABLE = re.compile(rb"[^\0\r\n<][^\0\r\n]{0,%d}" % (MAX_ADDRESS - 1)).fullmatch


def is_sendable(address: bytes) -> bool:
    """Whether every server reads this address as it was meant, as a recipient or as a sender. (The
    null sender is empty, and valid as a sender only.)

    Some would misread NUL, CR or LF (Postfix delivers to what stands before a NUL), a leading angle
    bracket, and more than MAX_ADDRESS bytes."""
    return _SENDABLE(address) is not None


class Request:
    """A message with a body of `size` bytes to `recipients` from `sender` (empty: the null sender).

    On the wire it is `head`, then the `size` bytes of the body, then `tail`; `length` bytes in all.
    The message is `prefix`, with which `head` ends, and the body. Raises ValueError for a negative
    size, an address that is not sendable, and a request without a recipient (qmail-qmqpd accepts
    and discards it, Postfix refuses it).
    """

    __slots__ = ("head", "length", "size", "tail")

    def __init__(
        self, size: int, sender: bytes, recipients: Sequence[bytes], prefix: bytes = b""
    ) -> None:
        if size < 0:
            raise ValueError(f"a message of {size} bytes")
        if not recipients:
            raise ValueError("a request needs a recipient")
        if sender and not is_sendable(sender):
            raise ValueError(f"no server can be trusted with the sender {_shown(sender)}")
        for recipient in recipients:
            if not is_sendable(recipient):
                raise ValueError(f"no server can be trusted with the recipient {_shown(recipient)}")
        envelope = b"".join(
            [b"%d:%b," % (len(address), address) for address in (sender, *recipients)]
        )
        self.size = size
        whole = len(prefix) + size
        self.head = b"%d:%d:%b" % (length_of(whole) + len(envelope), whole, prefix)
        self.tail = b",%b," % envelope
        self.length = len(self.head) + size + len(self.tail)


def _shown(address: bytes) -> str:
    """The beginning of an address; bytes that cannot be printed are `\\xNN`."""
    return repr(address[:80])[2:-1] or "<>"
