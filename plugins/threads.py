"""Threads for hooks that are a plain `def`.

A thread is started when all others are busy, up to a limit, and waits for the next call after that.
A hook that never returns keeps its thread; when all of them are kept, further calls wait until
their time is over. The threads are daemons: a hook that hangs does not keep the process from
ending, as it would in a ThreadPoolExecutor.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

LIMIT = 1000
"""Threads of a process. A session has one hook at a time."""


class HookThreads:
    """Grows on demand; any thread may call `submit`."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0  # threads that wait, less the calls that wait for one
        self._threads = 0

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Runs `call` in a thread. A future that is cancelled in time is not run."""
        future: Future[Any] = Future()
        with self._lock:
            self._idle -= 1
            start = self._idle < 0 and self._threads < self._limit
            if start:
                self._threads += 1
                self._idle += 1
        self._calls.put((future, call))
        if start:
            threading.Thread(target=self._run, name="hook", daemon=True).start()
        return future

    def close(self) -> None:
        """Ends the threads that wait."""
        with self._lock:
            threads = self._threads
        for _ in range(threads):
            self._calls.put(None)

    def _run(self) -> None:
        while (work := self._calls.get()) is not None:
            future, call = work
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # sys.exit in a hook ends no thread
                    future.set_exception(error)
            with self._lock:
                self._idle += 1
