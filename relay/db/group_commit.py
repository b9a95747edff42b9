"""Group commit: whatever has gathered is committed at once, and all of it is answered at once.

How it works: all that is there is a round, and goes into one transaction; meanwhile the next round
gathers. A round of one is as quick as a plain commit, and under load a commit is shared by dozens.
`GroupCommitter` settles a round; `CommitThread` is a thread that does so with what is put from any
other, and hands the answers over in one call of `post`.

A round that the database refuses for its data is run again row by row, so that one bad row fails
alone. A round whose connection broke is run again whole until the database is back: the statements
are idempotent and their keys are ours, so that a COMMIT in doubt is settled by asking again. Who
cannot wait gives a deadline and is then answered `CommitUnknown`; or with the database's error, if
no try came as far as a COMMIT: then no row can come, and nothing is kept for it.

What must stay true: an item is answered exactly once; the order of items is kept; an item is never
forgotten while its deadline has not passed.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from relay.db.engine import committed_nothing, is_outage
from relay.log import first_line, get_logger

log = get_logger(__name__)
_PAUSE = 0.1
_LONGEST_PAUSE = 2.0


class CommitUnknown(Exception):
    """The database did not say in time whether the row is there: it may be, so whatever it needs
    must stay."""


class PendingItem[Item]:
    """One item on its way; `done` takes its answer, `deadline` (monotonic) is when its owner cannot
    wait any longer."""

    __slots__ = ("deadline", "done", "item")

    def __init__(
        self, item: Item, done: Callable[[Any], None], deadline: float | None = None
    ) -> None:
        self.item, self.done, self.deadline = item, done, deadline


type Answers[Item] = list[tuple[PendingItem[Item], Any]]


def deliver_results[Item](answers: Answers[Item]) -> None:
    """Give every entry its answer."""
    for entry, result in answers:
        try:
            entry.done(result)
        except Exception:  # the others of this round still wait for theirs
            log.exception("answer not taken")


class GroupCommitter[Item, Result]:
    """Commits one round after the other, whatever it takes.

    `commit` takes a round's items and gives their results in the same order, in one transaction; it
    writes nothing when it gets to that only after the moment (monotonic) which is the earliest
    deadline of them. While the database is away `rest` waits so many seconds, and says False when
    it is time to give up; `late` gets those whose deadline has passed meanwhile.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[Item], float], Sequence[Result]],
        *,
        rest: Callable[[float], bool],
        late: Callable[[Answers[Item]], object],
    ) -> None:
        self._commit, self._rest, self._late = commit, rest, late
        self.stuck = False  # the database is away

    def settle(self, round_: list[PendingItem[Item]], *, doubt: bool = False) -> Answers[Item]:
        """Commit a round; the answers, one an entry: its result, its row's error, an outage's, or
        Unsettled.

        `doubt`: a try before this one may have committed it.
        """
        pause = _PAUSE
        while round_:
            begin_by = min(
                (entry.deadline for entry in round_ if entry.deadline is not None),
                default=float("inf"),
            )
            try:
                results = self._commit([entry.item for entry in round_], begin_by)
            except Exception as error:
                if not is_outage(error):
                    return self._one_by_one(round_, error, doubt=doubt)
                self._say(error)
                doubt = doubt or not committed_nothing(error)
                fault = CommitUnknown() if doubt else error
            else:
                self.stuck = False
                return list(zip(round_, results, strict=True))
            if not self._rest(pause):
                return [(entry, fault) for entry in round_]
            late = [
                entry
                for entry in round_
                if entry.deadline is not None and entry.deadline <= time.monotonic()
            ]
            self._late([(entry, fault) for entry in late])
            round_ = [entry for entry in round_ if entry not in late]
            pause = min(pause * 2, _LONGEST_PAUSE)
        return []

    def _one_by_one(
        self, round_: list[PendingItem[Item]], error: Exception, *, doubt: bool
    ) -> Answers[Item]:
        if len(round_) == 1:
            log.error("row refused by the database", reason=first_line(error))
            return [(round_[0], error)]
        return [answer for entry in round_ for answer in self.settle([entry], doubt=doubt)]

    def _say(self, error: Exception) -> None:
        if not self.stuck:
            log.error("database away", reason=first_line(error))
        self.stuck = True


class CommitThread[Item, Result]:
    """A thread that commits what has gathered.

    `commit` is as in `GroupCommitter`, but for the moment; `post` runs a function where the answers
    belong (an event loop's `call_soon_threadsafe`); `largest` bounds a round. While items come in
    numbers, they are let gather for `gather` seconds: a row in a round of eight costs half of what
    it costs in a round of four.
    """

    def __init__(
        self,
        name: str,
        commit: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        post: Callable[[Callable[[], None]], object],
        largest: int = 256,
        gather: float = 0.0,
        rounds_of: Callable[[int, float], None] | None = None,
    ) -> None:
        self.rounds = GroupCommitter(
            lambda items, _: commit(items), rest=self._rest, late=self._answer
        )
        self._post, self._largest, self._gather = post, largest, gather
        self._observe = rounds_of
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
        """Hand an item over; `done` gets its result, its row's error, or Unsettled or an outage's
        after `deadline`."""
        entry = PendingItem(item, done, deadline)
        with self._changed:
            self._waiting.append(entry)
            if len(self._waiting) == 1:
                self._changed.notify()

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
        busy = False
        while taken := self._take(self._gather if busy else 0.0):
            busy = len(taken) > 1
            started = time.monotonic()
            answers = self.rounds.settle(taken)
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

    def _rest(self, pause: float) -> bool:
        with self._changed:
            closing = self._closing
            self._changed.wait_for(
                lambda: self._closing is not closing, min(pause, _PAUSE) if closing else pause
            )
            return time.monotonic() < self._give_up_at

    def _answer(self, answers: Answers[Item]) -> None:
        if answers:
            self._post(lambda: deliver_results(answers))
