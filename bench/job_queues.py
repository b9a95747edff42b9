"""Clients of three job queues with the same methods, for the part `ledger`: the relay's deliveries,
procrastinate and pgqueuer.

A job does nothing. `batch` is the number of jobs in a statement; for procrastinate, which fetches
each job with a statement of its own, the number of jobs at once (`concurrency`). The other options
of procrastinate and pgqueuer are what their documentation names for throughput, and their defaults
for durability.
"""

import asyncio
import tempfile
from collections.abc import Callable
from itertools import batched
from pathlib import Path
from typing import Protocol

import asyncpg
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries
from pgqueuer.types import QueueExecutionMode
from procrastinate import App, PsycopgConnector

from bench.relay_queue import RelayQueue
from bench.services import plain
from relay.db.engine import migrate

NAME = "job"


class JobQueue(Protocol):
    """A client of a job queue. `done` counts the jobs that were run."""

    done: int

    async def connect(self) -> None:
        """Connect, unless there is a connection; called before each command."""

    async def enqueue(self, count: int, batch: int) -> list[str]:
        """Enqueue jobs; return their ids, if a worker needs them."""

    async def finish(self, ids: list[str], batch: int) -> None:
        """Fetch and finish jobs."""


class RelayJobs:
    """Deliveries of the relay. Hints name them, as in a worker, which completes deliveries and
    claims the next ones in one COMMIT."""

    def __init__(self, url: str) -> None:
        self._relay = RelayQueue(url, Path(tempfile.gettempdir()))
        self.done = 0

    async def connect(self) -> None:
        """Do nothing: the pool connects."""

    async def enqueue(self, count: int, batch: int) -> list[str]:
        batches = batched(range(count), batch)
        return [queue_id for part in batches for queue_id in self._relay.accept(len(part))]

    async def finish(self, ids: list[str], batch: int) -> None:
        claims = self._relay.complete_and_claim([], ids[:batch])
        for start in range(batch, len(ids) + batch, batch):
            self.done += len(claims)
            claims = self._relay.complete_and_claim(claims, ids[start : start + batch])


class ProcrastinateJobs:
    """procrastinate, with as many connections as its documentation names."""

    def __init__(self, url: str) -> None:
        self.app = App(connector=PsycopgConnector(conninfo=plain(url), max_size=10))
        self._task = self.app.task(name=NAME)(self._run)
        self.done = 0

    async def _run(self) -> None:
        self.done += 1

    async def connect(self) -> None:
        await self.app.open_async()

    async def enqueue(self, count: int, batch: int) -> list[str]:
        for part in batched(range(count), batch):
            await self._task.batch_defer_async(*({} for _ in part))
        return []

    async def finish(self, ids: list[str], batch: int) -> None:
        await self.app.run_worker_async(
            wait=False, concurrency=batch, listen_notify=False, install_signal_handlers=False
        )


class PgqueuerJobs:
    """pgqueuer, with the driver that its documentation calls the fastest."""

    def __init__(self, url: str) -> None:
        self._url = plain(url)
        self.done = 0

    async def _run(self, job: Job) -> None:
        self.done += 1

    async def connect(self) -> None:
        # A new one, because `finish` closes its connection at the end.
        driver = AsyncpgDriver(await asyncpg.connect(self._url))
        self.queries = Queries(driver)
        self._pgqueuer = PgQueuer(driver)
        self._pgqueuer.entrypoint(NAME)(self._run)

    async def enqueue(self, count: int, batch: int) -> list[str]:
        for part in batched(range(count), batch):
            size = len(part)
            await self.queries.enqueue([NAME] * size, [None] * size, [0] * size)
        return []

    async def finish(self, ids: list[str], batch: int) -> None:
        await self._pgqueuer.run(batch_size=batch, mode=QueueExecutionMode.drain)


KINDS: dict[str, Callable[[str], JobQueue]] = {
    "relay": RelayJobs,
    "procrastinate": ProcrastinateJobs,
    "pgqueuer": PgqueuerJobs,
}


def make_schema(kind: str, url: str) -> None:
    """Make the tables of a job queue in a new database."""

    async def procrastinate() -> None:
        async with (app := ProcrastinateJobs(url).app).open_async():
            await app.schema_manager.apply_schema_async()

    async def pgqueuer() -> None:
        client = PgqueuerJobs(url)
        await client.connect()
        await client.queries.install()

    if kind == "relay":
        migrate(url)
    else:
        asyncio.run(procrastinate() if kind == "procrastinate" else pgqueuer())
