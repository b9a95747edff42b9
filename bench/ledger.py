"""The part `ledger`: jobs a second through SQL alone, and the CPU time of a job, for the relay and
for job queues in Python on the same PostgreSQL.

Each queue has a database of its own and workers that are processes (`ledger_worker`). One worker or
four enqueue jobs in batches, and then fetch and finish them. All of them begin at the same moment;
the time ends when the last one has finished.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

from bench import services
from bench.job_queues import make_schema
from bench.machine import cpu_seconds
from bench.parts import Figures, Part, Run, System
from bench.results import COST

BATCHES = (1, 8, 32, 256)
WORKERS = (1, 4)
JOBS_OF_A_BATCH = 500  # at most so many batches for a figure, because small ones are slow
_ON_POSTGRESQL = {
    "relay": "relay, PostgreSQL",
    "procrastinate": "procrastinate",
    "pgqueuer": "pgqueuer",
}


class LedgerWorker:
    """A child that executes one command at a time."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child

    def write(self, line: str) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(line + "\n")
        self._child.stdin.flush()

    def read(self) -> str:
        """The next line. Raises RuntimeError if the child has ended."""
        assert self._child.stdout is not None
        if not (line := self._child.stdout.readline()):
            raise RuntimeError(f"{self._child.args!r} ended")
        return line


class Ledger:
    """A job queue with its workers. `database`: the process ids of a database server."""

    def __init__(
        self, name: str, kind: str, url: str, database: list[int], top: Path, stack: ExitStack
    ) -> None:
        self.name = name
        self.directory = top
        self._database = database
        make_schema(kind, url)
        self._workers = [stack.enter_context(_worker(kind, url)) for _ in range(max(WORKERS))]

    def arrange(self, _: object) -> bool:
        return True

    def run(self, commands: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], Figures]:
        """Execute a command in each of so many workers: their reports, and seconds by name."""
        workers = self._workers[: len(commands)]
        for worker, command in zip(workers, commands, strict=True):
            worker.write(json.dumps(command))
        for worker in workers:
            worker.read()
        database = cpu_seconds(self._database)
        for worker in workers:
            worker.write("")
        reports = [json.loads(worker.read()) for worker in workers]
        times = {
            "all": max(report["ended"] for report in reports) - min(r["began"] for r in reports),
            "client": sum(report["cpu"] for report in reports),
        }
        if self._database:
            times["database"] = cpu_seconds(self._database) - database
        return reports, times


@contextmanager
def _worker(kind: str, url: str) -> Iterator[LedgerWorker]:
    """A worker that ends when its standard input is closed."""
    command = (sys.executable, "-m", "bench.ledger_worker", kind, url)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        command, cwd=services.ROOT, env=services.clean_environment(), **cast(Any, pipes)
    ) as child:
        yield LedgerWorker(child)


def started(systems: Sequence[str], top: Path, stack: ExitStack) -> list[System]:
    """The relay on the databases of these names, and the others beside it on PostgreSQL."""
    ledgers = []
    if "postgresql" in systems:
        server, url = stack.enter_context(services.postgresql(top / "ledger"))
        for kind, name in _ON_POSTGRESQL.items():
            ledgers.append(Ledger(name, kind, services.beside(url, kind), [server], top, stack))
    if "sqlite" in systems:
        url = f"sqlite:///{top}/ledger.db"
        ledgers.append(Ledger("relay, SQLite", "relay", url, [], top, stack))
    return cast(list[System], ledgers)


def _measure(run: Run) -> Figures:
    ledger = cast(Ledger, run.system)
    figures: Figures = {}
    run.wait_for_disk()
    for workers in WORKERS:
        for batch in BATCHES:
            share = min(run.scale.jobs, JOBS_OF_A_BATCH * batch) // workers
            enqueued, enqueue = ledger.run(
                [{"do": "enqueue", "count": share, "batch": batch}] * workers
            )
            finished, finish = ledger.run(
                [{"do": "finish", "ids": report["ids"], "batch": batch} for report in enqueued]
            )
            count = share * workers
            if (done := sum(report["done"] for report in finished)) != count:
                raise RuntimeError(f"{done} of {count} jobs were finished")
            for name, times in {"enqueue": enqueue, "finish": finish}.items():
                name = f"{name}, batch {batch}, workers {workers}"
                figures[name] = count / times.pop("all")
                for role, seconds in times.items():
                    figures[f"{COST}{role}: {name}"] = 1e6 * seconds / count
    return figures


LEDGER = Part("ledger", "through SQL alone; finish: fetch and finish", "jobs a second", _measure)
