"""Records in the database who was refused by a rate, so that `stats` and the page can show it.

Refusals are counted in memory; INTERVAL after the first one a thread adds the counts to the table
`rate_refusals`. What must stay true: without a refusal there is no statement and no thread; memory
and rows are bounded, whatever senders a client makes up; a database that is away delays nothing
but the record, which waits for it.
"""

import asyncio
from collections import Counter
from functools import cached_property

from sqlalchemy import Engine

from reception.rates import RateExceeded
from reception.receiver import DiskThreads
from relay.log import escaped, first_line, get_logger
from relay.rate_refusals import RateRefusals, RefusalKey

INTERVAL = 10.0  # seconds
MAX_NAMES = 1000  # that are counted at once
RECORDED = 20
"""Names of one limit that are recorded at a time, those with the most refusals. The others are
recorded together, without a name."""
LONGEST = 255  # characters of a name
CLOSE_TIMEOUT = 2.0

log = get_logger(__name__)


class RateRecorder:
    """Counts and records refusals. All methods are called on the loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, engine: Engine, interval: float = INTERVAL
    ) -> None:
        self._loop = loop
        self._refusals = RateRefusals(engine)
        self._interval = interval
        self._counts = Counter[RefusalKey]()
        self._timer: asyncio.TimerHandle | None = None
        self._adding: asyncio.Future[None] | None = None

    @cached_property
    def _threads(self) -> DiskThreads:
        return DiskThreads(1, "rates")

    def note(self, exceeded: RateExceeded) -> None:
        """Count a refusal."""
        key = exceeded.subject, exceeded.what, escaped(exceeded.name, LONGEST)
        if key not in self._counts and len(self._counts) >= MAX_NAMES:
            key = exceeded.subject, exceeded.what, ""
        self._counts[key] += 1
        self._schedule()

    async def close(self) -> None:
        """Record what is counted, if the database answers at once."""
        if self._timer is not None:
            self._timer.cancel()
        if self._counts and self._adding is None:
            self._record()
        if self._adding is not None:
            await asyncio.wait([self._adding], timeout=CLOSE_TIMEOUT)
        if "_threads" in vars(self):
            await self._loop.run_in_executor(None, self._threads.close, CLOSE_TIMEOUT)

    def _schedule(self) -> None:
        if self._timer is None and self._adding is None:
            self._timer = self._loop.call_later(self._interval, self._record)

    def _record(self) -> None:
        self._timer = None
        counts, self._counts = most_refused(self._counts), Counter()
        self._adding = self._threads.run(lambda: self._refusals.add(counts))
        self._adding.add_done_callback(lambda adding: self._recorded(adding, counts))

    def _recorded(self, adding: asyncio.Future[None], counts: Counter[RefusalKey]) -> None:
        self._adding = None
        if (error := adding.exception()) is not None:
            log.warning("rates not recorded", reason=first_line(getattr(error, "orig", error)))
            self._counts.update(counts)
        if self._counts:
            self._schedule()


def most_refused(counts: Counter[RefusalKey]) -> Counter[RefusalKey]:
    """The counts of RECORDED names of each limit, and the sum of the others without a name."""
    kept, names = Counter[RefusalKey](), Counter[tuple[str, str]]()
    for (subject, what, name), count in counts.most_common():
        names[subject, what] += bool(name)
        known = name if names[subject, what] <= RECORDED else ""
        kept[subject, what, known] += count
    return kept
