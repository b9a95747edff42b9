"""The spool: a stored body is on disk, a failed one leaves no file, and another directory is never
used as the spool."""

import errno
import os
import resource
import shutil
import stat
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from relay.db.engine import reading
from relay.ids import new_id
from relay.spool import store
from relay.spool.store import BodyUnsendable, Spool, SpoolError, file_system
from relay.spool.trailer import FIXED_SIZE, encode_trailer, read_envelope, read_trailer
from tests.bodies import body_in
from tests.waiting import until

LIMIT = 1 << 20


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were synced, in order."""
    paths: list[str] = []

    def watched(real: Callable[[int], None]) -> Callable[[int], None]:
        def sync(handle: int) -> None:
            paths.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
            real(handle)

        return sync

    monkeypatch.setattr(os, "fsync", watched(os.fsync))
    monkeypatch.setattr(os, "fdatasync", watched(os.fdatasync))
    return paths


@contextmanager
def full_disk(limit: int = LIMIT) -> Iterator[None]:
    """No file may grow past the limit: writing answers EFBIG, as a full disk answers ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(spool: Spool) -> list[str]:
    return sorted(
        path.name
        for path in spool.directory.rglob("*")
        if path.is_file() and path.name != "spool-id"
    )


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# --- writing
# ----------------------------------------------------------------------------------------------


def test_stored_body_is_synced_with_its_directory(spool: Spool, synced: list[str]) -> None:
    queue_id = new_id()
    assert spool.store(queue_id, [b"Received: x\n", b"Subject: y\n", b"\nbody\n"]) == 29
    path = spool.path(queue_id)
    assert body_in(path) == b"Received: x\nSubject: y\n\nbody\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert synced.index(str(path)) < synced.index(str(path.parent)), (
        "the file before its directory entry"
    )
    assert str(spool.directory) in synced, "and the directory that was made for it"
    synced.clear()
    other = queue_id[:8] + new_id()[8:]
    spool.store(other, [b"x"])
    assert synced == [str(spool.path(other)), str(path.parent)]


def test_directory_of_another_process_is_synced(spool: Spool, synced: list[str]) -> None:
    """The other process may not have synced it yet."""
    queue_id = new_id()
    spool.path(queue_id).parent.mkdir()
    spool.store(queue_id, [b"x"])
    assert str(spool.directory) in synced


