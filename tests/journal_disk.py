"""A simulated disk with the methods of `JournalDirectory` and `SegmentFile`, for crashes.

Everything is in memory. A file has octets in the page cache and octets on the disk, in sectors. A
killed process loses its locks; a power cut also loses what was not synced: each sector may be kept,
lost or torn, and each change of a name may be kept or lost, in any combination. A sync that fails
leaves any sectors on the disk and calls all of them clean, as the kernel does.

Every call is a step. A plan says what happens at some steps: the call fails, the process is killed,
or it is paused while others work.
"""

import errno
import random
import weakref
from collections import Counter
from collections.abc import Buffer, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from relay.spool.journal.directory import ADOPTED, OWNED, JournalDirectory, SegmentFile

SECTOR = 512


class Interruption(Enum):
    """What happens at a step. SHORT: a write ends early (other calls fail)."""

    FAIL = "fail"
    SHORT = "short"
    KILL = "kill"
    PAUSE = "pause"


type Plan = Mapping[tuple[str, int], Interruption]
"""What happens at the n-th call of a name."""
CALLS = (
    "write",
    "sync",
    "leads_to",
    "rename",
    "sync_names",
    "fill",
    "create",
    "open",
    "lock",
    "unlink",
    "names",
    "read",
    "query",
    "transaction",
    "committed",
)
"""The names of the calls. The last three are those of the database (tests/journal_database.py)."""


class PowerCut(Enum):
    """What becomes of the octets and names that were not synced."""

    LOSES_ALL = "loses all"
    KEEPS_ALL = "keeps all"
    ANY = "any"


class ProcessKilled(BaseException):
    """The simulated process ends here."""


