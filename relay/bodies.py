"""Message bodies: one file a message, in LF form, exactly the bytes that QMQP will carry.

Files are named by the queue id and stand in directories named by its first eight hex digits, about a minute of arrivals
each: fresh files share a directory that is in memory, and a directory that has emptied is removed. A body is written
once, synced (file, then directory) before its message may be committed, read by workers, and removed when no delivery
needs it.

What must stay true: a body that returned from `store` or `finish` survives a power cut; one that failed leaves nothing
behind; a file is never changed once it was synced. The spool knows its identity (`spool-id`) and so does the database
(table `spool`): on another directory nobody runs, because there every body would look lost.
"""

import errno
import os
import stat
from collections.abc import Buffer, Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from sqlalchemy import Engine, text

from relay.database import writing
from relay.dialect import dialect_of
from relay.ids import dashed, new_id

SYNC_EVERY = 8 << 20
_DIRECTORY_DIGITS = 8
_TMPFS_MAGIC = {"tmpfs", "ramfs"}


class SpoolError(Exception):
    """The spool directory cannot be used; the text says why and what to do."""


class BodyUnsendable(Exception):
    """The body can never be sent as it is."""


class BodyMissing(BodyUnsendable):
    """There is no file."""


class BodyWrongSize(BodyUnsendable):
    """The file is not as long as the database says."""


