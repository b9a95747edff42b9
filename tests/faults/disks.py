"""Disks of a trial: ext4 file systems on loop devices, which only root may mount.

A disk can be filled, made read-only, unmounted while it is in use, and lose its power: the ioctl
EXT4_IOC_SHUTDOWN drops what was written and not synced. The trial runs in a mount namespace of its
own (`PRIVATE_MOUNTS`), so a mount ends with its last process.
"""

import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path

from tests.waiting import until

PRIVATE_MOUNTS = ("unshare", "--mount", "--propagation", "private")
SIZE = 1 << 30  # bytes of the image, which is sparse
_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_NO_LOG_FLUSH = struct.pack("I", 2)  # EXT4_GOING_FLAGS_NOLOGFLUSH


def why_no_disks() -> str:
    """Why this machine cannot mount disks; empty if it can."""
    if os.geteuid():
        return "only root can mount a disk"
    missing = [name for name in ("mkfs.ext4", "mount", "unshare") if _program(name) is None]
    if missing:
        return f"no program {missing[0]}"
    tried = subprocess.run(
        [*PRIVATE_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
    )
    loops = Path("/dev/loop-control").exists()
    return "" if loops and not tried.returncode else "this machine mounts no loop device"


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


class MountedDisk:
    """An ext4 in the file `image`, mounted at `path`."""

    def __init__(self, image: Path, path: Path, size: int = SIZE) -> None:
        self.path = path
        self._image = image
        with image.open("wb") as file:
            file.truncate(size)
        _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", str(image))
        path.mkdir(parents=True, exist_ok=True)
        self.mount()

    def mount(self) -> None:
        _run("mount", "-o", "loop", str(self._image), str(self.path))

    def unmount(self, *, lazily: bool = False) -> None:
        """Unmount it; `lazily` also while processes use it, which keep what they have open."""
        _run("umount", *["-l"] * lazily, str(self.path))

    def read_only(self) -> bool:
        """Make it read-only; False if files stay open for writing, so that the kernel refuses."""
        command = ("mount", "-o", "remount,ro", str(self.path))

        def done() -> bool:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0

        try:
            return until(done, 5.0)
        except AssertionError:
            return False

    def writable(self) -> None:
        """End `read_only`."""
        _run("mount", "-o", "remount,rw", str(self.path))

    def abort(self) -> None:
        """Make it read-only as an error of the file system does, whatever is open."""
        _run("mount", "-o", "remount,abort", str(self.path))

    def check(self) -> None:
        """Let fsck repair it while it is not mounted."""
        subprocess.run(["fsck.ext4", "-y", str(self._image)], capture_output=True, check=False)

    def sync(self) -> None:
        """Write everything out."""
        _run("sync", "-f", str(self.path))

    def fill(self) -> Path:
        """Fill it to the last block; the file to remove afterwards."""
        ballast = self.path / "ballast"
        with ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 4096):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError:  # it is full
                    continue
        return ballast

    def cut_power(self) -> None:
        """Drop what is not synced; every later call on it fails until it is mounted again."""
        directory = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(directory, _SHUTDOWN, _NO_LOG_FLUSH)
        finally:
            os.close(directory)


def _run(*command: str) -> None:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
    )
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
