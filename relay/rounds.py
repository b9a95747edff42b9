"""Group commit: a thread that commits whatever has gathered, and answers all of it at once.

How it works: items are put from any thread. The writer takes all that is there (a round), commits it in one
transaction and hands every answer over in one call of `post`; meanwhile the next round gathers. A round of one is as
quick as a plain commit, and under load a commit is shared by dozens.

A round that the database refuses for its data is run again row by row, so that one bad row fails alone. A round whose
connection broke is run again whole until the database is back: the statements are idempotent and their keys are ours,
so that a COMMIT in doubt is settled by asking again. Who cannot wait gives a deadline and is then answered `Unsettled`.

What must stay true: an item is either withdrawn before it was taken, or answered exactly once; the order of items is
kept; an item that was taken is never forgotten while its deadline has not passed.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from relay.database import is_outage
from relay.log import first_line, get_logger

log = get_logger(__name__)
_PAUSE = 0.1
_LONGEST_PAUSE = 2.0


class Unsettled(Exception):
    """The database did not say in time whether the row is there: it may be, so whatever it needs must stay."""


class Entry:
    """One item on its way."""

    __slots__ = ("deadline", "done", "item", "taken")

    def __init__(self, item: Any, done: Callable[[Any], None], deadline: float | None) -> None:
        self.item, self.done, self.deadline, self.taken = item, done, deadline, False


class Writer[Item, Result]:
    """A thread that commits what has gathered.

    `commit` takes a round's items and gives their results in the same order, in one transaction; `post` runs a function
    where the answers belong (an event loop's `call_soon_threadsafe`); `largest` bounds a round.
    """

    def __init__(
        self,
        name: str,
        commit: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        post: Callable[[Callable[[], None]], object],
        largest: int = 256,
        rounds_of: Callable[[int, float], None] | None = None,
    ) -> None:
        self._commit, self._post, self._largest = commit, post, largest
        self._observe = rounds_of
        self._waiting: deque[Entry] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._give_up_at = float("inf")
        self.stuck = False  # the database is away
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start committing."""
        self._thread.start()

    def put(self, item: Item, done: Callable[[Result | Exception], None], deadline: float | None = None) -> Entry:
        """Hand an item over; `done` gets its result, its row's error, or Unsettled after `deadline` (monotonic)."""
        entry = Entry(item, done, deadline)
        with self._changed:
            self._waiting.append(entry)
            if len(self._waiting) == 1:
                self._changed.notify()
        return entry

    def withdraw(self, entry: Entry) -> bool:
        """Take an item back; False when the writer has it already."""
        with self._changed:
            if entry.taken:
                return False
            try:
                self._waiting.remove(entry)
            except ValueError:
                return False
            return True

    def close(self, timeout: float) -> bool:
        """Commit what is there and stop; False when that took longer than `timeout` seconds.

        A database that is away is asked again for half of the time.
        """
        with self._changed:
            self._closing, self._give_up_at = True, time.monotonic() + timeout / 2
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while taken := self._take():
            started = time.monotonic()
            answers = self._settle(taken)
            if self._observe:
                self._observe(len(taken), time.monotonic() - started)
            self._answer(answers)

    def _take(self) -> list[Entry]:
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            taken = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._largest))]
            for entry in taken:
                entry.taken = True
            return taken

    def _settle(self, round_: list[Entry]) -> list[tuple[Entry, Any]]:
        """Commit a round whatever it takes; the answers, one an entry."""
        pause = _PAUSE
        while round_:
            try:
                results = self._commit([entry.item for entry in round_])
            except Exception as error:
                if not is_outage(error):
                    return self._one_by_one(round_, error)
                self._say(error)
            else:
                self.stuck = False
                return list(zip(round_, results, strict=True))
            late = [entry for entry in round_ if entry.deadline is not None and entry.deadline <= time.monotonic()]
            self._answer([(entry, Unsettled()) for entry in late])
            round_ = [entry for entry in round_ if entry not in late]
            if not self._rest(pause):
                return [(entry, Unsettled()) for entry in round_]
            pause = _PAUSE if self._closing else min(pause * 2, _LONGEST_PAUSE)
        return []

    def _rest(self, pause: float) -> bool:
        """Wait before the next try; False when it is time to give up."""
        with self._changed:
            closing = self._closing
            self._changed.wait_for(lambda: self._closing is not closing, pause)
            return time.monotonic() < self._give_up_at

    def _one_by_one(self, round_: list[Entry], error: Exception) -> list[tuple[Entry, Any]]:
        if len(round_) == 1:
            log.error("row refused by the database", reason=first_line(error))
            return [(round_[0], error)]
        return [answer for entry in round_ for answer in self._settle([entry])]

    def _say(self, error: Exception) -> None:
        if not self.stuck:
            log.error("database away", reason=first_line(error))
        self.stuck = True

    def _answer(self, answers: list[tuple[Entry, Any]]) -> None:
        def hand_over() -> None:
            for entry, result in answers:
                try:
                    entry.done(result)
                except Exception:  # the others of this round still wait for theirs
                    log.exception("answer not taken")

        if answers:
            self._post(hand_over)
