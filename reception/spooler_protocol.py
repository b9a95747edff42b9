"""What passes between the store and its keeper: orders one way, reports the other, each in a frame
of its own.

A frame is a length (four bytes, of this machine) and a pickle, which is safe here: both ends are
this program, on a socket that nobody else has.
"""

import pickle
import struct
from typing import Any, NamedTuple

from relay.queue.accept import NewMessage, NewRecipient

_LENGTH = struct.Struct("=I")
FIELDS = (NewMessage._fields, NewRecipient._fields)
"""What an order's tuples mean: a keeper of another version must not guess."""


class StoreRequest(NamedTuple):
    """Keep this message, and the body if that is not stored yet; without a message: forget the
    order of that number."""

    number: int
    message: NewMessage | None = None
    body: list[bytes] | None = None
    deadline: float | None = None

    def plain(self) -> tuple[Any, ...]:
        """As it crosses the socket: named tuples take ten times as long to pickle."""
        number, message, body, deadline = self
        if message is None:
            return (number,)
        return (
            number,
            (*message[:3], [tuple(one) for one in message.recipients], *message[4:]),
            body,
            deadline,
        )

    @classmethod
    def of(cls, plain: tuple[Any, ...]) -> "StoreRequest":
        """The order that `plain` gave."""
        if len(plain) == 1:
            return cls(*plain)
        number, (key, sender, size, recipients, *rest), body, deadline = plain
        return cls(
            number,
            NewMessage(key, sender, size, [NewRecipient(*one) for one in recipients], *rest),
            body,
            deadline,
        )


class BatchReply(NamedTuple):
    """What became of the orders of a round, by number (None: kept), and what committing it took in
    seconds.

    The first that a keeper sends has no results: it is there.
    """

    results: list[tuple[int, Exception | None]]
    seconds: float


class Cancelled(Exception):
    """The order was taken back in time: nothing was stored."""


class RowRefused(Exception):
    """The database did not take this row, or was not there to; the body is gone."""


def frame(thing: object) -> bytes:
    """Anything of ours as it crosses the socket."""
    data = pickle.dumps(thing, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(data)) + data


class Frames:
    """Bytes in, what was framed out."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """What is whole with these bytes."""
        self._rest += data
        found: list[Any] = []
        start = 0
        while len(self._rest) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._rest, start)
            end = start + _LENGTH.size + length
            if len(self._rest) < end:
                break
            found.append(pickle.loads(memoryview(self._rest)[start + _LENGTH.size : end]))  # noqa: S301  (see above)
            start = end
        del self._rest[:start]
        return found
