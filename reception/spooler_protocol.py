"""The protocol between smtpd and its spooler: requests one way, replies the other, in frames.

A frame is a length (four bytes in this machine's order) and a pickle. Pickle is safe here: both
ends are this program, on a socket pair that no other process has.
"""

import pickle
import struct
from typing import Any, NamedTuple

from relay.queue.accept import NewMessage, NewRecipient

_LENGTH = struct.Struct("=I")
FIELDS = (NewMessage._fields, NewRecipient._fields)
"""What the tuples of a request mean. A spooler of another version refuses to start."""


class StoreRequest(NamedTuple):
    """Asks to store a message before `deadline` (monotonic), and its body unless that is synced
    already (None)."""

    number: int
    message: NewMessage
    body: list[bytes] | None
    deadline: float

    def encode(self) -> bytes:
        """The frame of this request. Plain tuples pickle ten times as fast as named ones."""
        recipients = [tuple(recipient) for recipient in self.message.recipients]
        fields = (*self.message[:3], recipients, *self.message[4:])
        return frame((self.number, fields, self.body, self.deadline))

    @classmethod
    def decode(
        cls, number: int, fields: tuple[Any, ...], body: list[bytes] | None, deadline: float
    ) -> "StoreRequest":
        """The request whose frame held these values."""
        queue_id, sender, size, rows, *rest = fields
        recipients = [NewRecipient(*row) for row in rows]
        return cls(number, NewMessage(queue_id, sender, size, recipients, *rest), body, deadline)


def cancellation(number: int) -> bytes:
    """The frame that cancels the request of this number."""
    return frame((number,))


class BatchReply(NamedTuple):
    """The results of a batch by the requests' numbers (None: stored), and the seconds that its
    COMMIT took.

    The first reply of a spooler has no results: the spooler has started.
    """

    results: list[tuple[int, Exception | None]]
    seconds: float


class Cancelled(Exception):
    """The request was cancelled in time: nothing was stored."""


class RowRefused(Exception):
    """The database refused the row or was away. The body was removed."""


def frame(value: object) -> bytes:
    """A value as it crosses the socket."""
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(data)) + data


class FrameDecoder:
    """Decodes a stream of frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The values whose frames are complete with these bytes."""
        buffer = self._buffer
        buffer += data
        values: list[Any] = []
        while len(buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
            if len(buffer) < end:
                break
            values.append(pickle.loads(buffer[_LENGTH.size : end]))  # noqa: S301  (see above)
            del buffer[:end]
        return values