def test_large_body_is_synced_while_it_arrives(
    spool: Spool, synced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SYNC_EVERY", 1000)
    queue_id = new_id()
    body = spool.create(queue_id)
    path = str(spool.path(queue_id))
    sizes = []
    for _ in range(5):
        body.append(b"x" * 400)
        sizes.append(synced.count(path))
    assert sizes == [0, 0, 1, 1, 1]
    assert body.size == 2000 == body.finish(b"")
    assert synced[-2:] == [path, str(spool.path(queue_id).parent)]
    assert len(body_in(spool.path(queue_id))) == 2000


class HeldSync:
    """The first fdatasync waits until `gate` is set, and fails if a `fault` is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fault: int = 0) -> None:
        self.entered, self.gate = threading.Event(), threading.Event()
        self.handles: list[int] = []  # of all calls
        self._fault = fault
        self._sync = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", self)
        monkeypatch.setattr(store, "SYNC_EVERY", 1000)

    def __call__(self, handle: int) -> None:
        first = not self.handles
        self.handles.append(handle)
        if first:
            self.entered.set()
            assert self.gate.wait(20)
            if self._fault:
                raise OSError(self._fault, os.strerror(self._fault))
        self._sync(handle)


def test_body_grows_while_another_thread_syncs_it(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, queue_id = HeldSync(monkeypatch), new_id()
    with ThreadPoolExecutor(2) as pool:
        body = spool.create(queue_id, pool.submit)
        body.append(b"x" * 1000)
        assert held.entered.wait(20)
        body.append(b"y" * 999)
        finishing = pool.submit(body.finish, b"")
        assert not finishing.done()
        held.gate.set()
        assert finishing.result(20) == 1999
    assert len(held.handles) == 2
    assert body_in(spool.path(queue_id)) == b"x" * 1000 + b"y" * 999


def test_body_waits_for_a_disk_that_is_behind(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise all of a large body could lie in the page cache."""
    held = HeldSync(monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        body = spool.create(new_id(), pool.submit)
        body.append(b"x" * 1000)
        assert held.entered.wait(20)
        appending = pool.submit(body.append, b"y" * 1000)
        until(lambda: body.size == 2000)
        assert not appending.done()
        held.gate.set()
        appending.result(20)
    assert len(held.handles) == 2, "the second sync was made at once"
    body.discard()


def test_fault_of_a_sync_in_another_thread_fails_finish(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports it once, so the sync of `finish` succeeds."""
    held = HeldSync(monkeypatch, errno.EIO)
    with ThreadPoolExecutor(2) as pool:
        body = spool.create(new_id(), pool.submit)
        body.append(b"x" * 1000)
        assert held.entered.wait(20)
        finishing = pool.submit(body.finish, b"")
        held.gate.set()
        assert isinstance(fault := finishing.exception(20), OSError)
    assert fault.errno == errno.EIO
    assert files(spool) == []


def test_fault_of_a_sync_in_another_thread_fails_the_next_append(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Callable[[], None]] = []
    monkeypatch.setattr(store, "SYNC_EVERY", 1000)
    body = spool.create(new_id(), calls.append)
    body.append(b"x" * 1000)
    [sync] = calls
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing(errno.ENOSPC))
        sync()
    with pytest.raises(OSError) as caught:
        body.append(b"y")
    assert caught.value.errno == errno.ENOSPC
    assert files(spool) == []


def test_discarded_body_is_synced_no_more(spool: Spool, synced: list[str]) -> None:
    """Its descriptor may belong to another file by then, whose error this sync would take."""
    calls: list[Callable[[], None]] = []
    body = spool.create(new_id(), calls.append)
    body.append(bytes(store.SYNC_EVERY))
    body.discard()
    synced.clear()
    [sync] = calls
    sync()
    assert synced == []


def test_discard_waits_for_a_sync(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldSync(monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        body = spool.create(new_id(), pool.submit)
        body.append(b"x" * 1000)
        assert held.entered.wait(20)
        discarding = pool.submit(body.discard)
        os.fstat(held.handles[0])  # it is open
        assert not discarding.done()
        held.gate.set()
        discarding.result(20)
    assert files(spool) == []


def test_discarded_body_is_removed(spool: Spool) -> None:
    body = spool.create(new_id())
    body.append(b"half")
    body.discard()
    body.discard()
    assert files(spool) == []


def test_empty_body_is_stored(spool: Spool) -> None:
    queue_id = new_id()
    assert spool.store(queue_id, [b""]) == 0
    spool.open(queue_id, 0).close()


def test_queue_id_has_one_body(spool: Spool) -> None:
    queue_id = new_id()
    spool.store(queue_id, [b"first"])
    with pytest.raises(FileExistsError):
        spool.store(queue_id, [b"second"])
    assert body_in(spool.path(queue_id)) == b"first"


def test_many_threads_store_concurrently(spool: Spool) -> None:
    ids = [new_id() for _ in range(200)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: spool.store(i, [i.encode()]), ids))
    assert [body_in(spool.path(i)).decode() for i in ids] == ids
    assert {name for name, _ in spool.ids()} == set(ids)


def test_removed_directory_is_made_again(spool: Spool) -> None:
    first = new_id()
    spool.store(first, [b"x"])
    spool.remove(first)
    spool.path(first).parent.rmdir()
    second = first[:8] + new_id()[8:]
    assert spool.store(second, [b"y"]) == 1


# --- failures leave nothing
# -------------------------------------------------------------------------------


def test_full_disk_leaves_nothing_of_a_small_body(spool: Spool) -> None:
    with full_disk(), pytest.raises(OSError) as caught:
        spool.store(new_id(), [b"x" * LIMIT, b"y"])
    assert caught.value.errno == errno.EFBIG
    assert files(spool) == []


def test_full_disk_leaves_nothing_of_a_large_body(spool: Spool) -> None:
    body = spool.create(new_id())
    body.append(b"x" * (LIMIT - 10))
    with full_disk(), pytest.raises(OSError):
        body.append(b"x" * 20)
    assert files(spool) == []
    body.discard()


def test_missing_permission_leaves_nothing(spool: Spool) -> None:
    """Root becomes another user; otherwise the directory is made read-only."""
    queue_id = new_id()
    with unprivileged(spool.directory), pytest.raises(PermissionError):
        spool.store(queue_id, [b"x"])
    assert files(spool) == []


@contextmanager
def unprivileged(directory: Path) -> Iterator[None]:
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
        return
    directory.chmod(0o500)
    try:
        yield
    finally:
        directory.chmod(0o700)


@pytest.mark.parametrize("call", ["fdatasync", "fsync"])
def test_body_whose_sync_fails_is_removed(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """After an fsync error the kernel may have dropped the pages, so the file is useless."""
    spool.store(new_id(), [b"the directory exists"])
    before = files(spool)
    monkeypatch.setattr(os, call, failing(errno.EIO))
    with pytest.raises(OSError) as caught:
        spool.store(new_id(), [b"x"])
    assert caught.value.errno == errno.EIO
    body = spool.create(new_id())
    body.append(b"x")
    with pytest.raises(OSError):
        body.finish(b"")
    assert files(spool) == before


def test_large_body_whose_sync_fails_halfway_is_removed(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SYNC_EVERY", 10)
    body = spool.create(new_id())
    monkeypatch.setattr(os, "fdatasync", failing(errno.ENOSPC))
    with pytest.raises(OSError):
        body.append(b"x" * 20)
    assert files(spool) == []


def test_body_whose_close_fails_is_removed(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS `close` may report a full disk."""
    body = spool.create(new_id())
    close = os.close

    def failing_close(handle: int) -> None:
        close(handle)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", failing_close)
        body.discard()
    assert files(spool) == []


def test_failures_leak_no_descriptor(spool: Spool) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    assert spool.free_bytes() > 0  # from now on the directory is held
    before = open_files()
    with full_disk():
        for _ in range(5):
            with pytest.raises(OSError):
                spool.store(new_id(), [b"x" * LIMIT, b"y"])
    for _ in range(5):
        queue_id = new_id()
        spool.store(queue_id, [b"x"])
        with pytest.raises(BodyUnsendable, match="the body file has"):
            spool.open(queue_id, 2)
        with pytest.raises(BodyUnsendable, match="no body file"):
            spool.open(new_id(), 2)
    assert open_files() == before


# --- reading and removing
# ---------------------------------------------------------------------------------


def test_body_is_read_while_it_is_removed(spool: Spool) -> None:
    queue_id = new_id()
    spool.store(queue_id, [b"hello"])
    body = spool.open(queue_id, 5)
    assert os.read(body.fd, 5) == b"hello"
    assert spool.remove(queue_id), "also while it is open"
    body.close()
    assert not spool.remove(queue_id)


def test_missing_body_and_wrong_size_are_distinguished(spool: Spool) -> None:
    queue_id = new_id()
    with pytest.raises(BodyUnsendable, match=f"no body file {queue_id}"):
        spool.open(queue_id, 5)
    spool.store(queue_id, [b"hello"])
    for size in (4, 6, 0):
        with pytest.raises(BodyUnsendable, match="has 5 bytes"):
            spool.open(queue_id, size)


def test_missing_spool_is_not_a_missing_body(spool: Spool) -> None:
    """An unmounted volume must not condemn every message in the queue."""
    queue_id = new_id()
    spool.store(queue_id, [b"hello"])
    spool.directory.rename(spool.directory.with_name("elsewhere"))
    for absent in (True, False):
        spool.open(queue_id, 5).close()  # an existing body
        with pytest.raises(OSError) as caught:
            spool.open(new_id(), 5)
        assert caught.value.errno == errno.ENOENT
        if absent:
            spool.directory.mkdir()  # the empty mount point


def test_replaced_spool_is_not_a_missing_body(spool: Spool, engine: Engine, tmp_path: Path) -> None:
    spool.prepare(engine, unsafe=True)
    queue_id = new_id()
    spool.directory.rename(tmp_path / "right")
    spool.directory.mkdir()
    (spool.directory / "spool-id").write_text(f"{new_id()}\n")
    with pytest.raises(OSError) as caught:
        spool.open(queue_id, 5)
    assert caught.value.errno == errno.ESTALE
    with pytest.raises(OSError) as caught:
        spool.store(queue_id, [b"hello"])
    assert caught.value.errno == errno.ESTALE


def test_nothing_is_stored_in_a_bare_mount_point(spool: Spool, tmp_path: Path) -> None:
    """The bare mount point: a body that is stored there is gone when the file system is back."""
    spool.store(first := new_id(), [b"hello"])
    spool.directory.rename(tmp_path / "elsewhere")
    for absent in (True, False):
        with pytest.raises(FileNotFoundError):
            spool.store(new_id(), [b"lost"])
        with pytest.raises(FileNotFoundError):
            spool.create(new_id())
        if absent:
            spool.directory.mkdir()
    assert [*spool.directory.iterdir()] == []
    spool.directory.rmdir()
    (tmp_path / "elsewhere").rename(spool.directory)
    spool.store(second := new_id(), [b"hello"])
    assert files(spool) == sorted([first, second])


def test_remounted_spool_is_known_by_its_identity(spool: Spool, tmp_path: Path) -> None:
    """The kernel may report another inode, for example on a network file system."""
    spool.store(first := new_id(), [b"hello"])
    shutil.copytree(spool.directory, tmp_path / "again")
    spool.directory.rename(tmp_path / "before")
    (tmp_path / "again").rename(spool.directory)
    spool.store(second := new_id(), [b"hello"])
    assert files(spool) == sorted([first, second])
    assert {name for name, _ in spool.ids()} == {first, second}


def test_body_is_opened_again_after_the_identity_was_checked(spool: Spool, tmp_path: Path) -> None:
    """The file system was mounted between the two."""
    queue_id = new_id()
    assert spool.free_bytes() > 0  # from now on the directory is held
    shutil.copytree(spool.directory, tmp_path / "again")
    Spool(tmp_path / "again").store(queue_id, [b"hello"])
    spool.directory.rename(tmp_path / "before")
    (tmp_path / "again").rename(spool.directory)
    spool.open(queue_id, 5).close()


def test_body_in_orphans_is_opened_and_removed(spool: Spool) -> None:
    """Its row appeared after the cleaner had moved the file, or came back from a backup."""
    spool.store(queue_id := new_id(), [b"hello"])
    spool.move_to_orphans(queue_id)
    assert not spool.path(queue_id).exists()
    spool.open(queue_id, 5).close()
    assert spool.remove(queue_id)
    with pytest.raises(BodyUnsendable, match="no body file"):
        spool.open(queue_id, 5)


# --- trailers
# ----------------------------------------------------------------------------------------------


def test_body_file_ends_with_its_envelope_and_checksums(spool: Spool, synced: list[str]) -> None:
    queue_id, envelope = new_id(), b'{"id": 1}\n\n'
    body = spool.create(queue_id)
    body.append(b"hel")
    body.append(b"lo")
    assert body.finish(envelope) == 5
    path = spool.path(queue_id)
    assert path.stat().st_size == 5 + len(envelope) + FIXED_SIZE
    with path.open("rb") as file:
        trailer = read_trailer(file.fileno())
        assert trailer is not None
        assert (trailer.size, trailer.checksum) == (5, zlib.crc32(b"hello"))
        assert read_envelope(file.fileno(), trailer) == envelope
    opened = spool.open(queue_id, 5)
    opened.close()
    assert (opened.size, opened.checksum) == (5, zlib.crc32(b"hello"))


def test_file_of_an_earlier_version_has_no_trailer(spool: Spool) -> None:
    queue_id = new_id()
    spool.path(queue_id).parent.mkdir()
    spool.path(queue_id).write_bytes(b"hello")
    opened = spool.open(queue_id, 5)
    opened.close()
    assert (opened.size, opened.checksum) == (5, None)


@pytest.mark.parametrize("at", range(-FIXED_SIZE, 0))
def test_damaged_trailer_is_no_trailer(spool: Spool, at: int) -> None:
    queue_id = new_id()
    spool.store(queue_id, [b"hello"], b"envelope")
    path = spool.path(queue_id)
    octets = bytearray(path.read_bytes())
    octets[at] ^= 1
    path.write_bytes(octets)
    with path.open("rb") as file:
        assert read_trailer(file.fileno()) is None
    with pytest.raises(BodyUnsendable, match=f"the body file has {len(octets)} bytes, not 5"):
        spool.open(queue_id, 5)


def test_damaged_envelope_is_not_returned(spool: Spool) -> None:
    queue_id = new_id()
    spool.store(queue_id, [b"hello"], b"envelope")
    path = spool.path(queue_id)
    path.write_bytes(path.read_bytes().replace(b"envelope", b"envelopf"))
    with path.open("rb") as file:
        trailer = read_trailer(file.fileno())
        assert trailer is not None
        assert read_envelope(file.fileno(), trailer) is None


def test_trailer_counts_only_at_the_end_of_a_file_of_its_size(tmp_path: Path) -> None:
    """A body that ends as a trailer does is no trailer."""
    trailer = encode_trailer(5, zlib.crc32(b"hello"), b"")
    for content, valid in ((b"hello" + trailer, True), (b"hell" + trailer, False), (b"", False)):
        path = tmp_path / "body"
        path.write_bytes(content)
        with path.open("rb") as file:
            assert (read_trailer(file.fileno()) is not None) == valid


# --- the right directory
# ----------------------------------------------------------------------------------


def known(engine: Engine) -> list[str]:
    with reading(engine) as connection:
        return [
            str(row[0]).replace("-", "") for row in connection.execute(text("SELECT id FROM spool"))
        ]


def test_new_spool_gets_an_identity(engine: Engine, tmp_path: Path, synced: list[str]) -> None:
    spool = Spool(tmp_path / "deep" / "spool")
    spool.prepare(engine, unsafe=True)
    identity = (spool.directory / "spool-id").read_text().strip()
    assert known(engine) == [identity]
    assert stat.S_IMODE(spool.directory.stat().st_mode) == 0o700
    assert str(spool.directory) in synced
    spool.prepare(engine, unsafe=True)
    assert known(engine) == [identity]
    assert sorted(path.name for path in spool.directory.iterdir()) == ["journal", "spool-id"]


def test_other_spool_is_refused_and_not_touched(engine: Engine, tmp_path: Path) -> None:
    Spool(tmp_path / "right").prepare(engine, unsafe=True)
    for marker in (None, f"{new_id()}\n", ""):
        wrong = tmp_path / f"wrong-{marker!s:.4}".strip()
        wrong.mkdir()
        (wrong / "mail").write_text("mail")
        if marker is not None:
            (wrong / "spool-id").write_text(marker)
        before = sorted((p.name, p.read_text()) for p in wrong.iterdir())
        with pytest.raises(SpoolError, match="nothing was touched"):
            Spool(wrong).prepare(engine, unsafe=True)
        assert sorted((p.name, p.read_text()) for p in wrong.iterdir()) == before
    assert len(known(engine)) == 1


def test_missing_spool_is_not_made_again(engine: Engine, tmp_path: Path) -> None:
    """Its file system may not be mounted yet, for example after a reboot."""
    place = tmp_path / "mount" / "spool"
    Spool(place).prepare(engine, unsafe=True)
    place.parent.rename(tmp_path / "elsewhere")
    with pytest.raises(SpoolError, match=r"mount it. Nothing was touched"):
        Spool(place).prepare(engine, unsafe=True)
    assert not place.parent.exists()


def test_identity_that_the_database_lacks_is_recorded(engine: Engine, spool: Spool) -> None:
    identity = (spool.directory / "spool-id").read_text().strip()
    spool.prepare(engine, unsafe=True)
    assert known(engine) == [identity]


def test_truncated_identity_is_written_again(engine: Engine, spool: Spool) -> None:
    (spool.directory / "spool-id").write_text("")
    spool.prepare(engine, unsafe=True)
    assert known(engine) == [(spool.directory / "spool-id").read_text().strip()]


def test_services_may_start_together_on_a_new_spool(engine: Engine, tmp_path: Path) -> None:
    barrier = threading.Barrier(4)

    def start(_: int) -> None:
        barrier.wait(10)
        Spool(tmp_path / "new").prepare(engine, unsafe=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(start, range(4)))
    assert known(engine) == [(tmp_path / "new" / "spool-id").read_text().strip()]


def test_C32_unusable_directory_is_refused(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = tmp_path / "public"
    public.mkdir()
    public.chmod(0o777)
    with pytest.raises(SpoolError, match="writable by everybody"):
        Spool(public).prepare(engine, unsafe=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match="RELAY_SPOOL_DIR"):
        Spool(tmp_path / "file" / "spool").prepare(engine, unsafe=True)
    monkeypatch.setattr(store, "file_system", lambda _: "tmpfs")
    with pytest.raises(SpoolError, match="loses mail"):
        Spool(tmp_path / "memory").prepare(engine)
    Spool(tmp_path / "memory").prepare(engine, unsafe=True)


def test_unreadable_identity_is_explained(engine: Engine, spool: Spool) -> None:
    (spool.directory / "spool-id").unlink()
    (spool.directory / "spool-id").mkdir()
    with pytest.raises(SpoolError, match="RELAY_SPOOL_DIR"):
        spool.prepare(engine, unsafe=True)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux'")
def test_file_system_has_its_name(tmp_path: Path) -> None:
    assert file_system(Path("/proc")) == "proc"
    assert file_system(tmp_path / "not" / "there" / "yet") == file_system(tmp_path)


def test_free_bytes_are_reported(spool: Spool) -> None:
    assert spool.free_bytes() > 0
