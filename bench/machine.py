"""The machine that the figures come from: its facts, its disk, and what processes cost on it.

A file system mounted with `discard` pays for every deletion once more when its journal commits, and
would spoil a later figure. So nothing is deleted between two measurements, and each measurement
waits until the disk is idle. If that takes too long, the result says so.

The CPU time of a child that has ended and was waited for is in its parent's. Linux only: other
systems have no proportional set size.
"""

import datetime
import os
import platform
import re
import resource
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import psutil

from bench.services import ROOT

_PACKAGES = (
    *("celery", "kombu", "redis", "sqlalchemy", "psycopg", "uvloop", "structlog"),
    *("procrastinate", "pgqueuer", "asyncpg"),
)
NO_JOURNAL = ", no journal"  # the end of the fact about the disk
IDLE = 0.4  # seconds without any transfer


def describe(directory: Path) -> dict[str, str]:
    """The facts that a reader needs to compare figures."""
    commit = _output("git", "describe", "--always", "--dirty", "--exclude=*")
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "qmqp-relay": f"{version('qmqp-relay')}, commit {commit}",
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": f"{os.cpu_count()} x {model[1] if model else platform.processor()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "disk": _disk(directory),
        "load before": load_average(),
        "Python": platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
        "packages": ", ".join(f"{name} {version(name)}" for name in _PACKAGES),
    }


def _disk(directory: Path) -> str:
    """The file system and its options. On an ext4 without a journal files are expensive to create
    for some minutes after others were removed (docs/performance.md), so the facts say that."""
    disk = _output("findmnt", "-no", "FSTYPE,OPTIONS", "-T", str(directory))
    device = directory.stat().st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    journal = any(Path("/proc/fs/jbd2").glob(f"{name}-*"))
    return disk if journal or not disk.startswith("ext4") else disk + NO_JOURNAL


def load_average() -> str:
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


def wait_until_idle(directory: Path, timeout: float) -> bool:
    """Write everything out, then wait until the disk of the directory is idle; whether it was
    within `timeout` seconds."""
    os.sync()
    device = directory.stat().st_dev
    file = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    began = idle_since = time.perf_counter()
    counters = ""
    while (now := time.perf_counter()) - idle_since < IDLE:
        if now - began >= timeout:
            return False
        # Reads, writes, discards and transfers in flight. A container may not have the file: then
        # the sync alone must do.
        latest = file.read_text() if file.exists() else ""
        if latest != counters:
            counters = latest
            idle_since = now
        time.sleep(0.05)
    return True


def _output(*command: str) -> str:
    """The output of a command about this source or machine; `unknown` if it cannot be run."""
    with suppress(OSError):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return result.stdout.strip() or "unknown"
    return "unknown"


def each_process[T](roots: Iterable[int], read: Callable[[psutil.Process], T]) -> list[T]:
    """What `read` returns for each of these processes and their descendants that still exists."""
    results = []
    for pid in roots:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    results.append(read(process))
    return results


def cpu_seconds(roots: Iterable[int]) -> float:
    """CPU time that these processes and their descendants have used so far."""
    # User and system time, and that of the children that have ended.
    return sum(each_process(roots, lambda process: sum(process.cpu_times()[:4])))


def machine_cpu_seconds() -> float:
    """CPU time for which the whole machine was not idle, the kernel's own threads included."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def children_cpu_seconds() -> float:
    """CPU time of the children of this process that have ended."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
