"""The protocol between smtpd and its spooler: requests one way, replies the other, in frames.

A frame is a length (four bytes in this machine's order) and a pickle of plain values. Pickle is
safe here: both ends are this program, on a socket pair that no other process has.
"""

import pickle
import struct
from pathlib import Path
from typing import Any, NamedTuple

VERSION = 5
"""A spooler of another version refuses to start."""
_LENGTH = struct.Struct("=I")


class SpoolerSettings(NamedTuple):
    """What a spooler needs to know, as values that smtpd has validated. So the spooler imports
    neither `relay.settings` nor pydantic, which takes 7 MiB. `local`: no other machine has the
    spool's file system."""

    spool_dir: Path
    local: bool
    database_url: str
    queue_lifetime: float
    grace: float
    journal_limit: int
    log_level: str
    log_format: str
    log_addresses: str


class StoreRequest(NamedTuple):
    """Asks to store a message: its id, its rows (`relay.queue.accept.encode`), its routes, the size
    of its body, and the body (None if it is in a file that is synced)."""

    number: int
    queue_id: str
    rows: bytes
    routes: tuple[str, ...]
    size: int
    body: list[bytes] | None


class StoreFault(NamedTuple):
    """Why a message was not stored. `number` is the error's (0: none); `unknown`: it may be stored,
    so its client must hear nothing."""

    reason: str
    number: int = 0
    unknown: bool = False


class Lag(NamedTuple):
    """What is in the journal and has no rows yet. `seconds` is the age of the oldest of it.
    `damages`: parts of segments that did not verify, since the spooler began."""

    messages: int = 0
    octets: int = 0
    seconds: float = 0.0
    damages: int = 0


class SpoolerReply(NamedTuple):
    """`results` by the requests' numbers (None: stored), and the ids by route of messages that
    workers may look for. `early`: their rows are only being made; else so many `messages` have just
    been committed, in so many `seconds`. The first reply of a spooler is empty: it has started.
    Later empty ones tell the lag, each second while it is not 0."""

    results: list[tuple[int, StoreFault | None]]
    ids: dict[str, list[str]]
    messages: int
    seconds: float
    lag: Lag
    early: bool = False


def frame(value: tuple[Any, ...]) -> bytes:
    """A value as it crosses the socket. Plain tuples pickle ten times as fast as named ones."""
    data = pickle.dumps((*value,), pickle.HIGHEST_PROTOCOL)
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
        at = 0
        while len(buffer) - at >= _LENGTH.size:
            end = at + _LENGTH.size + _LENGTH.unpack_from(buffer, at)[0]
            if len(buffer) < end:
                break
            values.append(pickle.loads(buffer[at + _LENGTH.size : end]))  # noqa: S301  (see above)
            at = end
        del buffer[:at]
        return values
