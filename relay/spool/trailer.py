"""The trailer of a body file: the envelope of the message, and checksums of both.

A body file is the body, the envelope as `relay.queue.accept` encodes it, and a block of fixed size
at the end: magic, version, size and CRC-32 of the body, size and CRC-32 of the envelope, and the
CRC-32 of these fields. So a worker notices damage before the commit point, and `fsck --rebuild`
makes the rows of a message again from its file. Files of earlier versions have no trailer.

What must stay true: a trailer is written before the file is synced; the checksum of a body is the
plain CRC-32 of its octets, which `qmqp.body` compares.
"""

import os
import struct
from typing import NamedTuple

from isal.isal_zlib import crc32  # zlib's takes seven times as long

_FIELDS = struct.Struct("<8sBQIII")
_CRC = struct.Struct("<I")
_MAGIC = b"QMQPbody"
_VERSION = 1
FIXED_SIZE = _FIELDS.size + _CRC.size
"""Octets behind the envelope."""


class BodyTrailer(NamedTuple):
    """Size and CRC-32 of the body; size and CRC-32 of the envelope that follows it."""

    size: int
    checksum: int
    envelope_size: int
    envelope_checksum: int

    @property
    def file_size(self) -> int:
        """The size of the whole file."""
        return self.size + self.envelope_size + FIXED_SIZE


def encode_trailer(size: int, checksum: int, envelope: bytes) -> bytes:
    """The octets behind a body of this size and CRC-32."""
    fields = _FIELDS.pack(_MAGIC, _VERSION, size, checksum, len(envelope), crc32(envelope))
    return envelope + fields + _CRC.pack(crc32(fields))


def read_trailer(fd: int) -> BodyTrailer | None:
    """The trailer of an open file of any size; None without a valid one. Raises OSError."""
    size = os.fstat(fd).st_size
    if size < FIXED_SIZE:
        return None
    octets = os.pread(fd, FIXED_SIZE, size - FIXED_SIZE)
    fields = octets[: _FIELDS.size]
    if len(octets) < FIXED_SIZE or _CRC.unpack_from(octets, _FIELDS.size) != (crc32(fields),):
        return None
    magic, version, *values = _FIELDS.unpack(fields)
    trailer = BodyTrailer(*values)
    valid = (magic, version, trailer.file_size) == (_MAGIC, _VERSION, size)
    return trailer if valid else None


def read_envelope(fd: int, trailer: BodyTrailer) -> bytes | None:
    """The envelope of a file; None if it does not verify. Raises OSError."""
    envelope = os.pread(fd, trailer.envelope_size, trailer.size)
    return envelope if crc32(envelope) == trailer.envelope_checksum else None
