"""The part `ledger` on SQLite. `.ci/bench` runs it on PostgreSQL, and the relay's peers there."""

import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest

from bench.ledger import BATCHES, LEDGER, WORKERS, Ledger, LedgerWorker
from bench.parts import Run, Scale


@pytest.mark.timeout(300)  # five processes import SQLAlchemy and the job queues
def test_all_jobs_of_each_batch_size_are_finished_by_one_worker_and_by_four(tmp_path: Path):
    with ExitStack() as stack:
        url = f"sqlite:///{tmp_path}/ledger.db"
        ledger = Ledger("relay", "relay", url, [], tmp_path, stack)
        figures = LEDGER.run(Run(cast(Any, ledger), Scale(jobs=40, disk_timeout=0.0)))
    names = [
        f"{operation}, batch {batch}, workers {workers}"
        for workers in WORKERS
        for batch in BATCHES
        for operation in ("enqueue", "finish")
    ]
    assert set(figures) == {*names, *(f"CPU client: {name}" for name in names)}
    assert min(figures.values()) > 0


def test_a_worker_that_ends_is_reported():
    with (
        subprocess.Popen(("true",), stdout=subprocess.PIPE, text=True) as child,
        pytest.raises(RuntimeError, match=r"true.+ ended"),
    ):
        LedgerWorker(child).read()
