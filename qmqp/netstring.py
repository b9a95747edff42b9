"""Netstrings: `5:hello,`, a length in decimal digits, a colon, that many bytes, a comma.

The encoder only knows bytes: a str has no length on the wire until it is encoded, and guessing is
how lengths go wrong.

The decoder is strict, as the text of 1997 is: digits only, no sign, no space, no leading zero
except for the empty string itself. It never trusts a length: more digits than any reader must
accept (999,999,999) are refused at the tenth, before anything is allocated, and a length above the
reader's own limit is refused when it is announced, not when it has been received. What is not a
netstring fails at its first wrong byte, so that a peer that speaks another protocol is found out at
once rather than waited for. However the bytes are cut up on their way, the result is the same.
"""

MAX_LENGTH = 999_999_999
"""The longest string every reader must take (netstrings.txt section 3)."""

_MAX_DIGITS = len(str(MAX_LENGTH))


class NetstringError(ValueError):
    """What was read is no netstring that this reader takes."""


class FormatError(NetstringError):
    """A byte stands where the format allows it in no netstring."""


class SizeError(NetstringError):
    """A well-formed length is more than this reader takes."""


class TruncatedError(NetstringError):
    """The stream ended inside a netstring."""


def encode(data: bytes) -> bytes:
    """Return `data` as a netstring. TypeError for a str."""
    return b"%d:%b," % (len(data), data)


def length_of(size: int) -> int:
    """How many bytes a netstring of `size` bytes takes on the wire."""
    return len(str(size)) + size + 2


def read_length(data: bytes, start: int = 0, limit: int = MAX_LENGTH) -> tuple[int, int] | None:
    """Read the length that begins at `start`: (length, index of the first byte after the colon).

    None while every byte that is there may begin a length and the colon has not come yet, which can
    last for nine bytes at most. Raises FormatError, or SizeError above `limit` or MAX_LENGTH."""
    colon = data.find(b":", start, start + _MAX_DIGITS + 1)
    digits = data[start:colon] if colon >= 0 else data[start : start + _MAX_DIGITS + 1]
    if not digits:
        if colon >= 0:
            raise FormatError("a length without digits")
        return None
    if not digits.isdigit():
        raise FormatError("a byte that is no digit in a length")
    if digits[0] == 0x30 and len(digits) > 1:
        raise FormatError("a length with a leading zero")
    if len(digits) > _MAX_DIGITS:
        raise SizeError(f"a length of more than {_MAX_DIGITS} digits")
    if colon < 0:
        return None
    length = int(digits)
    if length > limit:
        raise SizeError(f"{length} bytes where at most {limit} are taken")
    return length, colon + 1


class Decoder:
    """Turns a stream, however it is cut up, into the strings it holds, each whole: for strings that
    fit into memory.

    `limit` bounds each string. After an error the decoder is of no more use.
    """

    __slots__ = ("_buffer", "limit")

    def __init__(self, limit: int = MAX_LENGTH) -> None:
        self.limit = limit
        self._buffer = bytearray()

    @property
    def rest(self) -> bytes:
        """The bytes of a netstring that has begun and not ended."""
        return bytes(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes of the stream; return the strings they completed. Raises FormatError,
        SizeError."""
        self._buffer += data
        strings, position = [], 0
        while found := read_length(
            bytes(self._buffer[position : position + _MAX_DIGITS + 1]), 0, self.limit
        ):
            begin = position + found[1]
            end = begin + found[0]
            if len(self._buffer) <= end:
                break
            if self._buffer[end] != 0x2C:
                raise FormatError("no comma where the length says the string ends")
            strings.append(bytes(self._buffer[begin:end]))
            position = end + 1
        del self._buffer[:position]
        return strings

    def eof(self) -> None:
        """The stream has ended. Raises TruncatedError if that was inside a netstring."""
        if self._buffer:
            raise TruncatedError(f"the stream ended after {len(self._buffer)} bytes of a netstring")
