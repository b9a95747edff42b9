"""Message bodies: one file a message, in LF form, exactly the bytes that QMQP will carry.

Files are named by the queue id and stand in directories named by its first eight hex digits, about
a minute of arrivals each: fresh files share a directory that is in memory, and a directory that has
emptied is removed. A body is written once, synced (file, then directory) before its message may be
committed, read by workers, and removed when no delivery needs it.

What must stay true: a body that returned from `store` or `finish` survives a power cut; one that
failed leaves nothing behind; a file is never changed once it was synced. The spool knows its
identity (`spool-id`) and so does the database (table `spool`): on another directory nobody runs,
because there every body would look lost.

A process holds a descriptor of the directory from its start and works relative to that. A path is
looked up anew in every call: when the file system below it is unmounted, it names the bare mount
point, and a body stored there is gone when the file system is back. Before anything is created the
path must still name the directory that is held.
"""

import errno
import os
import re
import stat
import threading
import weakref
from collections.abc import Buffer, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy import Engine, text

from relay.db.engine import reading, writing
from relay.db.sql import dialect_of
from relay.ids import dashed, new_id

SYNC_EVERY = 8 << 20
_DIRECTORY_DIGITS = 8
_OURS = re.compile(rf"[0-9a-f]{{{_DIRECTORY_DIGITS}}}")
_ID = re.compile(r"[0-9a-f]{32}")
_TMPFS_MAGIC = {"tmpfs", "ramfs"}
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_MARK, _ORPHANS = "spool-id", "orphans"
_KNOWN = "SELECT @hex(id) FROM spool"


class SpoolError(Exception):
    """The spool directory cannot be used; the text says why and what to do."""


class BodyUnsendable(Exception):
    """The body can never be sent as it is."""


class BodyMissing(BodyUnsendable):
    """There is no file."""


class BodyWrongSize(BodyUnsendable):
    """The file is not as long as the database says."""


@contextmanager
def _opened(name: str, root: int) -> Iterator[int]:
    """A directory below `root`, as a descriptor of its own."""
    handle = os.open(name, _DIRECTORY, dir_fd=root)
    try:
        yield handle
    finally:
        os.close(handle)


def _sync_directory(name: str, root: int) -> None:
    handle = os.open(name, _DIRECTORY, dir_fd=root)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _attempt(call: Callable[[str, int], None], name: str, root: int) -> OSError | None:
    """The error of a call, if it has one."""
    try:
        call(name, root)
    except OSError as error:
        return error
    return None


def _place(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _identity_in(root: int) -> str:
    """What a spool's mark says; empty where no mark is."""
    try:
        handle = os.open(_MARK, os.O_RDONLY | os.O_CLOEXEC, dir_fd=root)
    except FileNotFoundError:
        return ""
    try:
        return os.read(handle, 100).decode("ascii", "replace").strip()
    finally:
        os.close(handle)


def _write_all(handle: int, data: Buffer) -> int:
    """Write every byte; the count."""
    rest = memoryview(data)
    total = len(rest)
    while rest:
        rest = rest[os.write(handle, rest) :]
    return total


class BodyWriter:
    """A body being written: blocking calls, one caller at a time."""

    def __init__(self, root: int, name: str, handle: int) -> None:
        self._root, self._name, self._handle, self._unsynced = root, name, handle, 0
        self.directory = os.path.dirname(name)
        self.size = 0

    def append(self, data: Buffer) -> None:
        """Write more; raises OSError, and then the file is gone."""
        try:
            written = _write_all(self._handle, data)
            self.size += written
            self._unsynced += written
            if self._unsynced >= SYNC_EVERY:
                os.fdatasync(self._handle)
                # Nobody reads it before the worker does: give the memory back while the rest
                # arrives.
                os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_DONTNEED)
                self._unsynced = 0
        except OSError:
            self.discard()
            raise

    def begin_sync(self) -> None:
        """Have the kernel begin to write what there is, without waiting for it."""
        os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Wait until the file's bytes are on disk; raises OSError, and then the file is gone."""
        try:
            os.fdatasync(self._handle)
        except OSError:
            self.discard()
            raise

    def finish(self) -> int:
        """Sync file and directory, close; the size in bytes. Raises OSError, and then the file is
        gone."""
        self.sync()
        try:
            _sync_directory(self.directory, self._root)
        except OSError:
            self.discard()
            raise
        self.close()
        return self.size

    def discard(self) -> None:
        """Close and remove what was written; never raises."""
        if self._handle >= 0:
            self.close()
            with suppress(OSError):  # housekeeping finds it
                os.unlink(self._name, dir_fd=self._root)

    def close(self) -> None:
        """Close what was synced."""
        handle, self._handle = self._handle, -1
        with suppress(
            OSError
        ):  # it has nothing to say that the sync before it, or giving up, did not settle
            os.close(handle)


