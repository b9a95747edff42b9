"""Netstrings: `5:hello,` is a length in decimal digits, a colon, that many bytes, and a comma.

The encoder takes bytes only: a str has no length on the wire until it is encoded.

The decoder is as strict as netstrings.txt: a length has digits only, without a sign, a space or a
leading zero (`0` itself excepted). It never trusts a length. The tenth digit is refused before
anything is allocated, because no reader must accept more than 999,999,999 bytes. A length above the
reader's own limit is refused when it is announced. A peer of another protocol fails at its first
wrong byte, so the reader does not wait for more. The result does not depend on how the bytes are
cut.
"""

MAX_LENGTH = 999_999_999  # the longest string that every reader must accept (netstrings.txt, 3)

_MAX_DIGITS = len(str(MAX_LENGTH))


class NetstringError(ValueError):
    """The bytes are not a netstring that this reader accepts."""


class FormatError(NetstringError):
    """A byte stands where no netstring has it."""


class SizeError(NetstringError):
    """The length is well formed, but larger than this reader accepts."""


def encode(data: bytes) -> bytes:
    """Return `data` as a netstring. Raises TypeError for a str."""
    return b"%d:%b," % (len(data), data)


def length_of(size: int) -> int:
    """The number of bytes on the wire of a netstring that holds `size` bytes."""
    return len(str(size)) + size + 2


def read_length(data: bytes, limit: int = MAX_LENGTH) -> tuple[int, int] | None:
    """Read the length that `data` begins with: (length, index of the first byte after the colon).

    None while the colon is missing and all bytes may begin a length: at most nine bytes can. Raises
    FormatError, and SizeError above `limit` or MAX_LENGTH."""
    digits, colon, _ = data[: _MAX_DIGITS + 1].partition(b":")
    if not digits.isdigit() and (digits or colon):
        wrong = "a byte that is no digit in a length" if digits else "a length without digits"
        raise FormatError(wrong)
    if digits.startswith(b"0") and len(digits) > 1:
        raise FormatError("a length with a leading zero")
    if len(digits) > _MAX_DIGITS:
        raise SizeError(f"a length of more than {_MAX_DIGITS} digits")
    if not colon:
        return None
    if (length := int(digits)) > limit:
        raise SizeError(f"{length} bytes where at most {limit} are taken")
    return length, len(digits) + 1
