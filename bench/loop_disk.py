"""A file system with a journal for one run: an ext4 in a file, on a loop device.

It is mounted in a mount namespace of this process and its children, and the file is unlinked while
it is mounted. So the kernel removes all of it with the last process of the benchmark, however that
ends. The file is written once before, so that no block is allocated during a measurement.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.services import find_program, not_installed

_BLOCK = bytes(1 << 20)
# All inode tables and the journal are written now, not by the kernel during the measurements.
_MKFS = ("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0")


def missing() -> str:
    """The reason why there can be no loop disk here; empty if there can."""
    if reason := not_installed("mkfs.ext4", "mount", "umount"):
        return reason
    return "" if os.geteuid() == 0 else "only root may mount"


@contextmanager
def mounted(directory: Path, size: int) -> Iterator[Path]:
    """The directory where a new ext4 of `size` bytes is mounted, until the end of the block. Its
    file is in `directory`. Call this before there are threads: they would not see the mount.

    Raises OSError or CalledProcessError when it cannot be made.
    """
    os.unshare(os.CLONE_NEWNS)
    _run("mount", "--make-rprivate", "/")
    with tempfile.TemporaryDirectory(prefix="bench-disk-", dir=directory) as name:
        image, top = Path(name, "image"), Path(name, "top")
        Path(name).chmod(0o711)  # other users run PostgreSQL and Postfix
        top.mkdir()
        with image.open("wb") as file:
            for _ in range(size // len(_BLOCK)):
                file.write(_BLOCK)
            os.fsync(file)
        _run(*_MKFS, image)
        _run("mount", "-o", "loop", image, top)
        image.unlink()
        try:
            yield top
        finally:
            _run("umount", "--lazy", top)  # a process that was killed may still be ending


def _run(program: str, *arguments: object) -> None:
    subprocess.run([find_program(program) or program, *map(str, arguments)], check=True)
