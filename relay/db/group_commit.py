"""Group commit: items that gathered while a batch was written become the next batch.

A batch is one transaction. A batch of one is as quick as a plain commit, and under load dozens of
items share a commit. If the database refuses a batch for its data, it runs again row by row, so
that a bad row fails alone. If the connection breaks, the whole batch runs again until the database
is back: the statements are idempotent, so that settles a COMMIT of unknown outcome. An item whose
deadline passes gets `CommitUnknown`, or the database's error if no try got as far as a COMMIT.

What must stay true: an item gets exactly one result; the order of items is kept; no item is dropped
before its deadline.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from relay.db.engine import committed_nothing, is_outage
from relay.log import first_line, get_logger

log = get_logger(__name__)
_PAUSE = 0.1
_LONGEST_PAUSE = 2.0


class CommitUnknown(Exception):
    """The database did not confirm the COMMIT in time. The row may exist, so its body must
    stay."""


@dataclass(slots=True, eq=False)
class PendingItem[Item]:
    """An item without a result. `done` takes the result; after `deadline` (monotonic) the owner
    cannot wait any longer."""

    item: Item
    done: Callable[[Any], None]
    deadline: float | None = None


type Answers[Item] = list[tuple[PendingItem[Item], Any]]


def deliver_results[Item](answers: Answers[Item]) -> None:
    """Pass every result to its owner."""
    for pending, result in answers:
        try:
            pending.done(result)
        except Exception:  # the other owners still wait for their results
            log.exception("result not delivered")


class GroupCommitter[Item, Result]:
    """Commits batches, one after the other.

    `commit` writes the items of a batch in one transaction and returns their results in the same
    order; it writes nothing if it cannot begin before the earliest deadline (monotonic). During an
    outage `wait` waits so many seconds and returns False to give up; `expired` gets the items whose
    deadline has passed.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[Item], float], Sequence[Result]],
        *,
        wait: Callable[[float], bool],
        expired: Callable[[Answers[Item]], object],
    ) -> None:
        self._commit = commit
        self._wait = wait
        self._expired = expired
        self.stuck = False  # the database is away

    def commit(
        self, batch: list[PendingItem[Item]], *, commit_unknown: bool = False
    ) -> Answers[Item]:
        """Commit a batch. For each item: its result, the error of its row or of the outage, or
        CommitUnknown.

        `commit_unknown`: an earlier attempt may have committed it.
        """
        pause = _PAUSE
        while batch:
            begin_by = min(
                (pending.deadline for pending in batch if pending.deadline is not None),
                default=float("inf"),
            )
            try:
                results = self._commit([pending.item for pending in batch], begin_by)
            except Exception as error:
                if not is_outage(error):
                    return self._row_by_row(batch, error, commit_unknown=commit_unknown)
                if not self.stuck:
                    log.error("database away", reason=first_line(error))
                self.stuck = True
                commit_unknown = commit_unknown or not committed_nothing(error)
                fault = CommitUnknown() if commit_unknown else error
            else:
                self.stuck = False
                return list(zip(batch, results, strict=True))
            if not self._wait(pause):
                return [(pending, fault) for pending in batch]
            expired = [
                pending
                for pending in batch
                if pending.deadline is not None and pending.deadline <= time.monotonic()
            ]
            self._expired([(pending, fault) for pending in expired])
            batch = [pending for pending in batch if pending not in expired]
            pause = min(pause * 2, _LONGEST_PAUSE)
        return []

    def _row_by_row(
        self, batch: list[PendingItem[Item]], error: Exception, *, commit_unknown: bool
    ) -> Answers[Item]:
        if len(batch) == 1:
            log.error("row refused by the database", reason=first_line(error))
            return [(batch[0], error)]
        return [
            answer
            for pending in batch
            for answer in self.commit([pending], commit_unknown=commit_unknown)
        ]


class CommitThread[Item, Result]:
    """A thread that commits batches.

    `commit` is as in `GroupCommitter`, without the deadline; `post` runs a function in the owners'
    thread (an event loop's `call_soon_threadsafe`); `largest` bounds a batch. After a batch of more
    than one the thread waits `gather` seconds for the next: a row in a batch of eight costs half of
    what it costs in a batch of four.
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
        self.committer = GroupCommitter(
            lambda items, _: commit(items), wait=self._wait, expired=self._answer
        )
        self._post, self._largest, self._gather = post, largest, gather
        self._observe = observe
        self._waiting: deque[PendingItem[Item]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._give_up_at = float("inf")
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start committing."""
        self._thread.start()

    def put(
        self, item: Item, done: Callable[[Result | Exception], None], deadline: float | None = None
    ) -> None:
        """Add an item. `done` gets its result, the error of its row, or after `deadline`
        CommitUnknown or the error of the outage."""
        pending = PendingItem(item, done, deadline)
        with self._changed:
            self._waiting.append(pending)
            if len(self._waiting) == 1:
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
            answers = self.committer.commit(taken)
            if self._observe:
                self._observe(len(taken), time.monotonic() - started)
            self._answer(answers)

    def _take(self, gather: float) -> list[PendingItem[Item]]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if gather:
                self._changed.wait_for(
                    lambda: self._closing or len(self._waiting) >= self._largest, gather
                )
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), self._largest))]

    def _wait(self, pause: float) -> bool:
        with self._changed:
            closing = self._closing
            self._changed.wait_for(
                lambda: self._closing is not closing, min(pause, _PAUSE) if closing else pause
            )
            return time.monotonic() < self._give_up_at

    def _answer(self, answers: Answers[Item]) -> None:
        if answers:
            self._post(lambda: deliver_results(answers))
