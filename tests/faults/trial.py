"""One trial: mail flows, a fault happens, it ends, and the books are closed.

`python -m tests.faults.trial CASE DATABASE SEED TEMPLATES RESULT` runs one in a process of its own
and writes a `TrialResult` as JSON. The phases: mail before the fault, mail during it, mail after
it, and then the time in which everything must become final.

What must stay true: a trial fails unless its books balance, clients heard only what the case
allows, mail was accepted again after the fault, and the fault had an effect.
"""

import json
import shutil
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.faults.books import Books, SentMail, balance
from tests.faults.cases import CASES, FaultCase
from tests.faults.missed import FaultMissed
from tests.faults.site import LEASE, LOGS, FaultSite, Templates, running_site
from tests.faults.traffic import GAVE_UP, MailTraffic
from tests.services import temporary_directory

RATE = 30.0  # messages a second
WARM = 45  # messages before and after the fault
RECOVERY = 60.0  # seconds until mail is accepted again
SETTLING = 60.0 + 3 * LEASE  # seconds until everything is final


@dataclass(slots=True)
class TrialResult:
    """What a trial found. `problems` has a line for each thing that is wrong; `log` is the
    directory of its logs, which is kept only then."""

    case: str
    database: str
    seed: str
    books: Books = field(default_factory=Books)
    replies: dict[str, int] = field(default_factory=dict)  # during and after the fault
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    log: str = ""
    not_run: str = ""  # why

    @classmethod
    def from_json(cls, text: str) -> "TrialResult":
        values = json.loads(text)
        return cls(**{**values, "books": Books(**values["books"])})

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def run_trial(case: FaultCase, database: str, seed: str, templates: Templates) -> TrialResult:
    """Run a case."""
    result = TrialResult(case.name, database, seed)
    directory = temporary_directory()
    began = time.monotonic()
    try:
        with running_site(directory, database, case.needs, seed, templates) as site:
            run_phases(case, site, result)
    except (Exception, KeyboardInterrupt):  # the latter when it takes too long
        result.problems.append(f"the trial broke off: {traceback.format_exc(limit=-4)}")
    result.seconds = round(time.monotonic() - began, 1)
    if result.problems:
        result.log = keep_logs(directory)
    shutil.rmtree(directory, ignore_errors=True)
    return result


def run_phases(case: FaultCase, site: FaultSite, result: TrialResult) -> None:
    """Let mail flow before, during and after the fault, and fill the result."""
    with MailTraffic(site.port, site.plan, rate=RATE) as traffic:
        traffic.until_accepted(WARM)
        traffic.phase = "during"
        try:
            case.fault(site, traffic)
        except FaultMissed as missed:
            result.problems.append(f"the fault had no effect: {missed}")
        traffic.phase = "after"
        try:
            traffic.until_accepted(WARM, RECOVERY)
        except AssertionError as error:
            result.problems.append(f"mail is not accepted again: {error}")
    close_books(site, traffic.mails, result)
    result.replies = dict(traffic.replies("during", "after"))
    result.problems += unexpected_replies(traffic, case.hears)
    if case.accepts and not traffic.replies("during")["250"]:
        result.problems.append("no mail was accepted during the fault")


def close_books(site: FaultSite, mails: Sequence[SentMail], result: TrialResult) -> None:
    """Wait until everything is final, and balance."""
    site.settle(mails, SETTLING)
    ended = [program.directory.name for program in site.programs if not program.running]
    result.problems += [f"{name} has ended by itself" for name in ended]
    result.books = balance(mails, site.evidence())
    result.problems += result.books.complaints
    if result.books.stuck or result.books.lost:
        result.problems.append(f"states of the rest: {site.states_text()}")


def unexpected_replies(traffic: MailTraffic, hears: frozenset[str]) -> Iterable[str]:
    """Replies other than 250 that clients heard before the fault, and others than these later."""
    always = {"250", GAVE_UP}
    for phase, allowed in (("before", always), ("during", always | hears)):
        replies = traffic.replies(*{"during": ("during", "after")}.get(phase, (phase,)))
        if surprising := {reply: n for reply, n in replies.items() if reply not in allowed}:
            yield f"clients heard {surprising} {phase} the fault"


def keep_logs(directory: Path) -> str:
    """Move the logs of a site to a directory that stays; its name."""
    kept = directory.with_name(f"{directory.name}-logs")
    with suppress(FileNotFoundError):  # the site was not built
        (directory / LOGS).rename(kept)
    return str(kept)


def main(name: str, database: str, seed: str, templates: str, result: str) -> None:
    """Run one case and write its result."""
    case = next(case for case in CASES if case.name == name)
    found = run_trial(case, database, seed, Templates.load(Path(templates)))
    Path(result).write_text(found.to_json())


if __name__ == "__main__":
    main(*sys.argv[1:])
