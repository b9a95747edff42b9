"""The files of the journal: the only code of it that talks to the file system.

Segments stand in `journal/` of the spool. Their names are `<id>.new` until the header is synced,
`<id>.segment` while a spooler owns them, `<id>.adopted` after another one has taken them over, and
`<id>.copy` if compaction made them. An owner holds a lock (flock) on its file. The kernel releases
it when the process ends, however it ends. No child process inherits the descriptor.

All calls work relative to a descriptor of the spool, as in `relay.spool.store`.
"""

import errno
import fcntl
import os
import re
import stat
import weakref
from collections.abc import Buffer, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import PurePath

NEW, OWNED, ADOPTED, COPY = ".new", ".segment", ".adopted", ".copy"
_NAMES = (OWNED, ADOPTED, COPY)  # in the order in which a segment may be renamed
DIRECTORY = "journal"
MARK = "mark"
"""The name of the file with the mark of the spool (`relay.spool.mark`)."""
_ID = re.compile("[0-9a-f]{32}")
PATIENCE = 10.0
"""Seconds for which places of one segment are tried that the disk cannot read, while other mail
waits for its rows."""
_ZEROS = bytes(1 << 20)
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)  # Linux: read only what is in the page cache


class SegmentFile:
    """An open segment. Closing it, or losing the last reference to it, releases its lock. `lost`:
    where blocks begin that the disk could not read, for all readers of this file
    (`relay.spool.journal.blockwise`); `patience`: how many seconds of reads that fail are left for
    more of them."""

    patience = PATIENCE

    def __init__(self, handle: int) -> None:
        self.lost = set[int]()
        self._handle = handle
        self.close = weakref.finalize(self, os.close, handle)

    def fill(self, start: int, size: int) -> None:
        """Write zeros from `start` up to `size`, and sync everything. Later writes then change no
        metadata of the file system, which makes their syncs cheap."""
        while start < size:
            start += os.pwrite(self._handle, _ZEROS[: size - start], start)
        os.fsync(self._handle)

    def write(self, parts: Sequence[Buffer], position: int) -> int:
        """Write in one call; the octets that were written, which may be fewer."""
        return os.pwritev(self._handle, parts, position)

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        os.fdatasync(self._handle)

    def read(self, size: int, position: int) -> bytes:
        """Up to `size` octets."""
        return os.pread(self._handle, size, position)

    def read_cached(self, size: int, position: int) -> bytes | None:
        """So many octets from the page cache; None if they are not all there, or if this file
        system cannot tell. Does not wait for the disk."""
        buffer = bytearray(size)
        try:
            count = os.preadv(self._handle, (buffer,), position, _NOWAIT) if _NOWAIT else 0
        except OSError:
            return None
        return bytes(buffer) if count == size else None

    def try_again(self) -> None:
        """Forget what could not be read."""
        self.lost.clear()
        self.patience = PATIENCE

    def size(self) -> int:
        """The size of the file."""
        return os.fstat(self._handle).st_size

    def protect(self) -> None:
        """Mark the segment as sealed: take away the permission to write. A reader without a
        database then knows it (`sealed`)."""
        os.fchmod(self._handle, stat.S_IRUSR)

    def sealed(self) -> bool:
        """Whether the segment was marked as sealed. A crash may have come before the mark."""
        return not self.status().st_mode & stat.S_IWUSR

    def unlinked(self) -> bool:
        """Whether the file has no name any more."""
        return os.fstat(self._handle).st_nlink == 0

    def lock(self) -> bool:
        """Take the lock; False if another process has it. Raises OSError for any other reason."""
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def share(self) -> bool:
        """Keep other processes from the lock, together with all that share it; False if one has it.
        A file that is open to read is enough. Raises OSError."""
        try:
            fcntl.flock(self._handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def has_owner(self) -> bool:
        """Whether another process has the lock. Shares it for a moment if none has: two that ask do
        not see each other. Raises OSError."""
        if not self.share():
            return True
        fcntl.flock(self._handle, fcntl.LOCK_UN)
        return False

    def status(self) -> os.stat_result:
        """Device and inode tell whether a name still leads to this file."""
        return os.fstat(self._handle)


class JournalDirectory:
    """The directory `journal/` of a spool; `spool` is a descriptor of the spool's directory."""

    def __init__(self, spool: int) -> None:
        self._spool = spool

    def make(self) -> None:
        """Make the directory if it is missing, and make its name durable: the process that made it
        may have ended before it could."""
        with suppress(FileExistsError):
            os.mkdir(DIRECTORY, 0o700, dir_fd=self._spool)
        os.fsync(self._spool)

    def names(self) -> list[str]:
        """The names in the directory, sorted: by id, which is by age. Empty without a directory."""
        try:
            with self._opened() as handle, os.scandir(handle) as entries:
                return sorted(entry.name for entry in entries)
        except FileNotFoundError:
            return []

    def segments(self, *suffixes: str) -> Iterator[tuple[str, str]]:
        """The id and the name of each segment that has one of these suffixes, oldest first. Other
        names are not the journal's."""
        for name in self.names():
            path = PurePath(name)
            if path.suffix in suffixes and _ID.fullmatch(path.stem):
                yield path.stem, name

    def create(self, name: str) -> SegmentFile:
        """Make a new file, and lock it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        while True:
            file = SegmentFile(os.open(self._path(name), flags, 0o600, dir_fd=self._spool))
            # Before it was locked another process may have taken it for a leftover.
            if file.lock() and self.leads_to(name, file):
                return file
            file.close()
            with suppress(FileNotFoundError):
                self.unlink(name)

    def open(self, name: str, *, write: bool = False) -> SegmentFile:
        """Open a file; raises FileNotFoundError and other OSErrors."""
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC
        try:
            handle = os.open(self._path(name), flags, dir_fd=self._spool)
        except PermissionError:
            if not write:
                raise
            # It was sealed, in a database that was lost since.
            os.chmod(self._path(name), stat.S_IRUSR | stat.S_IWUSR, dir_fd=self._spool)
            handle = os.open(self._path(name), flags, dir_fd=self._spool)
        return SegmentFile(handle)

    def open_segment(self, segment: str) -> SegmentFile | None:
        """Open a segment to read it, under any of its names; None if it has none."""
        for suffix in _NAMES:
            with suppress(FileNotFoundError):
                return self.open(segment + suffix)
        return None

    def is_gone(self, segment: str) -> bool:
        """Whether a segment has no name any more, not even after a power failure."""
        file = self.open_segment(segment)
        if file is not None:
            file.close()
            return False
        self.sync()  # its removal may not be durable yet
        return True

    def rename(self, old: str, new: str) -> None:
        """Rename a file; `sync` makes that durable."""
        os.rename(self._path(old), self._path(new), src_dir_fd=self._spool, dst_dir_fd=self._spool)

    def unlink(self, name: str) -> None:
        """Remove a file; `sync` makes that durable."""
        os.unlink(self._path(name), dir_fd=self._spool)

    def sync(self) -> None:
        """Make the names durable."""
        with self._opened() as handle:
            os.fsync(handle)

    def free_octets(self) -> int:
        """The free space of the file system."""
        status = os.fstatvfs(self._spool)
        return status.f_bavail * status.f_frsize

    def leads_to(self, name: str, file: SegmentFile) -> bool:
        """Whether a name is still that of this open file."""
        try:
            status = os.stat(self._path(name), dir_fd=self._spool, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return stat.S_ISREG(status.st_mode) and os.path.samestat(status, file.status())

    def has_name(self, segment: str, file: SegmentFile) -> bool:
        """Whether an open segment still has one of its names. The count of its links does not tell:
        NFS renames a file that is removed while it is open. Raises OSError."""
        try:
            return any(self.leads_to(segment + suffix, file) for suffix in _NAMES)
        except OSError as error:
            if error.errno == errno.ESTALE:  # another host has removed it
                return False
            raise

    def _path(self, name: str) -> str:
        return f"{DIRECTORY}/{name}"

    @contextmanager
    def _opened(self) -> Iterator[int]:
        handle = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._spool)
        try:
            yield handle
        finally:
            os.close(handle)
