"""The CPU time and memory of trees of processes.

The time of a child that has ended and was waited for is in its parent's. Linux only: other systems
have no proportional set size.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

import psutil


class Stuck(Exception):
    """A load did not end; the text names the condition that was waited for."""


def tree(roots: Iterable[int]) -> list[psutil.Process]:
    """These processes and all their descendants."""
    processes = []
    for pid in roots:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            processes += [root, *root.children(recursive=True)]
    return processes


def cpu_seconds(roots: Mapping[str, Iterable[int]]) -> dict[str, float]:
    """CPU time that the processes of each role have used so far, ended children included."""
    return {role: sum(map(_cpu, tree(pids))) for role, pids in roots.items()}


def _cpu(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system + times.children_user + times.children_system)
    return 0.0


def machine_cpu_seconds() -> float:
    """CPU time for which the whole machine was not idle, the kernel's own threads included."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def resident_bytes(roots: Iterable[int]) -> int:
    """The sum of the proportional set sizes: memory that processes share is counted once."""
    total = 0
    for process in tree(roots):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_full_info().pss
    return total


def wait(
    condition: Callable[[], bool], what: str, *, timeout: float = 60.0, pause: float = 0.004
) -> float:
    """Wait for the condition; return the time (time.perf_counter). Raises Stuck after `timeout`
    seconds."""
    limit = time.perf_counter() + timeout
    while not condition():
        if time.perf_counter() > limit:
            raise Stuck(f"not so after {timeout:g} s: {what}")
        time.sleep(pause)
    return time.perf_counter()
