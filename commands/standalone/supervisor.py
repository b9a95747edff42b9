"""Child processes: started, restarted when they crash, and stopped in order.

What must stay true: no child outlives this process, even when it is killed. Linux does that by
PR_SET_PDEATHSIG, which follows the thread that starts the child, so only the main thread starts
children. No other process is ever signalled.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from relay.log import get_logger

log = get_logger(__name__)
PR_SET_PDEATHSIG = 1  # prctl(2)
MIN_PAUSE, MAX_PAUSE = 1.0, 30.0  # seconds before a child that died is started again
# A child that dies before this age (seconds) has a fault that an early restart does not cure.
MIN_UPTIME = 60.0
_libc = ctypes.CDLL(None)


def die_with_parent() -> Callable[[], None]:
    """A function to call between fork and exec: the kernel then kills the child when this process
    dies."""
    parent = os.getpid()

    def arrange() -> None:
        if sys.platform == "linux":
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # the parent died before the call
                os._exit(1)

    return arrange


@dataclass(slots=True)
class Child:
    """One process. `stop_timeout` is how many seconds it has to end after SIGTERM."""

    name: str
    command: Sequence[str]
    environ: Mapping[str, str]
    stop_timeout: float
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it in a session of its own, so that a Ctrl-C of the terminal does not reach it."""
        self.process = await asyncio.create_subprocess_exec(
            *self.command,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )

    async def wait(self) -> int:
        """Its exit status; negative if a signal ended it."""
        return await self.process.wait() if self.process else 0

    async def keep(self, refusal: int | None = None) -> None:
        """Restart it whenever it dies, until this is cancelled or it exits with the status
        `refusal`.

        By that status a child says that a restart would fail for the same reason: a bad setting, a
        port in use.
        """
        pause = 0.0
        while True:
            started = time.monotonic()
            await self.start()
            status = await self.wait()
            if status == refusal:
                return
            early = time.monotonic() - started < MIN_UPTIME
            pause = min(max(pause * 2, MIN_PAUSE), MAX_PAUSE) if early else MIN_PAUSE
            log.error("child restarted", child=self.name, status=status, seconds=pause)
            await asyncio.sleep(pause)

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL after `stop_timeout`."""
        self.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.wait(), self.stop_timeout)
        except TimeoutError:
            log.error("child killed", child=self.name, seconds=self.stop_timeout)
            self.signal(signal.SIGKILL)
            await self.wait()

    def signal(self, number: int) -> None:
        """Send it a signal if it still runs."""
        if self.process and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
