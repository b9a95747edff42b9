"""A thread that repeats one task."""

import threading

from relay.log import first_line, get_logger

log = get_logger(__name__)


class PeriodicThread(threading.Thread):
    """Calls `turn`, which a subclass defines, every `interval` seconds from `start` to `close`."""

    def __init__(self, name: str, interval: float) -> None:
        super().__init__(name=name, daemon=True)
        self.interval = interval
        self.closing = threading.Event()

    def turn(self) -> object:
        """Do the task once. An error is logged, and the next turn tries again."""
        raise NotImplementedError

    def run(self) -> None:
        while not self.closing.wait(self.interval):
            try:
                self.turn()
            except Exception as error:
                log.warning("task failed", task=self.name, reason=first_line(error))

    def close(self) -> None:
        """End after the current turn."""
        self.closing.set()
