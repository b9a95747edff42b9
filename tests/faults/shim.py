"""The control of shim.c: faults of the disk and steps of the clock, while programs run.

`compile_shim` builds the library once for a run. A `FaultShim` belongs to the processes that were
started with its `environ`. The processes map its control file, so a change takes effect at once.
"""

import mmap
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FIELDS = struct.Struct("qiiiiIII228s")  # as `struct control` has them
_PLACE = struct.Struct("qq240s")  # behind them
_SIZE = _FIELDS.size + _PLACE.size
_CLOCK = struct.Struct("q")
EVERY = 3  # a fault of the disk hits each third call


def why_no_shim() -> str:
    """Why this machine cannot compile it; empty if it can."""
    return "" if shutil.which("cc") else "no C compiler"


def compile_shim(directory: Path) -> Path | None:
    """The library, in that directory; None if this machine cannot compile it."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    library = directory / "shim.so"
    source = Path(__file__).with_name("shim.c")
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror"]
    subprocess.run([*command, "-o", str(library), str(source), "-ldl"], check=True)
    library.chmod(0o755)
    return library


class FaultShim:
    """One set of processes and their faults. `prefix`: faults of the disk hit files below it."""

    def __init__(self, library: Path, control: Path, prefix: Path) -> None:
        self.environ = {"LD_PRELOAD": str(library), "FAULTS_CONTROL": str(control)}
        self._prefix = os.fsencode(prefix)
        control.write_bytes(bytes(_SIZE))
        control.chmod(0o666)  # PostgreSQL runs as another user
        with control.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE)
        self._set()

    @property
    def hits(self) -> int:
        """How many calls were changed so far."""
        return int(_FIELDS.unpack_from(self._map)[7])

    @contextmanager
    def disk(
        self,
        *,
        write: int = 0,
        sync: int = 0,
        read: int = 0,
        short: bool = False,
        prefix: Path | None = None,
    ) -> Iterator[None]:
        """Fail each third of these calls with an errno, as long as the block runs; below another
        `prefix` if one is given."""
        usual = self._prefix
        self._prefix = os.fsencode(prefix) if prefix else usual
        self._set(write, sync, read, short=short)
        try:
            yield
        finally:
            self._prefix = usual
            self._set()

    @contextmanager
    def bad_place(self, prefix: Path, start: int, end: int) -> Iterator[None]:
        """Fail every read of these octets with EIO, in files whose paths begin with `prefix`, as
        long as the block runs."""
        _PLACE.pack_into(self._map, _FIELDS.size, start, end, os.fsencode(prefix))
        try:
            yield
        finally:
            _PLACE.pack_into(self._map, _FIELDS.size, 0, 0, b"")

    def step_clock(self, seconds: float) -> None:
        """Set the wall clock so far from the true one."""
        _CLOCK.pack_into(self._map, 0, int(seconds * 1e9))

    def _set(self, write: int = 0, sync: int = 0, read: int = 0, *, short: bool = False) -> None:
        clock, *_, hits, _ = _FIELDS.unpack_from(self._map)
        _FIELDS.pack_into(
            self._map, 0, clock, write, sync, read, int(short), EVERY, 0, hits, self._prefix
        )
