"""Child processes, and the CPU time and memory of trees of processes.

The kernel ends all children with this process (PR_SET_PDEATHSIG). The CPU time of a child that has
ended and was waited for is in its parent's. Linux only: other systems have no proportional set size.
"""

import ctypes
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl


class Stuck(Exception):
    """A load did not end; the text names the condition that was waited for."""


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


@contextmanager
def running(
    command: Sequence[Any],
    log: Path,
    ready: Callable[[], bool],
    *,
    stop: int = signal.SIGTERM,
    **options: Any,
) -> Iterator[subprocess.Popen[bytes]]:
    """A child in a session of its own from when it is ready until the end of the block.

    Its output goes to the file `log`; the signal `stop` ends it; `options` are those of Popen.
    Raises RuntimeError if it ends early, and TimeoutExpired if it does not end within 30 seconds.
    """
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            preexec_fn=partial(_prctl, _PR_SET_PDEATHSIG, signal.SIGTERM), **options,
        )  # fmt: skip
    try:
        wait(lambda: ready() or child.poll() is not None, f"{command} is ready, see {log}")
        if child.poll() is not None:
            raise RuntimeError(f"{command} ended: {log.read_text()[-2000:]}")
        yield child
    finally:
        child.send_signal(stop)
        child.send_signal(signal.SIGCONT)
        child.wait(30)
        with suppress(ProcessLookupError):  # children of its own that are left
            os.killpg(child.pid, signal.SIGKILL)


def free_port() -> int:
    """A TCP port on which no program listened a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def listens(port: int) -> bool:
    """Whether a program listens on this TCP port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def tree(roots: Iterable[int]) -> list[psutil.Process]:
    """These processes and all their descendants."""
    processes = []
    for pid in roots:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            processes += [root, *root.children(recursive=True)]
    return processes


def cpu_seconds(roots: Iterable[int]) -> float:
    """CPU time that these processes and their descendants have used so far."""
    total = 0.0
    for process in tree(roots):
        with suppress(psutil.NoSuchProcess):
            # user, system, and the same of the children that have ended
            total += sum(process.cpu_times()[:4])
    return total


def machine_cpu_seconds() -> float:
    """CPU time for which the whole machine was not idle, the kernel's own threads included."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def children_cpu_seconds() -> float:
    """CPU time of the children of this process that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def resident_bytes(roots: Iterable[int]) -> int:
    """The sum of the proportional set sizes: memory that processes share is counted once."""
    total = 0
    for process in tree(roots):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_full_info().pss
    return total
