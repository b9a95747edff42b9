"""Opens the body of a message, wherever it stands: in a segment of the journal, or in a file.

A worker, the DSN generator and commands read bodies through `Bodies.open`. A body of the journal is
read and checked at once, because it is small; a file comes open, and its checksum is compared while
it is read. A body that is not at its place may have been moved by compaction, or its segment may
have been renamed: then the segment is opened again, the row is asked for the place that it has now,
and the body is read again.

A place that the disk cannot read counts as damaged, if the disk can be read elsewhere.

What must stay true: a body that does not verify is never returned; a fault of the spool (another
directory, an error of the whole disk) is an OSError and never a fault of the body.
"""

import io
import os
from collections.abc import Buffer
from typing import BinaryIO

from sqlalchemy import Engine

from qmqp.body import Body, BodyChanged, BodyDamaged, BodyFault, BodyFile, BodyReader
from relay.db.engine import reading
from relay.db.sql import Queries
from relay.ids import dashed
from relay.spool.journal.blockwise import UNREADABLE
from relay.spool.journal.format import Place
from relay.spool.journal.reader import WrongBody
from relay.spool.store import BodyUnsendable, Spool

_BLOCK = 1 << 20


class BodyMisplaced(BodyUnsendable):
    """The body does not verify at `place`, which is what the row says now (None: in its file), or
    the disk cannot read it there. It may be a fault of this machine that passes."""

    def __init__(self, reason: str, place: Place | None) -> None:
        super().__init__(reason)
        self.place = place


class Bodies:
    """The bodies of a spool, and the database that knows their places. Any number of threads may
    use it."""

    def __init__(self, spool: Spool, engine: Engine) -> None:
        self._spool = spool
        self._engine = engine
        self._queries = Queries(engine, __name__)

    def cached(self, size: int, place: Place | None) -> bytes | None:
        """The body, if it can be had without waiting for the disk."""
        return self._spool.segments.cached(place, size) if place else None

    def open(self, queue_id: str, size: int, place: Place | None) -> Body:
        """The body. Blocks. Raises BodyUnsendable, the database's errors, and OSError if the fault
        is not the body's."""
        if place is None:
            try:
                return self._spool.open(queue_id, size)
            except OSError as error:
                raise self._fault(error, None) from None
        try:
            return self._spool.segments.read(place, size)
        except WrongBody:
            self._spool.check()
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
        self._spool.segments.reopen(place.segment)
        place = self.place_of(queue_id) or place
        try:
            return self._spool.segments.read(place, size)
        except WrongBody as error:
            raise BodyMisplaced(str(error), place) from None
        except OSError as error:
            raise self._fault(error, place) from None

    def _fault(self, error: OSError, place: Place | None) -> Exception:
        """What an error of a read says: that the place of the body is at fault, or, as this error
        does, that the spool is. Raises OSError if its whole disk is."""
        if error.errno not in UNREADABLE:
            return error
        self._spool.check_disk()
        where = f"at {place.position} of segment {place.segment}" if place else "in its file"
        return BodyMisplaced(f"the disk cannot read the body {where}", place)

    def stream(self, queue_id: str, size: int, place: Place | None) -> BinaryIO:
        """The body as a file to read, which the caller closes. Raises as `open`."""
        body = self.open(queue_id, size, place)
        return (
            io.BufferedReader(_FileContent(body))
            if isinstance(body, BodyFile)
            else io.BytesIO(body)
        )

    def read(self, queue_id: str, size: int, place: Place | None) -> bytes:
        """The whole body, in memory. Raises as `open`."""
        with self.stream(queue_id, size, place) as body:
            try:
                return body.read()
            except OSError as error:
                raise self._fault(error, place) from None

    def verify(self, queue_id: str, size: int, place: Place | None) -> None:
        """Read the whole body, and compare its checksum if one is known. Raises as `open`."""
        body = self.open(queue_id, size, place)
        if not isinstance(body, BodyFile):
            return  # it was checked
        try:
            reader = BodyReader(body, _BLOCK)
            while not reader.whole:
                reader.read()
        except (BodyChanged, BodyDamaged) as error:
            raise BodyUnsendable(error.strerror) from None
        except BodyFault as error:
            raise self._fault(error, place) from None
        finally:
            body.close()

    def place_of(self, queue_id: str) -> Place | None:
        """Where the body of a message stands now; None if a file has it, or there is no row."""
        with reading(self._engine) as connection:
            row = self._queries.run(connection, "place", id=dashed(queue_id)).one_or_none()
        return Place(row.segment, row.position) if row and row.segment else None


class _FileContent(io.RawIOBase):
    """The body in a file, without the trailer behind it."""

    def __init__(self, body: BodyFile) -> None:
        self._body = body
        self._offset = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)[: self._body.size - self._offset]
        count = os.preadv(self._body.fd, (view,), self._offset)
        self._offset += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._body.close()
        super().close()