class Spool:
    """The directory of bodies. `handle`: a descriptor of it that another process held before us,
    and hands on."""

    def __init__(self, directory: Path, handle: int | None = None) -> None:
        self.directory, self._root = directory, str(directory)
        self._held, self._holding = -1, threading.Lock()
        self._identity, self._place = "", (0, 0)  # what its mark says; its device and inode
        self._synced = ""  # the directory of bodies whose own name we synced last
        if handle is not None:
            self._hold(handle)

    @property
    def handle(self) -> int:
        """The descriptor that everything goes through; raises OSError if it can only be opened now,
        and cannot."""
        if self._held < 0:
            with self._holding:
                if self._held < 0:
                    self._hold(os.open(self._root, _DIRECTORY))
        return self._held

    @property
    def identity(self) -> str:
        """What the mark in our directory says, empty where no mark is; raises OSError as `handle`
        does."""
        return self._identity if self.handle >= 0 else ""

    def _hold(self, handle: int) -> None:
        """Work on this directory from now on. The number stays, for other threads are using it."""
        try:
            self._identity, self._place = _identity_in(handle), _place(os.fstat(handle))
        except OSError:
            os.close(handle)
            raise
        if self._held >= 0:
            os.dup2(handle, self._held, inheritable=False)
            os.close(handle)
        else:
            self._held = handle
            weakref.finalize(self, os.close, handle).atexit = False
        self._synced = ""

    def _insist_on_place(self) -> int:
        """Our descriptor; raises OSError unless our directory is still where readers will look for
        it.

        A file system that was mounted again may be another directory to the kernel; it is ours if
        its mark is.
        """
        root = self.handle
        if _place(os.stat(self._root)) == self._place:
            return root
        handle = os.open(self._root, _DIRECTORY)
        try:
            self._insist_on_mark(handle)
        except OSError:
            os.close(handle)
            raise
        self._hold(handle)
        return root

    def _insist_on_mark(self, handle: int) -> None:
        """Raise OSError unless this directory is our spool: a lost mount is no reason to give up
        every message."""
        found = _identity_in(handle)
        if not found or found != self._identity:
            number = errno.ESTALE if found else errno.ENOENT
            raise OSError(
                number,
                f"not our spool: it says {found or 'nothing'}, ours {self._identity}",
                self._root,
            )

    def path(self, queue_id: str) -> Path:
        """Where the body of a message stands, for people."""
        return self.directory / self._name(queue_id)

    def _name(self, queue_id: str) -> str:
        return f"{queue_id[:_DIRECTORY_DIGITS]}/{queue_id}"

    def store(self, queue_id: str, parts: Sequence[bytes]) -> int:
        """Create, write and sync a small body; its size in bytes. Raises OSError, and then nothing
        is left."""
        (found,) = self.store_all([(queue_id, parts)])
        if isinstance(found, OSError):
            raise found
        return found

    def store_all(self, bodies: Sequence[tuple[str, Sequence[bytes]]]) -> list[int | OSError]:
        """Create, write and sync small bodies together; the size of each, or the error that left
        nothing of it.

        The kernel is told to begin with all of them before one is waited for, so that one commit of
        the file system's journal does for many: it takes a few threads and half of the CPU that one
        by one and in parallel costs.
        """
        try:
            root = self._insist_on_place()
        except OSError as error:
            return [error] * len(bodies)
        found: dict[int, BodyWriter | OSError] = {}
        for number, (queue_id, parts) in enumerate(bodies):
            try:
                found[number] = body = self._create(root, queue_id)
                body.append(b"".join(parts))
                body.begin_sync()
            except OSError as error:
                found[number] = error
        for number, one in found.items():
            if isinstance(one, BodyWriter):
                try:
                    one.sync()
                except OSError as error:
                    found[number] = error
        return self._finish_all([one for _, one in sorted(found.items())])

    def _finish_all(self, found: list[BodyWriter | OSError]) -> list[int | OSError]:
        """Sync the directories of these synced bodies, each once, and close them."""
        failed: dict[str, OSError | None] = {}
        results: list[int | OSError] = []
        for one in found:
            if isinstance(one, OSError):
                results.append(one)
                continue
            if one.directory not in failed:
                failed[one.directory] = _attempt(_sync_directory, one.directory, self.handle)
            error = failed[one.directory]
            if error is not None:
                one.discard()
            else:
                one.close()
            results.append(error or one.size)
        return results

    def create(self, queue_id: str) -> BodyWriter:
        """Start a body; raises OSError (FileExistsError for an id that has one)."""
        return self._create(self._insist_on_place(), queue_id)

    def _create(self, root: int, queue_id: str) -> BodyWriter:
        directory, name = queue_id[:_DIRECTORY_DIGITS], self._name(queue_id)
        while True:
            if self._synced != directory:  # whoever made it may not have synced it yet
                with suppress(FileExistsError):
                    os.mkdir(directory, 0o700, dir_fd=root)
                os.fsync(root)
                self._synced = directory
            try:
                handle = os.open(
                    name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=root
                )
            except FileNotFoundError:
                if not self._synced:
                    raise
                self._synced = ""  # housekeeping has removed it since
            else:
                return BodyWriter(root, name, handle)

    def open(self, queue_id: str, size: int) -> int:
        """A read-only file descriptor; raises BodyUnsendable, or OSError for a fault that is not
        the body's.

        What is wrong with a body is looked at again once the directory has proved to be ours: it
        may have been mounted between the look and the proof.
        """
        try:
            return self._open(queue_id, size)
        except BodyUnsendable:
            self._insist_on_mark(self._insist_on_place())
        return self._open(queue_id, size)

    def _open(self, queue_id: str, size: int) -> int:
        for name in self._names(queue_id):
            try:
                handle = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.handle)
            except FileNotFoundError:
                continue
            found = os.fstat(handle).st_size
            if found == size:
                return handle
            os.close(handle)
            raise BodyWrongSize(f"the body file has {found} bytes, not {size}")
        raise BodyMissing(f"no body file {queue_id}")

    def _names(self, queue_id: str) -> tuple[str, str]:
        """Where a body may stand: a row may come, or come back, after its file was put aside."""
        return self._name(queue_id), f"{_ORPHANS}/{queue_id}"

    def remove(self, queue_id: str) -> bool:
        """Remove a body that nobody needs; False if it was gone. Never raises: what stays,
        housekeeping finds."""
        for name in self._names(queue_id):
            try:
                os.unlink(name, dir_fd=self.handle)
            except FileNotFoundError:
                continue
            except OSError:
                return False
            return True
        return False

    def move_to_orphans(self, queue_id: str) -> None:
        """Move a body to `orphans/`; raises OSError. The kernel notes the time of that as the
        file's ctime."""
        root = self.handle
        with suppress(FileExistsError):
            os.mkdir(_ORPHANS, 0o700, dir_fd=root)
        os.rename(self._name(queue_id), f"{_ORPHANS}/{queue_id}", src_dir_fd=root, dst_dir_fd=root)

    def remove_orphan(self, queue_id: str) -> bool:
        """Remove a body that was put aside; False if it was gone."""
        try:
            os.unlink(f"{_ORPHANS}/{queue_id}", dir_fd=self.handle)
        except FileNotFoundError:
            return False
        return True

    def directories(self) -> list[str]:
        """The names of the directories of bodies, oldest first: what else stands there
        (`lost+found`) is not ours."""
        with _opened(".", self.handle) as root:
            return sorted(filter(_OURS.fullmatch, os.listdir(root)))

    def remove_directory(self, name: str, older_than: float) -> bool:
        """Remove a directory of bodies that is empty, and was last changed before a time of the
        file system's."""
        try:
            if os.stat(name, dir_fd=self.handle).st_mtime > older_than:
                return False
            os.rmdir(name, dir_fd=self.handle)
        except OSError:  # it holds bodies
            return False
        return True

    def ids(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every body file there is, oldest directory first."""
        for directory in self.directories():
            yield from self._files(directory)

    def orphans(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every file that was put aside."""
        with suppress(FileNotFoundError):
            yield from self._files(_ORPHANS)

    def _files(self, directory: str) -> Iterator[tuple[str, os.stat_result]]:
        with _opened(directory, self.handle) as handle, os.scandir(handle) as entries:
            for entry in entries:
                if _ID.fullmatch(entry.name):
                    with suppress(FileNotFoundError):  # somebody has removed it since
                        yield entry.name, entry.stat(follow_symlinks=False)

    def clock(self) -> float:
        """The time by the clock that stamps files here (seconds since 1970): the server's on a
        network file system.

        Asked for by touching the directory. Where that cannot be done, its time is an earlier one,
        and files seem younger than they are.
        """
        root = self.handle
        with suppress(OSError):
            os.utime(root)
        return os.fstat(root).st_mtime

    def free_bytes(self) -> int:
        """Room that is left for us on the spool's file system."""
        found = os.fstatvfs(self.handle)
        return found.f_bavail * found.f_frsize

    def prepare(self, engine: Engine, *, unsafe: bool = False) -> None:
        """Make or check the directory, and that it is the one this database knows; raises
        SpoolError."""
        known = _known(engine)
        try:
            if (
                known is None
            ):  # else its place may be a bare mount point, where nothing must be made
                self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._hold(os.open(self._root, _DIRECTORY))
            found = os.fstat(self.handle)
        except OSError as error:
            hint = (
                ""
                if known is None
                else "; this database has a spool: mount it. Nothing was touched"
            )
            raise SpoolError(f"RELAY_SPOOL_DIR: {self.directory}: {error.strerror}{hint}") from None
        if found.st_mode & stat.S_IWOTH:
            raise SpoolError(
                f"RELAY_SPOOL_DIR: {self.directory} is writable by everybody: chmod o-w it"
            )
        if not os.access(self.directory, os.W_OK | os.X_OK):
            raise SpoolError(f"RELAY_SPOOL_DIR: {self.directory} is not writable by this user")
        if not unsafe and (kind := file_system(self.directory)) in _TMPFS_MAGIC:
            raise SpoolError(
                f"RELAY_SPOOL_DIR: {self.directory} is on {kind}, which forgets mail at a power cut;"
                " choose a disk, or set RELAY_UNSAFE_DURABILITY=1 for a test"
            )
        try:
            self._identity = self._identify(engine)
        except OSError as error:
            raise SpoolError(
                f"RELAY_SPOOL_DIR: {error.filename or self.directory}: {error.strerror}"
            ) from None

    def _identify(self, engine: Engine) -> str:
        """Marry the database to this directory the first time, and insist on it ever after; the
        spool's identity."""
        spell = dialect_of(engine)
        with writing(engine) as connection:
            if spell.postgresql:  # services start together; SQLite's writers take turns anyway
                connection.execute(text("LOCK TABLE spool IN EXCLUSIVE MODE"))
            known = connection.execute(text(spell(_KNOWN))).scalar()
            written = _identity_in(self.handle)
            if known is None:
                written = written or self._mark()
                connection.execute(
                    text(spell("INSERT INTO spool (id, created_at) VALUES (:id, @now)")),
                    {"id": dashed(written)},
                )
            elif known != written:
                raise SpoolError(
                    f"RELAY_SPOOL_DIR: {self.directory} is not the spool of this database: it says"
                    f" {written or 'nothing'}, the database knows {known}. Mount the right one; nothing was touched"
                )
        return written

    def _mark(self) -> str:
        """Give the directory an identity, whole or not at all."""
        identity, half, root = new_id(), f"{_MARK}.new", self.handle
        handle = os.open(
            half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=root
        )
        try:
            _write_all(handle, identity.encode() + b"\n")
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(half, _MARK, src_dir_fd=root, dst_dir_fd=root)
        os.fsync(root)
        return identity


def _known(engine: Engine) -> str | None:
    """The identity of the spool that this database knows, if it knows one."""
    with reading(engine) as connection:
        found: str | None = connection.execute(text(dialect_of(engine)(_KNOWN))).scalar()
    return found


def file_system(directory: Path) -> str:
    """The type of the file system that a directory is on, as the kernel names it; empty where that
    cannot be told."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return ""
    real = os.path.realpath(directory)
    below = [
        (m[1], m[2]) for m in mounts if real == m[1] or real.startswith(m[1].rstrip("/") + "/")
    ]
    return max(below, key=lambda m: len(m[0]))[1] if below else ""