@dataclass(eq=False)
class SimulatedInode:
    """A file. `links` counts its names; `holder` has its lock."""

    cache: bytearray = field(default_factory=bytearray)
    disk: bytearray = field(default_factory=bytearray)
    dirty: set[int] = field(default_factory=set)
    links: int = 0
    sealed: bool = False
    holder: "OpenFile | None" = None

    def write(self, octets: bytes, position: int) -> None:
        """Into the page cache."""
        end = position + len(octets)
        self.cache.extend(bytes(max(0, end - len(self.cache))))
        self.cache[position:end] = octets
        self.dirty.update(range(position // SECTOR, -(-end // SECTOR)))

    def reach_disk(self, sector: int, *, octets: int = SECTOR) -> None:
        """The first octets of a sector reach the disk."""
        start = sector * SECTOR
        end = min(start + octets, len(self.cache))
        self.disk.extend(bytes(max(0, end - len(self.disk))))
        self.disk[start:end] = self.cache[start:end]

    def sync(self) -> None:
        """Everything reaches the disk."""
        for sector in self.dirty:
            self.reach_disk(sector)
        self.dirty.clear()

    def lose_power(self, cut: PowerCut, chance: random.Random) -> None:
        """Only the disk is left."""
        for sector in sorted(self.dirty):
            if cut is PowerCut.KEEPS_ALL:
                self.reach_disk(sector)
            elif cut is PowerCut.ANY:
                self.reach_disk(sector, octets=chance.choice([0, 0, SECTOR, SECTOR, 100]))
        self.dirty.clear()
        self.cache = bytearray(self.disk)
        self.sealed = False  # no sync makes it durable
        self.holder = None


@dataclass(eq=False)
class OpenFile:
    """An open file description: it has the lock, and lives until it is closed."""

    inode: SimulatedInode
    process: "SimulatedProcess"

    def release(self, fd: int = -1) -> None:
        """Closing releases the lock."""
        self.process.files.discard(self)
        if self.inode.holder is self:
            self.inode.holder = None


@dataclass(eq=False)
class SimulatedProcess:
    """An operating system's process. `when_paused` runs while it is stopped."""

    disk: "SimulatedDisk"
    alive: bool = True
    files: set[OpenFile] = field(default_factory=set)
    plan: dict[tuple[str, int], Interruption] = field(default_factory=dict)
    steps: Counter[str] = field(default_factory=Counter)
    when_paused: Callable[[], None] = lambda: None
    at_end: list[Callable[[], object]] = field(default_factory=list)
    sync_failed: bool = False  # of a segment that may have records

    def expect(self, plan: Plan, when_paused: Callable[[], None] = lambda: None) -> None:
        """What happens at the next steps."""
        self.plan, self.steps, self.when_paused = dict(plan), Counter(), when_paused
        self.sync_failed = False

    def step(self, call: str) -> Interruption | None:
        """Before each call; FAIL and SHORT are the caller's to carry out."""
        if not self.alive:
            raise ProcessKilled
        now = self.plan.pop((call, self.steps[call]), None)
        self.steps[call] += 1
        if now is Interruption.KILL:
            self.kill()
            raise ProcessKilled
        if now is Interruption.PAUSE:
            self.when_paused()
            if not self.alive:
                raise ProcessKilled
            return None
        return now

    def fail(self, call: str) -> None:
        """A step that fails, or not, and has no other effects then."""
        if self.step(call) in (Interruption.FAIL, Interruption.SHORT):
            raise OSError(errno.EIO, "simulated failure")

    def lose_locks(self) -> None:
        """A server of a network file system forgets the locks of a process that is silent."""
        for file in self.files:
            if file.inode.holder is file:
                file.inode.holder = None

    def kill(self) -> None:
        """The page cache survives."""
        self.alive = False
        for file in [*self.files]:
            file.release()
        while self.at_end:
            self.at_end.pop()()


@dataclass(frozen=True)
class NameChange:
    """One call that changed the directory: `removed` and `added` are names."""

    removed: str | None
    added: str | None
    inode: SimulatedInode

    def apply(self, names: dict[str, SimulatedInode]) -> None:
        """To a directory in which earlier changes may be missing."""
        if self.removed and names.get(self.removed) is self.inode:
            del names[self.removed]
        if self.added:
            names[self.added] = self.inode


class SimulatedDisk:
    """One journal directory and its files."""

    def __init__(self) -> None:
        self.names: dict[str, SimulatedInode] = {}
        self.durable: dict[str, SimulatedInode] = {}
        self.pending: list[NameChange] = []
        self.processes: list[SimulatedProcess] = []
        self.chance = random.Random(0)

    def start_process(self) -> SimulatedProcess:
        """A new process."""
        process = SimulatedProcess(self)
        self.processes.append(process)
        return process

    def change(self, change: NameChange) -> None:
        """Change a name; a sync makes that durable."""
        replaced = self.names.get(change.added) if change.added else None
        if replaced is not None:
            replaced.links -= 1
        if change.removed:
            del self.names[change.removed]
            change.inode.links -= 1
        if change.added:
            self.names[change.added] = change.inode
            change.inode.links += 1
        self.pending.append(change)

    def has_segment(self, inode: SimulatedInode) -> bool:
        """Whether a file is a segment that was finished."""
        return any(
            inode is one and name.endswith((OWNED, ADOPTED)) for name, one in self.names.items()
        )

    def sync_names(self) -> None:
        """All names are durable."""
        self.durable = dict(self.names)
        self.pending.clear()

    def lose_power(self, cut: PowerCut, seed: int) -> None:
        """All processes end, and what was not synced is kept, lost or torn."""
        chance = random.Random(seed)
        for process in self.processes:
            process.kill()
        for change in self.pending:
            if cut is PowerCut.KEEPS_ALL or (cut is PowerCut.ANY and chance.random() < 0.5):
                change.apply(self.durable)
        inodes = {*self.names.values(), *self.durable.values()}
        self.names = dict(self.durable)
        self.pending.clear()
        for inode in sorted(inodes, key=id):
            inode.lose_power(cut, random.Random(seed))
            inode.links = sum(each is inode for each in self.names.values())


class SimulatedFile(SegmentFile):
    """An open segment."""

    def __init__(self, process: SimulatedProcess, inode: SimulatedInode) -> None:
        self.lost = set[int]()
        self._process, self._inode = process, inode
        self._open = OpenFile(inode, process)
        process.files.add(self._open)
        self.close = weakref.finalize(self, self._open.release, -1)
        self.close.atexit = False

    @property
    def inode(self) -> SimulatedInode:
        """For `SimulatedDirectory.leads_to`."""
        return self._inode

    def fill(self, start: int, size: int) -> None:
        self._process.fail("fill")
        self._inode.write(bytes(size - start), start)
        self._inode.sync()

    def write(self, parts: Sequence[Buffer], position: int) -> int:
        octets, chance = b"".join(bytes(part) for part in parts), self._process.disk.chance
        some = octets[: chance.choice([0, chance.randrange(len(octets) + 1), len(octets)])]
        try:
            now = self._process.step("write")
        except ProcessKilled:
            self._inode.write(some, position)
            raise
        if now in (Interruption.FAIL, Interruption.SHORT):
            self._inode.write(some, position)
            if now is Interruption.SHORT:
                return min(len(some), len(octets) - 1)
            raise OSError(errno.EIO, "simulated failure")
        self._inode.write(octets, position)
        return len(octets)

    def sync(self) -> None:
        if self._process.step("sync") in (Interruption.FAIL, Interruption.SHORT):
            self._process.sync_failed |= self._process.disk.has_segment(self._inode)
            chance = self._process.disk.chance
            share = chance.choice(
                [0.0, 0.5, 1.0]
            )  # of the sectors that reach the disk all the same
            for sector in sorted(self._inode.dirty):
                if chance.random() < share:
                    self._inode.reach_disk(sector)
            self._inode.dirty.clear()
            raise OSError(errno.EIO, "simulated failure")
        self._inode.sync()

    def read(self, size: int, position: int) -> bytes:
        self._process.fail("read")
        return bytes(self._inode.cache[position : position + size])

    def size(self) -> int:
        return len(self._inode.cache)

    def unlinked(self) -> bool:
        return self._inode.links == 0

    def protect(self) -> None:
        self._inode.sealed = True

    def sealed(self) -> bool:
        return self._inode.sealed

    def has_owner(self) -> bool:
        return self._inode.holder not in (None, self._open)

    def lock(self) -> bool:
        self._process.fail("lock")
        if self._inode.holder not in (None, self._open):
            return False
        self._inode.holder = self._open
        return True

    def status(self) -> Any:
        raise NotImplementedError("leads_to compares the inodes")


class SimulatedDirectory(JournalDirectory):
    """The directory as one process sees it."""

    def __init__(self, process: SimulatedProcess) -> None:
        self._process, self._disk = process, process.disk

    def make(self) -> None:
        pass

    def names(self) -> list[str]:
        self._process.fail("names")
        return sorted(self._disk.names)

    def create(self, name: str) -> SegmentFile:
        self._process.fail("create")
        if name in self._disk.names:
            raise FileExistsError(name)
        inode = SimulatedInode()
        self._disk.change(NameChange(None, name, inode))
        file = SimulatedFile(self._process, inode)
        if not file.lock():
            raise BlockingIOError(name)
        return file

    def open(self, name: str, *, write: bool = False) -> SegmentFile:
        self._process.fail("open")
        return SimulatedFile(self._process, self._inode(name))

    def rename(self, old: str, new: str) -> None:
        self._process.fail("rename")
        self._disk.change(NameChange(old, new, self._inode(old)))

    def unlink(self, name: str) -> None:
        self._process.fail("unlink")
        self._disk.change(NameChange(name, None, self._inode(name)))

    def sync(self) -> None:
        self._process.fail("sync_names")
        self._disk.sync_names()

    def free_octets(self) -> int:
        return 1 << 40

    def leads_to(self, name: str, file: SegmentFile) -> bool:
        self._process.fail("leads_to")
        assert isinstance(file, SimulatedFile)
        return self._disk.names.get(name) is file.inode

    def _inode(self, name: str) -> SimulatedInode:
        try:
            return self._disk.names[name]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, name) from None
