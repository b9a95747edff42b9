"""Hints that wait for a free connection: fresh mail and retries by turns.

A task offers its ids and gets a `HintBatch`, which is done when the last of them was asked for, or
when nothing moved for so long that they are left to the database. What must stay true: no lane
waits while the other is served twice in a row. `HintQueue` belongs to one thread; only
`HintBatch.wait` is for others.
"""

import itertools
import threading
from collections import deque
from collections.abc import Iterable, Sequence

from relay.hints import QUEUES


class HintBatch:
    """What a task holds while its messages wait for connections."""

    __slots__ = ("_done", "_left")

    def __init__(self, left: int) -> None:
        self._left = left
        self._done = threading.Event()
        self.settle(0)

    def wait(self, timeout: float | None = None) -> bool:
        """True once every message was asked for or left to the database; False after `timeout`
        seconds."""
        return self._done.wait(timeout)

    def settle(self, count: int) -> bool:
        """So many more have been dealt with; True when all have."""
        self._left -= count
        if self._left <= 0:
            self._done.set()
        return self._left <= 0


type Hint = tuple[str, HintBatch]


class HintQueue:
    """The hints of one worker."""

    def __init__(self) -> None:
        self._lanes: dict[str, deque[Hint]] = {name: deque() for name in QUEUES}
        self._turns = itertools.cycle(QUEUES)
        self.tickets: set[HintBatch] = set()  # those that are not done

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def add(self, ticket: HintBatch, ids: Iterable[str], lane: str) -> None:
        """Let these messages wait in a lane (an unknown one is the first)."""
        self.tickets.add(ticket)
        self._lanes.get(lane, self._lanes[QUEUES[0]]).extend((queue_id, ticket) for queue_id in ids)

    def take(self, most: int) -> list[Hint]:
        """The next hints, from the lanes by turns."""
        taken: list[Hint] = []
        while len(taken) < most and len(self):
            if lane := self._lanes[next(self._turns)]:
                taken.append(lane.popleft())
        return taken

    def settle(self, hints: Sequence[Hint]) -> None:
        """These have been asked for."""
        for _, ticket in hints:
            if ticket.settle(1):
                self.tickets.discard(ticket)

    def clear(self) -> None:
        """Let nobody wait any longer."""
        for lane in self._lanes.values():
            lane.clear()
        for ticket in self.tickets:
            ticket.settle(1 << 30)
        self.tickets.clear()
