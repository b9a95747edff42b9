"""The machine that the figures come from, and its disk, which must be idle before a measurement.

A file system mounted with `discard` pays for every deletion once more when its journal commits, and
would spoil a later figure. So nothing is deleted between two measurements, and each measurement
waits until the disk is idle. If that takes too long, the result says so.
"""

import datetime
import os
import platform
import re
import resource
import sqlite3
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import psutil

from bench.services import ROOT

_PACKAGES = ("celery", "kombu", "redis", "sqlalchemy", "psycopg", "uvloop", "structlog")
IDLE = 0.4  # seconds without any transfer


def describe(directory: Path) -> dict[str, str]:
    """The facts that a reader needs to compare figures."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "qmqp-relay": f"{version('qmqp-relay')}, {_commit()}",
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": f"{os.cpu_count()} x {model[1] if model else platform.processor()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "disk": _file_system(directory),
        "load before": load_average(),
        "Python": platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
        "packages": ", ".join(f"{name} {version(name)}" for name in _PACKAGES),
    }


def load_average() -> str:
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


def allow_open_files(count: int) -> int:
    """Let this process and its children have `count` files open, if they may; return how many they
    can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = max(soft, min(count, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed


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


def _commit() -> str:
    """The commit of the source, with `-dirty` when files were changed since."""
    command = ("git", "describe", "--always", "--dirty", "--exclude=*")
    try:
        name = subprocess.check_output(command, cwd=ROOT, stderr=subprocess.DEVNULL, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "no git commit"
    return f"commit {name.strip()}"


def _file_system(directory: Path) -> str:
    mounts = [
        mount
        for mount in psutil.disk_partitions(all=True)
        if directory.resolve().is_relative_to(mount.mountpoint)
    ]
    mount = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return f"{mount.fstype} ({mount.opts})" if mount else "an unknown file system"
