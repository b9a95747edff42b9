"""How tests wait, and a clock that they set.

A test never sleeps for a guessed time: it names the condition and the longest time that it may
take.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path


class SetClock:
    """A clock that the test sets, in seconds."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def until[T](
    condition: Callable[[], T], timeout: float = 10.0, *, what: str | Callable[[], str] = ""
) -> T:
    """Call `condition()` until its result is true, and return the result. After `timeout` seconds
    raises AssertionError with `what` (text, or a function that makes it then) and the last result.
    The condition is called once more after the deadline, so that a slow machine gets a last
    chance. Each pause is a tenth of the time that has passed, from 5 to 50 ms: most conditions
    are queries, and many tests that wait would else slow those that compute."""
    began = time.monotonic()
    deadline = began + timeout
    pause = threading.Event()
    while True:
        late = time.monotonic() >= deadline
        seen = condition()
        if seen:
            return seen
        if late:
            description = (
                what() if callable(what) else what or getattr(condition, "__name__", "condition")
            )
            raise AssertionError(f"not so after {timeout:g} s: {description} (last seen: {seen!r})")
        pause.wait(min(max((time.monotonic() - began) / 10, 0.005), 0.05))


def whole_lines(file: Path) -> list[str]:
    """The lines that a running process has written; without the last one if it is not whole yet."""
    return file.read_text().split("\n")[:-1]


def stands_still(pid: int) -> bool:
    """Whether all threads of a process that was sent SIGSTOP are stopped: one that is not may take
    a lock yet."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    try:
        states = {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks}
    except (
        FileNotFoundError,
        ProcessLookupError,
    ):  # a thread ended this moment, so not all were stopped
        return False
    return states == {"T"}
