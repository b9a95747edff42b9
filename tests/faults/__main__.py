"""`python -m tests.faults`: the fault matrix.

Each trial is a process of its own, in a mount namespace of its own where this machine allows that,
so a trial that hangs can be ended. Three run at a time, because a trial waits more than it
computes.
No trial begins that might not end within MINUTES; such a trial counts as failed, because its books
are unknown. The exit status is 1 unless all books balance.
"""

import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bench.machine import describe
from tests.faults import page
from tests.faults.cases import CASES, FaultCase, chosen
from tests.faults.disks import PRIVATE_MOUNTS, why_no_disks
from tests.faults.shim import why_no_shim
from tests.faults.templates import make_templates
from tests.faults.trial import TrialResult
from tests.services import ServiceError, end, spawn

LONGEST = 240.0  # seconds of a trial
FACTS = ("qmqp-relay", "when", "processor", "memory", "kernel", "disk", "Python", "SQLite")
NO_TIME = "no time was left"


@dataclass(frozen=True, slots=True)
class MatrixRun:
    """A run. `impossible`: features that this machine lacks, and why. `deadline` is monotonic."""

    seed: str
    templates: Path
    impossible: dict[str, str]
    deadline: float

    def run(self, case: FaultCase, database: str) -> TrialResult:
        """Run one trial and print its result."""
        seed = f"{self.seed}-{case.name}-{database}"
        result = TrialResult(case.name, database, seed)
        lacks = [self.impossible[need] for need in case.needs if need in self.impossible]
        if lacks:
            result.not_run = lacks[0]
        elif time.monotonic() > self.deadline:
            result.not_run = NO_TIME
            result.problems.append(NO_TIME)
        else:
            result = self._spawn(result)
        _print(result)
        return result

    def _spawn(self, result: TrialResult) -> TrialResult:
        file = self.templates / f"{secrets.token_hex(8)}.json"
        output = file.with_suffix(".log")
        private = [] if "disk" in self.impossible else PRIVATE_MOUNTS
        arguments = (result.case, result.database, result.seed, self.templates, file)
        with output.open("wb") as log:
            child = spawn(
                [*private, sys.executable, "-m", "tests.faults.trial", *arguments],
                stdout=log,
                stderr=log,
                cwd=Path(__file__).parents[2],
            )
        with suppress(subprocess.TimeoutExpired):
            child.wait(LONGEST)
        # One that still runs writes down where it is.
        with suppress(ServiceError):
            end(child, signal.SIGINT)
        if file.exists():
            return TrialResult.from_json(file.read_text())
        result.problems.append(f"the trial left no result: {output.read_text()[-2000:]}")
        return result


def _print(result: TrialResult) -> None:
    cells = dict(zip(page.COLUMNS, page.row(result), strict=True))
    words = [f"{name} {cells[name]}" for name in page.COLUMNS[2:-1] if cells[name] != "-"]
    print(f"{result.case}, {cells['database']}: {cells['result']}; {', '.join(words)}", flush=True)
    for problem in result.problems:
        print(f"    {problem}", flush=True)
    if result.problems and not result.not_run:
        print(f"    clients heard {result.replies}; seed {result.seed}; logs: {result.log}")


def run_matrix(
    cases: Sequence[tuple[FaultCase, str]], seed: str, jobs: int, minutes: float
) -> list[TrialResult]:
    """Run these trials; the results in their order."""
    deadline = time.monotonic() + 60 * minutes - LONGEST if minutes else float("inf")
    run = MatrixRun(seed, make_templates(), impossible_features(), deadline)
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda one: run.run(*one), cases))


def impossible_features() -> dict[str, str]:
    """What this machine cannot do, and why."""
    why = {"disk": why_no_disks(), "shim": why_no_shim()}
    return {feature: reason for feature, reason in why.items() if reason}


def facts(directory: Path, **more: str) -> dict[str, str]:
    """What a reader needs to know of the run and its machine."""
    about = describe(directory)
    return {name: about[name] for name in FACTS} | more


def main(
    full: Annotated[
        bool, typer.Option("--full", help="The whole matrix, without a limit.")
    ] = False,
    cases: Annotated[str, typer.Option(help="Some faults, between commas; no page.")] = "",
    databases: Annotated[str, typer.Option(help="Some databases.")] = "postgresql,sqlite",
    seed: Annotated[str, typer.Option(help="That of an earlier run.")] = "",
    jobs: Annotated[int, typer.Option(help="Trials at a time.")] = 3,
    minutes: Annotated[float, typer.Option(help="The limit of the quick matrix.")] = 20.0,
) -> None:
    """Run the fault matrix, and write its table into docs/reliability.md."""
    seed = seed or secrets.token_hex(4)
    names = [name.strip() for name in cases.split(",") if name.strip()]
    if unknown := set(names) - {case.name for case in CASES}:
        raise typer.BadParameter(f"no fault {sorted(unknown)}: see tests/faults/cases.py")
    trials = [one for one in chosen(names, full=full) if one[1] in databases.split(",")]
    print(f"seed {seed}; {len(trials)} trials, {jobs} at a time", flush=True)
    began = time.monotonic()
    results = run_matrix(trials, seed, jobs, 0 if full or names else minutes)
    print(f"\n{page.table(results)}\n")
    command = "make faults FULL=1" if full else "make faults"
    if not names and databases == "postgresql,sqlite":
        minutes_taken = f"{(time.monotonic() - began) / 60:.0f} minutes"
        about = facts(Path("/tmp"), command=f"`{command}`", seed=seed, took=minutes_taken)
        page.write("faults", page.report(about, results))
    failed = [result for result in results if result.problems]
    print(f"{len(results) - len(failed)} of {len(results)} balance, seed {seed}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    typer.run(main)
