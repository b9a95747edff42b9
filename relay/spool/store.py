"""The spool: the directory of the journal, and of the bodies that have files of their own.

Large bodies and DSNs have such files: the bytes that QMQP carries (LF line ends), then a trailer
(`relay.spool.trailer`). A file is named by the queue id and stands in a directory that is named by
the id's first eight hex digits, so that the arrivals of about a minute share one. The spool's
identity stands in `spool-id` and in the table `spool`; a worker that finds another identity stops,
because every body would look lost. All calls work relative to a descriptor of the directory,
because a path whose file system was unmounted names the bare mount point.

What must stay true: a body that returned from `store` or `finish` survives a power failure; one
that failed leaves nothing behind; a synced file is never changed.
"""

import errno
import os
import re
import stat
import threading
import weakref
from collections.abc import Buffer, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path

from isal.isal_zlib import crc32  # zlib's takes seven times as long
from sqlalchemy import Engine

from qmqp.body import BodyFile
from relay.db.engine import writing
from relay.db.sql import Queries
from relay.ids import dashed, new_id
from relay.spool.journal.directory import DIRECTORY, MARK, JournalDirectory
from relay.spool.journal.reader import JournalReader
from relay.spool.trailer import encode_trailer, read_envelope, read_trailer

SYNC_EVERY = 8 << 20
_DIRECTORY_DIGITS = 8
_DIRECTORY_NAME = re.compile(rf"[0-9a-f]{{{_DIRECTORY_DIGITS}}}")
_FILE_NAME = re.compile(r"[0-9a-f]{32}")
_VOLATILE = {"tmpfs", "ramfs"}
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "ceph", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "9p"}
"""File systems that several machines may share, where a lost lock does not prove a death."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_IDENTITY = "spool-id"
_ORPHANS = "orphans"


class SpoolError(Exception):
    """The spool directory cannot be used; the text says why, and what to do."""


class BodyUnsendable(Exception):
    """The body cannot be sent as it is: it is missing, damaged, or has not the size of the row."""


@contextmanager
def _opened(directory: Path | str, root: int | None = None) -> Iterator[int]:
    """A descriptor of a directory, whose path may be relative to `root`."""
    handle = os.open(directory, _DIRECTORY, dir_fd=root)
    try:
        yield handle
    finally:
        os.close(handle)


def _identity_in(root: int) -> str:
    """The identity that is written in a spool; empty if it is missing."""
    try:
        with open(_IDENTITY, "rb", opener=partial(os.open, dir_fd=root)) as file:
            return file.read(100).decode("ascii", "replace").strip()
    except FileNotFoundError:
        return ""


type Start = Callable[[Callable[[], None]], object]
"""Has another thread make a call, some time later."""


class BodyWriter:
    """A body file that is being written. Calls block; one caller at a time.

    `sync_directory` syncs the directory of the file; it raises OSError. `start` has each SYNC_EVERY
    octets synced in another thread while more is appended. If that has not ended when the next sync
    is due, `append` waits for both, so no more than twice as much waits for the disk.

    What must stay true: `finish` succeeds only if all syncs have.
    """

    def __init__(
        self,
        root: int,
        name: str,
        handle: int,
        sync_directory: Callable[[str], None],
        start: Start,
    ) -> None:
        self._root = root
        self._name = name
        self._handle = handle
        self._sync_directory = sync_directory
        self._start = start
        self._syncing = threading.Lock()  # held while the file is synced or closed
        self._to_sync = 0  # octets that a sync was started for
        self._synced = 0  # octets that were there when the last sync began
        self._fault: OSError | None = None  # of a sync
        self._checksum = 0
        self.size = 0

    def append(self, data: Buffer) -> None:
        """Write more of the body; raises OSError, and then the file is gone."""
        try:
            self._write(data)
            self.size += len(memoryview(data))
            self._checksum = crc32(data, self._checksum)
            if self.size - self._to_sync >= SYNC_EVERY:
                behind = self._synced < self._to_sync
                self._to_sync = self.size
                sync = partial(self._sync, self.size)
                if behind:
                    sync()
                else:
                    self._start(sync)
            self._check()
        except OSError:
            self.discard()
            raise

    def read(self, size: int, offset: int) -> bytes:
        """At most `size` octets of what was appended. Any thread. Raises OSError."""
        return os.pread(self._handle, min(size, self.size - offset), offset)

    def finish(self, envelope: bytes) -> int:
        """Write the trailer with the envelope, sync file and directory, and close; the size of the
        body. Raises OSError, and then the file is gone."""
        try:
            self._write(encode_trailer(self.size, self._checksum, envelope))
            with self._syncing:
                os.fdatasync(self._handle)
                self._synced = self.size  # a sync that waits for its thread is not needed any more
            self._check()
            self._sync_directory(os.path.dirname(self._name))
        except OSError:
            self.discard()
            raise
        self._close()
        return self.size

    def discard(self) -> None:
        """Close and remove the file; never raises."""
        if self._handle >= 0:
            self._close()
            with suppress(OSError):  # the cleaner removes it later
                os.unlink(self._name, dir_fd=self._root)

    def _write(self, data: Buffer) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._handle, rest) :]

    def _sync(self, size: int) -> None:
        """Sync at least the first `size` octets of the body, unless that was done. Any thread."""
        with self._syncing:
            if self._handle < 0 or self._synced >= size:
                return
            size = self.size
            try:
                os.fdatasync(self._handle)
                # The next reader is the worker: free the page cache while the rest arrives.
                os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_DONTNEED)
            except OSError as error:
                self._fault = error
            self._synced = size

    def _check(self) -> None:
        """Raise the error of a sync that another thread made. The kernel reports it only once, so
        the next sync would seem to succeed."""
        if self._fault is not None:
            raise self._fault

    def _close(self) -> None:
        """An error of `close` tells nothing new: the file is synced, or is going to be removed."""
        with self._syncing, suppress(OSError):
            handle, self._handle = self._handle, -1
            os.close(handle)


class Spool:
    """The directory of bodies. `handle`: a descriptor of it that another process opened earlier and
    passes on."""

    def __init__(self, directory: Path, handle: int | None = None) -> None:
        self.directory = directory
        self._handle = -1
        self._opening = threading.Lock()
        if handle is not None:
            self._hold(handle)

    @classmethod
    def known(cls, directory: Path, *, unsafe: bool = False) -> "Spool | None":
        """The spool of a directory that has been used before; None for any other directory.

        Raises SpoolError if it cannot be used.
        """
        spool = cls(directory)
        try:
            if not spool.identity or DIRECTORY not in os.listdir(spool.handle):
                return None
        except OSError:
            return None
        spool._check_usable(unsafe=unsafe)
        return spool

    @property
    def handle(self) -> int:
        """The descriptor that all calls use; opens it first if needed, and may raise OSError."""
        if self._handle < 0:
            with self._opening, _opened(self.directory) as handle:
                if self._handle < 0:
                    self._hold(handle)
        return self._handle

    @property
    def identity(self) -> str:
        """The identity that is written in the directory, empty if it is missing; raises OSError as
        `handle`."""
        return self._identity if self.handle >= 0 else ""

    def _hold(self, handle: int) -> None:
        """Use this directory from now on. The number of the descriptor stays, because other threads
        use it."""
        self._identity = _identity_in(handle)
        self._status = os.fstat(handle)
        self._synced = ""  # the body directory whose own name was synced last
        if self._handle >= 0:
            os.dup2(handle, self._handle, inheritable=False)
        else:
            self._handle = os.dup(handle)
            weakref.finalize(self, os.close, self._handle).atexit = False

    def checked_handle(self) -> int:
        """The descriptor; raises OSError unless the path still leads to this spool, where readers
        will look for a body.

        After a file system was mounted again its directory may have another inode; then the
        identity decides.
        """
        root = self.handle
        if not os.path.samestat(os.stat(self.directory), self._status):
            with _opened(self.directory) as handle:
                self._check_identity(handle)
                self._hold(handle)
        return root

    def _check_identity(self, handle: int) -> None:
        """Raise OSError unless this directory is this spool: a lost mount must not condemn every
        message."""
        identity = _identity_in(handle)
        if not identity or identity != self._identity:
            raise OSError(
                errno.ESTALE if identity else errno.ENOENT,
                f"another spool: its identity is {identity or 'missing'}, not {self._identity}",
                str(self.directory),
            )

    @cached_property
    def segments(self) -> JournalReader:
        """Reads the bodies in the journal."""
        return JournalReader(JournalDirectory(self.handle))

    def path(self, queue_id: str) -> Path:
        """The path of the body file of a message."""
        return self.directory / self._name(queue_id)

    def _name(self, queue_id: str) -> str:
        return f"{queue_id[:_DIRECTORY_DIGITS]}/{queue_id}"

    def store(self, queue_id: str, parts: Sequence[bytes], envelope: bytes = b"") -> int:
        """Create, write and sync a body file; the size of the body. `envelope` is what
        `fsck --rebuild` makes its rows from. Raises OSError, and then nothing is left of it."""
        body = self.create(queue_id)
        body.append(b"".join(parts))
        return body.finish(envelope)

    def create(self, queue_id: str, start: Start = lambda call: call()) -> BodyWriter:
        """Start a body file; raises OSError (FileExistsError for an id that has one). `start` has
        syncs made in another thread; without it `append` makes them."""
        root = self.checked_handle()
        directory, name = queue_id[:_DIRECTORY_DIGITS], self._name(queue_id)
        while True:
            if self._synced != directory:  # another process may have made it and not synced it
                with suppress(FileExistsError):
                    os.mkdir(directory, 0o700, dir_fd=root)
                os.fsync(root)
                self._synced = directory
            try:
                handle = os.open(name, _NEW, 0o600, dir_fd=root)
            except FileNotFoundError:
                if not self._synced:
                    raise
                self._synced = ""  # the cleaner has removed it since
            else:
                return BodyWriter(root, name, handle, self._sync_directory, start)

    def _sync_directory(self, name: str) -> None:
        """Sync a directory of bodies. An error is not a matter for another try, because the kernel
        reports it once."""
        with _opened(name, self.handle) as handle:
            os.fsync(handle)

    def open(self, queue_id: str, size: int) -> BodyFile:
        """The body of a message that has a file, opened for reading; raises BodyUnsendable, or
        OSError if the fault is not the body's.

        After a fault the identity of the directory is checked, and the body is opened again: the
        directory may have been mounted in between.
        """
        try:
            return self._open(queue_id, size)
        except BodyUnsendable:
            self.check()
        return self._open(queue_id, size)

    def check(self) -> None:
        """Raise OSError unless this is the right spool and its path leads to it."""
        self._check_identity(self.checked_handle())

    def check_disk(self) -> None:
        """Raise OSError unless the disk of the right spool can be read: an error of one body then
        belongs to its place, and not to the disk."""
        self.check()
        handle = os.open(_IDENTITY, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.handle)
        try:
            # The page cache would answer without the disk.
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.pread(handle, 100, 0)
        finally:
            os.close(handle)

    def _open(self, queue_id: str, size: int) -> BodyFile:
        for name in self._names(queue_id):
            try:
                handle = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.handle)
            except FileNotFoundError:
                continue
            try:
                return _checked(handle, size)
            except BaseException:
                os.close(handle)
                raise
        raise BodyUnsendable(f"no body file {queue_id}")

    def _names(self, queue_id: str) -> tuple[str, str]:
        """The possible names of a body: its row may have appeared after its file was moved to
        `orphans/`."""
        return self._name(queue_id), f"{_ORPHANS}/{queue_id}"

    def remove(self, queue_id: str) -> bool:
        """Remove a body; False if there was none. Never raises: the cleaner tries again later."""
        for name in self._names(queue_id):
            with suppress(OSError):
                os.unlink(name, dir_fd=self.handle)
                return True
        return False

    def move_to_orphans(self, queue_id: str) -> None:
        """Move a body to `orphans/`; raises OSError. The file's ctime is the time of the move."""
        root = self.handle
        with suppress(FileExistsError):
            os.mkdir(_ORPHANS, 0o700, dir_fd=root)
        os.rename(self._name(queue_id), f"{_ORPHANS}/{queue_id}", src_dir_fd=root, dst_dir_fd=root)

    def remove_empty_directories(self, older_than: float) -> None:
        """Remove empty directories of bodies that were last changed before a time of the file
        system's clock."""
        for name in self._directories():
            with suppress(OSError):  # it holds bodies
                if os.stat(name, dir_fd=self.handle).st_mtime <= older_than:
                    os.rmdir(name, dir_fd=self.handle)

    def _directories(self) -> list[str]:
        """The names of the directories of bodies, oldest first, without other directories such as
        `lost+found`."""
        with _opened(".", self.handle) as root:
            return sorted(filter(_DIRECTORY_NAME.fullmatch, os.listdir(root)))

    def ids(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every body file, oldest directory first."""
        for directory in self._directories():
            yield from self._files(directory)

    def envelope(self, queue_id: str) -> bytes:
        """The envelope in the trailer of a body file; empty without a valid one. Raises OSError;
        FileNotFoundError if there is no such file."""
        for name in self._names(queue_id):
            with suppress(FileNotFoundError):
                handle = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.handle)
                try:
                    trailer = read_trailer(handle)
                    return (trailer and read_envelope(handle, trailer)) or b""
                finally:
                    os.close(handle)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), queue_id)

    def orphans(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every file in `orphans/`."""
        with suppress(FileNotFoundError):
            yield from self._files(_ORPHANS)

    def _files(self, directory: str) -> Iterator[tuple[str, os.stat_result]]:
        with _opened(directory, self.handle) as handle, os.scandir(handle) as entries:
            for entry in entries:
                if _FILE_NAME.fullmatch(entry.name):
                    with suppress(FileNotFoundError):  # another process has removed it since
                        yield entry.name, entry.stat(follow_symlinks=False)

    def clock(self) -> float:
        """The time of the clock that stamps files here (seconds since 1970), which on a network
        file system is the server's.

        The call touches the directory to read it. If it may not, the time is an earlier one, and
        files seem younger than they are.
        """
        root = self.handle
        with suppress(OSError):
            os.utime(root)
        return os.fstat(root).st_mtime

    @property
    def is_local(self) -> bool:
        """Whether no other machine has the file system, so that a lock proves what it says."""
        return file_system(self.directory) not in NETWORK

    def free_bytes(self) -> int:
        """The free space of the spool's file system."""
        status = os.fstatvfs(self.handle)
        return status.f_bavail * status.f_frsize

    def journal_usage(self) -> tuple[int, int]:
        """How many segments there are, and the octets that they take on the disk."""
        sizes = list[int]()
        with suppress(FileNotFoundError), _opened(DIRECTORY, self.handle) as handle:
            for name in os.listdir(handle):
                if name != MARK:
                    with suppress(FileNotFoundError):  # it was removed or renamed since
                        status = os.stat(name, dir_fd=handle, follow_symlinks=False)
                        sizes.append(status.st_blocks * 512)
        return len(sizes), sum(sizes)

    def prepare(self, engine: Engine, *, unsafe: bool = False) -> None:
        """Make or check the directory, and that it is the one that this database knows; raises
        SpoolError. The identity of a new spool is recorded in the database."""
        queries = Queries(engine, __name__)
        with writing(engine) as connection:
            known = queries.run(connection, "lock_identity").scalar()
            try:
                if known is None:  # else the path may be a bare mount point, which must stay empty
                    self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                with _opened(self.directory) as handle:
                    self._hold(handle)
                self._check_usable(unsafe=unsafe)
                if known is None:
                    self._identity = self._identity or self._write_identity()
                    queries.run(connection, "insert_identity", id=dashed(self._identity))
                if known in (None, self._identity):
                    JournalDirectory(self.handle).make()
            except OSError as error:
                mount = (
                    "; this database has a spool: mount it. Nothing was touched" if known else ""
                )
                raise SpoolError(
                    f"RELAY_SPOOL_DIR: {self.directory}: {error.strerror}{mount}"
                ) from None
        if known not in (None, self._identity):
            raise SpoolError(
                f"RELAY_SPOOL_DIR: {self.directory} is not the spool of this database: its identity"
                f" is {self._identity or 'missing'}, the database knows {known}. Mount the right"
                " one; nothing was touched"
            )

    def _check_usable(self, *, unsafe: bool) -> None:
        setting = f"RELAY_SPOOL_DIR: {self.directory}"
        if os.fstat(self.handle).st_mode & stat.S_IWOTH:
            raise SpoolError(f"{setting} is writable by everybody: chmod o-w it")
        if not os.access(self.directory, os.W_OK | os.X_OK):
            raise SpoolError(f"{setting} is not writable by this user")
        if not unsafe and (kind := file_system(self.directory)) in _VOLATILE:
            raise SpoolError(
                f"{setting} is on {kind}, which loses mail at a power failure;"
                " choose a disk, or set RELAY_UNSAFE_DURABILITY=1 for a test"
            )

    def _write_identity(self) -> str:
        """Give the directory an identity, whole or not at all."""
        identity = new_id()
        root = self.handle
        temporary = f"{_IDENTITY}.new"
        with open(temporary, "wb", opener=partial(os.open, mode=0o600, dir_fd=root)) as file:
            file.write(identity.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, _IDENTITY, src_dir_fd=root, dst_dir_fd=root)
        os.fsync(root)
        return identity


def _checked(handle: int, size: int) -> BodyFile:
    """The body of `size` octets that an open file holds; raises BodyUnsendable. A file of an
    earlier version has no trailer."""
    actual = os.fstat(handle).st_size
    if actual == size:
        return BodyFile(handle, size)
    trailer = read_trailer(handle)
    if trailer is None or trailer.size != size:
        found = actual if trailer is None else trailer.size
        raise BodyUnsendable(f"the body file has {found} bytes, not {size}")
    return BodyFile(handle, size, trailer.checksum)


def file_system(directory: Path) -> str:
    """The kernel's name for the type of a directory's file system; empty if it is not known."""
    import psutil  # an import that other calls need not wait for

    real = Path(os.path.realpath(directory))
    above = [m for m in psutil.disk_partitions(all=True) if real.is_relative_to(m.mountpoint)]
    return max(above, key=lambda mount: len(mount.mountpoint)).fstype if above else ""