def _sync_directory(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _attempt(call: Callable[[str], None], argument: str) -> OSError | None:
    """The error of a call, if it has one."""
    try:
        call(argument)
    except OSError as error:
        return error
    return None


def _write_all(handle: int, data: Buffer) -> int:
    """Write every byte; the count."""
    rest = memoryview(data)
    total = len(rest)
    while rest:
        rest = rest[os.write(handle, rest) :]
    return total


class Body:
    """A body being written: blocking calls, one caller at a time."""

    def __init__(self, path: str, handle: int) -> None:
        self._path, self._handle, self._unsynced = path, handle, 0
        self.directory = os.path.dirname(path)
        self.size = 0

    def append(self, data: Buffer) -> None:
        """Write more; raises OSError, and then the file is gone."""
        try:
            written = _write_all(self._handle, data)
            self.size += written
            self._unsynced += written
            if self._unsynced >= SYNC_EVERY:
                os.fdatasync(self._handle)
                # Nobody reads it before the worker does: give the memory back while the rest arrives.
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
        """Sync file and directory, close; the size in bytes. Raises OSError, and then the file is gone."""
        self.sync()
        try:
            _sync_directory(self.directory)
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
                os.unlink(self._path)

    def close(self) -> None:
        """Close what was synced."""
        handle, self._handle = self._handle, -1
        with suppress(OSError):  # it has nothing to say that the sync before it, or giving up, did not settle
            os.close(handle)


class Spool:
    """The directory of bodies."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._root = directory, str(directory)
        self._identity = ""
        self._synced = ""  # the directory of bodies whose own name we synced last

    def path(self, message_id: str) -> Path:
        """Where the body of a message stands."""
        return Path(self._name(message_id))

    def _name(self, message_id: str) -> str:
        return f"{self._root}/{message_id[:_DIRECTORY_DIGITS]}/{message_id}"

    def store(self, message_id: str, parts: Sequence[bytes]) -> int:
        """Create, write and sync a small body; its size in bytes. Raises OSError, and then nothing is left."""
        (found,) = self.store_all([(message_id, parts)])
        if isinstance(found, OSError):
            raise found
        return found

    def store_all(self, bodies: Sequence[tuple[str, Sequence[bytes]]]) -> list[int | OSError]:
        """Create, write and sync small bodies together; the size of each, or the error that left nothing of it.

        The kernel is told to begin with all of them before one is waited for, so that one commit of the file system's
        journal does for many: it takes a few threads and half of the CPU that one by one and in parallel costs.
        """
        found: dict[int, Body | OSError] = {}
        for number, (message_id, parts) in enumerate(bodies):
            try:
                found[number] = body = self.create(message_id)
                body.append(b"".join(parts))
                body.begin_sync()
            except OSError as error:
                found[number] = error
        for number, one in found.items():
            if isinstance(one, Body):
                try:
                    one.sync()
                except OSError as error:
                    found[number] = error
        return self._finish_all([one for _, one in sorted(found.items())])

    def _finish_all(self, found: list[Body | OSError]) -> list[int | OSError]:
        """Sync the directories of these synced bodies, each once, and close them."""
        failed: dict[str, OSError | None] = {}
        results: list[int | OSError] = []
        for one in found:
            if isinstance(one, OSError):
                results.append(one)
                continue
            if one.directory not in failed:
                failed[one.directory] = _attempt(_sync_directory, one.directory)
            error = failed[one.directory]
            if error is not None:
                one.discard()
            else:
                one.close()
            results.append(error or one.size)
        return results

    def create(self, message_id: str) -> Body:
        """Start a body; raises OSError (FileExistsError for an id that has one)."""
        directory = message_id[:_DIRECTORY_DIGITS]
        path = self._name(message_id)
        while True:
            if self._synced != directory:  # whoever made it may not have synced it yet
                os.makedirs(f"{self._root}/{directory}", mode=0o700, exist_ok=True)
                _sync_directory(self._root)
                self._synced = directory
            try:
                return Body(path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            except FileNotFoundError:
                if not self._synced:
                    raise
                self._synced = ""  # housekeeping has removed it since

    def open(self, message_id: str, size: int) -> int:
        """A read-only file descriptor; raises BodyUnsendable, or OSError for a fault that is not the body's."""
        try:
            handle = os.open(self._name(message_id), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._insist()
            raise BodyMissing(f"no body file {message_id}") from None
        found = os.fstat(handle).st_size
        if found == size:
            return handle
        os.close(handle)
        raise BodyWrongSize(f"the body file has {found} bytes, not {size}")

    def _insist(self) -> None:
        """Raise OSError unless this is still our spool: a lost mount is no reason to give up every message."""
        if (self.directory / "spool-id").read_text().strip() != self._identity and self._identity:
            raise OSError(errno.ESTALE, "another spool has been put in place of ours", str(self.directory))

    def remove(self, message_id: str) -> bool:
        """Remove a body that nobody needs; False if it was gone. Never raises: what stays, housekeeping finds."""
        try:
            os.unlink(self._name(message_id))
        except OSError:
            return False
        return True

    def ids(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Every body file there is, oldest directory first."""
        for directory in sorted(self.directory.glob("[0-9a-f]" * _DIRECTORY_DIGITS)):
            with os.scandir(directory) as entries:
                yield from ((entry.name, entry) for entry in entries if len(entry.name) == 32)

    def free_bytes(self) -> int:
        """Room that is left for us on the spool's file system."""
        found = os.statvfs(self.directory)
        return found.f_bavail * found.f_frsize

    def prepare(self, engine: Engine, *, unsafe: bool = False) -> None:
        """Make or check the directory, and that it is the one this database knows; raises SpoolError."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = os.stat(self.directory)
        except OSError as error:
            raise SpoolError(f"RELAY_SPOOL_DIR: {self.directory}: {error.strerror}") from None
        if found.st_mode & stat.S_IWOTH:
            raise SpoolError(f"RELAY_SPOOL_DIR: {self.directory} is writable by everybody: chmod o-w it")
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
            raise SpoolError(f"RELAY_SPOOL_DIR: {error.filename or self.directory}: {error.strerror}") from None

    def _identify(self, engine: Engine) -> str:
        """Marry the database to this directory the first time, and insist on it ever after; the spool's identity."""
        spell, marker = dialect_of(engine), self.directory / "spool-id"
        with writing(engine) as connection:
            if spell.postgresql:  # services start together; SQLite's writers take turns anyway
                connection.execute(text("LOCK TABLE spool IN EXCLUSIVE MODE"))
            known = connection.execute(text(spell("SELECT @hex(id) FROM spool"))).scalar()
            written = marker.read_text().strip() if marker.exists() else ""
            if known is None:
                written = written or self._mark(marker)
                connection.execute(
                    text(spell("INSERT INTO spool (id, created_at) VALUES (:id, @now)")), {"id": dashed(written)}
                )
            elif known != written:
                raise SpoolError(
                    f"RELAY_SPOOL_DIR: {self.directory} is not the spool of this database: it says"
                    f" {written or 'nothing'}, the database knows {known}. Mount the right one; nothing was touched"
                )
        return written

    def _mark(self, marker: Path) -> str:
        """Give the directory an identity, whole or not at all."""
        identity, half = new_id(), marker.with_suffix(".new")
        handle = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(handle, identity.encode() + b"\n")
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(half, marker)
        _sync_directory(self.directory)
        return identity


def file_system(directory: Path) -> str:
    """The type of the file system that a directory is on, as the kernel names it; empty where that cannot be told."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return ""
    real = os.path.realpath(directory)
    below = [(m[1], m[2]) for m in mounts if real == m[1] or real.startswith(m[1].rstrip("/") + "/")]
    return max(below, key=lambda m: len(m[0]))[1] if below else ""
