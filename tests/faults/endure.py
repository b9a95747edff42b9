"""`python -m tests.faults.endure`: half load for MINUTES, and a random fault each minute.

One relay endures all of it, with a proxy before PostgreSQL, disks of its own and the shim, as far
as this machine allows. Half load is half of what the relay delivers at full speed before the first
fault. The seed, which is printed, chooses the faults. At the end the same books are closed as
after a trial, over every message.
"""

import os
import random
import secrets
import shutil
import sys
import time
import traceback
from dataclasses import dataclass, field
from typing import Annotated

import typer

from tests.faults import page
from tests.faults.__main__ import facts, impossible_features
from tests.faults.books import SentMail
from tests.faults.cases import CASES, FaultCase
from tests.faults.disks import PRIVATE_MOUNTS
from tests.faults.missed import FaultMissed
from tests.faults.site import FaultSite, Templates, running_site
from tests.faults.templates import make_templates
from tests.faults.traffic import GAVE_UP, MailTraffic
from tests.faults.trial import (
    RECOVERY,
    TrialResult,
    close_books,
    keep_logs,
    unexpected_replies,
)
from tests.services import temporary_directory

FEATURES = frozenset({"proxy", "disk", "shim"})
CLIENTS = 12
MEASURED = 10.0  # seconds at full speed
MINUTE = 60.0
_PRIVATE = "FAULTS_PRIVATE_MOUNTS"  # set in the process that has mounts of its own


@dataclass(slots=True)
class Endurance:
    """A run: `mails` are those of all clients, `faults` the names of what happened."""

    site: FaultSite
    result: TrialResult
    rng: random.Random
    mails: list[SentMail] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def half_load(self) -> float:
        """Half of the messages a second that come through at full speed."""
        with MailTraffic(self.site.port, self.site.plan, rate=0.0, clients=CLIENTS) as traffic:
            self.site.wait(MEASURED)
            kept = self.site.evidence().kept
            through = sum(all(map(kept.get, mail.delivered_to)) for mail in [*traffic.mails])
        self.mails += traffic.mails
        self.site.settle(self.mails, RECOVERY)
        return max(1.0, through / MEASURED / 2)

    def run(self, cases: list[FaultCase], minutes: int, rate: float) -> None:
        """Let mail flow, with a fault in each minute, and close the books."""
        first = len(self.mails) + 1_000_000  # numbers that no earlier message has
        with MailTraffic(
            self.site.port, self.site.plan, rate=rate, clients=CLIENTS, first=first
        ) as traffic:
            for _ in range(minutes):
                ends = time.monotonic() + MINUTE
                self._fault(self.rng.choice(cases), traffic)
                self.site.wait(max(0.0, ends - time.monotonic()))
        self.mails += traffic.mails
        close_books(self.site, self.mails, self.result)
        hears = frozenset().union(*(case.hears for case in cases))
        self.result.replies = dict(traffic.replies("during"))
        self.result.problems += unexpected_replies(traffic, hears | {GAVE_UP})

    def _fault(self, case: FaultCase, traffic: MailTraffic) -> None:
        print(f"{time.strftime('%H:%M:%S')} {case.name}", flush=True)
        traffic.phase = "during"
        self.faults.append(case.name)
        try:
            case.fault(self.site, traffic)
            traffic.until_accepted(1, RECOVERY)
        except FaultMissed as missed:
            print(f"    no effect: {missed}", flush=True)
        except Exception:
            problem = f"{case.name}: {traceback.format_exc(limit=-3)}"
            self.result.problems.append(problem)
            print(problem, flush=True)
            self.site.start()


def main(
    minutes: Annotated[int, typer.Option(help="Faults, and minutes.")] = 30,
    database: Annotated[str, typer.Option(help="postgresql or sqlite.")] = "postgresql",
    seed: Annotated[str, typer.Option(help="That of an earlier run.")] = "",
    rate: Annotated[float, typer.Option(help="Messages a second; 0: half load.")] = 0.0,
) -> None:
    """Endure random faults, and write the result into docs/reliability.md."""
    impossible = impossible_features()
    if "disk" not in impossible and _PRIVATE not in os.environ:
        command = [*PRIVATE_MOUNTS, sys.executable, "-m", "tests.faults.endure", *sys.argv[1:]]
        os.execvpe(command[0], command, {**os.environ, _PRIVATE: "1"})
    seed = seed or secrets.token_hex(4)
    print(f"seed {seed}", flush=True)
    features = FEATURES - impossible.keys()
    cases = [case for case in CASES if database in case.full and case.needs <= features]
    result = TrialResult("endure", database, seed)
    directory = temporary_directory()
    began = time.monotonic()
    templates = Templates.load(make_templates())
    with running_site(directory, database, features, seed, templates) as site:
        endurance = Endurance(site, result, random.Random(seed))
        rate = rate or endurance.half_load()
        print(f"{rate:.0f} messages a second", flush=True)
        endurance.run(cases, minutes, rate)
    result.seconds = round(time.monotonic() - began, 1)
    if result.problems:
        print("\n".join(result.problems), f"\nlogs: {keep_logs(directory)}")
    shutil.rmtree(directory, ignore_errors=True)
    about = facts(
        directory.parent,
        command=f"`make endure MINUTES={minutes}`",
        seed=seed,
        rate=f"{rate:.0f} messages a second",
        faults=", ".join(endurance.faults),
    )
    print(page.table([result]))
    page.write("endure", page.report(about, [result]))
    sys.exit(bool(result.problems))


if __name__ == "__main__":
    typer.run(main)
