"""Child processes: started, started again when they crash, stopped in order, and never left behind.

What must stay true: no child outlives this process, also when it is killed (Linux:
PR_SET_PDEATHSIG, which is about the thread that starts the child: start them from the main thread
alone); nobody else is ever signalled.
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
from dataclasses import dataclass, field

from relay.log import get_logger

log = get_logger(__name__)
PR_SET_PDEATHSIG = 1  # prctl(2)
SHORTEST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds before a child that died is started again
YOUNG = 60.0  # who dies before this age (seconds) has a trouble that haste does not mend
_libc = ctypes.CDLL(None)


def die_with_parent() -> Callable[[], None]:
    """What to do between fork and exec to be killed when this process dies, however it does."""
    parent = os.getpid()

    def arrange() -> None:
        if sys.platform == "linux":
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died before we asked
                os._exit(1)

    return arrange


@dataclass(slots=True)
class Child:
    """One process; `patience` is how many seconds it has to end by itself when it is stopped."""

    name: str
    command: Sequence[str]
    environ: Mapping[str, str]
    patience: float
    process: asyncio.subprocess.Process | None = None
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> None:
        """Start it in a session of its own: the terminal's Ctrl-C is not for it."""
        self.process = await asyncio.create_subprocess_exec(
            *self.command,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )

    async def wait(self) -> int:
        """Its exit status (negative: the signal that ended it)."""
        return await self.process.wait() if self.process else 0

    async def keep(self, refusal: int | None = None) -> int:
        """Start it again whenever it dies, until it is told to stop or ends with the status
        `refusal`; its last status.

        A child says by that status that the next one would end for the same reason: a bad setting,
        a port in use.
        """
        pause = 0.0
        while not self.stopping.is_set():
            started = time.monotonic()
            await self.start()
            status = await self.wait()
            if self.stopping.is_set() or status == refusal:
                return status
            young = time.monotonic() - started < YOUNG
            pause = min(max(pause * 2, SHORTEST_PAUSE), LONGEST_PAUSE) if young else SHORTEST_PAUSE
            log.error(
                "child died, starting it again", child=self.name, status=status, seconds=pause
            )
            await asyncio.sleep(pause)
        return 0

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL when its patience is over."""
        self.stopping.set()
        if self.process is None:
            return
        self.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), self.patience)
        except TimeoutError:
            log.error("child did not stop, killing it", child=self.name, seconds=self.patience)
            self.signal(signal.SIGKILL)
            await self.process.wait()

    def signal(self, number: int) -> None:
        """Send it a signal if it is still there."""
        if self.process and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
