"""What processes use, as /proc tells it: CPU time and memory of whole trees of processes.

A child that has ended and was waited for still counts: its time is in its parent's. Linux only, as
Postfix's comparison is; without /proc there are no cost tables.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


class Stuck(Exception):
    """A load did not end; the text says what was waited for."""


def _stat(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def trees(roots: Iterable[int]) -> list[int]:
    """These processes and all that descend from them."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal() and (fields := _stat(entry.name)):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, left = [], list(roots)
    while left:
        pid = left.pop()
        found.append(pid)
        left += children.get(pid, [])
    return found


def cpu_seconds(roots: Mapping[str, Iterable[int]]) -> dict[str, float]:
    """CPU time that each role's processes have used until now, ended children included."""
    return {role: sum(_cpu(pid) for pid in trees(pids)) for role, pids in roots.items()}


def _cpu(pid: int) -> float:
    fields = _stat(pid)
    return sum(map(int, fields[11:15])) / _TICK if fields else 0.0


def machine_cpu_seconds() -> float:
    """CPU time that the whole machine was not idle: the kernel's own threads, and everybody else's
    work too."""
    user, nice, system, _idle, _wait, interrupts, soft, *_ = (
        Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return sum(map(int, (user, nice, system, interrupts, soft))) / _TICK


def resident_bytes(roots: Iterable[int]) -> int:
    """Memory of whole trees, with what processes share counted once (the sum of their proportional
    sets)."""
    total = 0
    for pid in trees(roots):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def wait(
    condition: Callable[[], bool], what: str, *, patience: float = 60.0, pause: float = 0.004
) -> float:
    """Wait until it is so; the moment (time.perf_counter). Raises Stuck after `patience`
    seconds."""
    limit = time.perf_counter() + patience
    while not condition():
        if time.perf_counter() > limit:
            raise Stuck(f"not so after {patience:g} s: {what}")
        time.sleep(pause)
    return time.perf_counter()
