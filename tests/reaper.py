"""A process that outlives the tests and ends what they started.

A test run may be killed with SIGKILL, and then no fixture runs. So every server and every command
that a test starts is reported to this process first. The kernel closes its standard input when the
run ends, however it ends. Then it ends what is left and removes the temporary directories.

It reads lines of JSON, `[order, argument, ...]`: `watch PID SIGNAL`, `forget PID`, `keep DIRECTORY`
(to be removed at the end). It uses the standard library alone, because it is started by file name
in an isolated interpreter.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

PATIENCE = 5.0  # seconds between the first signal and SIGKILL


def tell_group(pid: int, number: int) -> bool:
    """Signal the process group that `pid` leads, or `pid` alone if it leads none; False when
    nothing is there."""
    for send in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(pid, number)
            return True
    return False


def end_all(watched: dict[int, int]) -> None:
    """Send each process its signal, wake it if it is stopped, and kill the processes that still run
    after PATIENCE."""
    left = {pid for pid, polite in watched.items() if tell_group(pid, polite)}
    for pid in left:
        tell_group(pid, signal.SIGCONT)
    deadline = time.monotonic() + PATIENCE
    while left and time.monotonic() < deadline:
        threading.Event().wait(0.05)
        left = {pid for pid in left if tell_group(pid, 0)}
    for pid in left:
        tell_group(pid, signal.SIGKILL)


def serve(lines: Iterable[str]) -> None:
    """Read which processes start and end until the input ends, then clean up."""
    watched: dict[int, int] = {}
    directories: list[Path] = []
    for line in lines:
        match json.loads(line):
            case ["watch", int(pid), int(polite)]:
                watched[pid] = polite
            case ["forget", int(pid)]:
                watched.pop(pid, None)
            case ["keep", str(name)]:
                directories.append(Path(name))
    end_all(watched)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    # The run is stopped by signals to its group or terminal; the reaper goes by the end of its
    # input alone.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    serve(sys.stdin)
