"""Group commit: items that gathered while a batch was written become the next batch.

A batch is one transaction. A batch of one is as quick as a plain commit, and under load dozens of
items share a commit. If the database refuses a batch for its data, it runs again row by row, so
that a bad row fails alone. If the connection breaks, the whole batch runs again until the database
is back: the statements are idempotent, so that settles a COMMIT of unknown outcome.

What must stay true: an item gets exactly one result; the order of items is kept.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from relay.db.engine import is_outage
from relay.log import first_line, get_logger

log = get_logger(__name__)
_PAUSE = 0.1
_LONGEST_PAUSE = 2.0


class PendingItem[Item](NamedTuple):
    """An item without a result. `done` takes the result."""

    item: Item
    done: Callable[[Any], None]


type Answers[Item] = list[tuple[PendingItem[Item], Any]]


def _deliver_results[Item](answers: Answers[Item]) -> None:
    """Pass every result to its owner."""
    for pending, result in answers:
        try:
            pending.done(result)
        except Exception:  # the other owners still wait for their results
            log.exception("result not delivered")


class CommitThread[Item, Result]:
    """A thread that commits batches.

    `commit` writes the items of a batch in one transaction and returns their results in the same
    order; `post` runs a function in the owners' thread (an event loop's `call_soon_threadsafe`);
    `largest` bounds a batch. After a batch of more than one the thread waits `gather` seconds for
    the next, unless an urgent item ends the wait: a row in a batch of eight costs half of what it
    costs in a batch of four.
    """

    def __init__(
        self,
        name: str,
        commit: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        post: Callable[[Callable[[], None]], object],
        largest: int = 256,
        gather: float = 0.0,
        observe: Callable[[int, float], None] | None = None,
    ) -> None:
        self._commit = commit
        self._post, self._largest, self._gather = post, largest, gather
        self._observe = observe
        self.database_away = False
        self._waiting: deque[PendingItem[Item]] = deque()
        self._changed = threading.Condition()
        self._urgent = False  # an item must not wait for others
        self._closing = False
        self._give_up_at = float("inf")
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start committing."""
        self._thread.start()

    def put(
        self, item: Item, done: Callable[[Result | Exception], None], *, urgent: bool = False
    ) -> None:
        """Add an item. `done` gets its result, or the error of its row; the error of an outage only
        if `close` gave up. An urgent item does not wait for others."""
        with self._changed:
            self._waiting.append(PendingItem(item, done))
            self._urgent = self._urgent or urgent
            if urgent or len(self._waiting) == 1:
                self._changed.notify()

    def close(self, timeout: float) -> bool:
        """Commit the gathered items and stop; False if that took longer than `timeout` seconds.

        During an outage it tries again for half of that time.
        """
        with self._changed:
            self._closing, self._give_up_at = True, time.monotonic() + timeout / 2
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        busy = False
        while taken := self._take(self._gather if busy else 0.0):
            busy = len(taken) > 1
            started = time.monotonic()
            answers = self._commit_batch(taken)
            if self._observe:
                self._observe(len(taken), time.monotonic() - started)
            self._post(partial(_deliver_results, answers))

    def _take(self, gather: float) -> list[PendingItem[Item]]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if gather:
                self._changed.wait_for(self._is_due, gather)
            self._urgent = False
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), self._largest))]

    def _is_due(self) -> bool:
        """Whether what has gathered must wait no longer."""
        return self._closing or self._urgent or len(self._waiting) >= self._largest

    def _commit_batch(self, batch: list[PendingItem[Item]]) -> Answers[Item]:
        """The result of each item, or the error of its row, or of an outage that `close` did not
        wait for."""
        pause = _PAUSE
        while True:
            try:
                results = self._commit([pending.item for pending in batch])
            except Exception as error:
                if not is_outage(error):
                    return self._row_by_row(batch, error)
                if not self.database_away:
                    log.error("database away", reason=first_line(error))
                self.database_away = True
                if not self._wait(pause):
                    return [(pending, error) for pending in batch]
                pause = min(pause * 2, _LONGEST_PAUSE)
            else:
                self.database_away = False
                return list(zip(batch, results, strict=True))

    def _row_by_row(self, batch: list[PendingItem[Item]], error: Exception) -> Answers[Item]:
        if len(batch) == 1:
            log.error("row refused by the database", reason=first_line(error))
            return [(batch[0], error)]
        return [answer for pending in batch for answer in self._commit_batch([pending])]

    def _wait(self, pause: float) -> bool:
        """Wait before the database is tried again; False to give up."""
        with self._changed:
            closing = self._closing
            self._changed.wait_for(
                lambda: self._closing is not closing, min(pause, _PAUSE) if closing else pause
            )
            return time.monotonic() < self._give_up_at
