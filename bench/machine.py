"""The machine that figures come from, and a disk that has come to rest before they are taken.

A file system mounted with `discard` pays for every deletion once more when its journal commits;
figures taken meanwhile are somebody else's. So nothing is deleted between two measurements, and
each waits until the disk is still; when its patience ends first, the result says so.
"""

import datetime
import os
import platform
import resource
import shutil
import sqlite3
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("celery", "kombu", "redis", "sqlalchemy", "psycopg", "uvloop", "structlog")
STILL = 0.4  # seconds without any transfer


def describe(directory: Path) -> dict[str, str]:
    """What a reader must know to compare figures."""
    return {
        "qmqp-relay": f"{version('qmqp-relay')}, {_commit()}",
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": f"{os.cpu_count()} x {_field('/proc/cpuinfo', 'model name') or platform.processor()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "disk": _mount(directory),
        "load before": " ".join(f"{value:.1f}" for value in os.getloadavg()),
        "Python": platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
        "packages": ", ".join(f"{name} {version(name)}" for name in _PACKAGES),
    }


def open_files(wanted: int) -> int:
    """Let this process and its children have so many files open, if they may; how many they can
    have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        soft = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


class Disk:
    """The disk of a directory, for one run. `restless`: how often it was not still when `patience`
    (seconds) ended."""

    def __init__(self, directory: Path, patience: float) -> None:
        self._directory, self._patience = directory, patience
        self.restless = 0

    def settle(self) -> None:
        """Write everything out and wait until the disk is still."""
        began = time.perf_counter()
        os.sync()
        seen, since = _transfers(self._directory), time.perf_counter()
        while (now := time.perf_counter()) - since < STILL:
            if now - began >= self._patience:
                self.restless += 1
                return
            time.sleep(0.05)
            if (counts := _transfers(self._directory)) != seen:
                seen, since = counts, now


def _transfers(directory: Path) -> list[str]:
    """Counters of the device: reads, writes, discards, and what is in flight."""
    device = directory.stat().st_dev
    try:
        return (
            Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
        )
    except OSError:  # a container or another system: sync is all that can be done
        return []


def _commit() -> str:
    """Which source: git's name for it, with `-dirty` when files were changed since."""
    git, here = shutil.which("git"), Path(__file__).parent
    command = [git or "", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"]
    said = (
        subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if git
        else ""
    )
    return f"commit {said}" if said else "no git commit"


def _field(file: str, name: str) -> str:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _mount(directory: Path) -> str:
    real, best = os.path.realpath(directory), ("", "an unknown file system")
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return best[1]
    for _, place, kind, options, *_ in mounts:
        if (real + "/").startswith(place.rstrip("/") + "/") and len(place) >= len(best[0]):
            best = place, f"{kind} ({options})"
    return best[1]
