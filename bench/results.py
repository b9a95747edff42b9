"""Results: a part is run on all systems in turns, so that a slow minute affects all of them."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bench.parts import NO_RATIO, Figures, Part, Run, Scale, System

PEER = "Postfix"
COST = "CPU "
ROLES = ("smtpd", "worker", "database", "broker", "Postfix", "sink", "source", "machine")

type Values = list[float | None]  # one for each turn; None where that run failed


@dataclass(slots=True)
class PartResult:
    """The result of one part, as it is in the result file. `words` is its title.

    `figures` are by name and system. `failures` names the runs that failed, `disk_not_still` those
    before which the disk was not idle. `times_better_than_postfix` is by name and system, too.
    """

    name: str
    words: str
    unit: str
    more_is_better: bool
    figures: dict[str, dict[str, Values]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    disk_not_still: list[str] = field(default_factory=list)
    times_better_than_postfix: dict[str, Figures] = field(default_factory=dict)


def without_failures(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def measure(part: Part, systems: Sequence[System], scale: Scale) -> PartResult:
    """Run a part `scale.runs` times on each system that supports it."""
    result = PartResult(part.name, part.title, part.unit, part.more_is_better)
    for turn in range(scale.runs):
        # The system that is first in one turn is last in the next.
        for system in systems if turn % 2 == 0 else systems[::-1]:
            run = Run(system, scale)
            figures: Figures = {}
            try:
                for run.arrangement in part.arrangements:
                    if system.arrange(run.arrangement):
                        figures |= part.run(run)
            except Exception as error:  # any fault of this run: the others keep their figures
                failure = f"run {turn + 1}, {system.name}: {type(error).__name__}: {error}"
                result.failures.append(failure)
                continue
            if run.busy:
                result.disk_not_still.append(f"run {turn + 1}, {system.name}")
            for name, value in figures.items():
                runs = result.figures.setdefault(name, {})
                runs.setdefault(system.name, [None] * scale.runs)[turn] = value
    result.times_better_than_postfix = {
        name: _ratios(by_system, more_is_better=part.more_is_better)
        for name, by_system in result.figures.items()
        if not name.endswith(NO_RATIO)
    }
    return result


def _ratios(by_system: dict[str, Values], *, more_is_better: bool) -> Figures:
    """How many times better than Postfix each system is: the median over the turns in which neither
    failed."""
    ratios: Figures = {}
    for system in by_system.keys() - {PEER}:
        pairs = zip(by_system[system], by_system.get(PEER, []), strict=False)  # it may be missing
        turns = [own / peer for own, peer in pairs if own is not None and peer]
        if turns:
            ratio = statistics.median(turns)
            ratios[system] = round(ratio if more_is_better or not ratio else 1 / ratio, 3)
    return ratios


def table(result: PartResult, systems: Sequence[str]) -> str:
    """A part as a table: a line for each figure, a column for each system; the median, the lowest
    and highest run, and the ratio to Postfix."""
    ratios = any(result.times_better_than_postfix.values())
    explained = f"; x: times better than {PEER}" if ratios else ""
    title = f"{result.name}: {result.words} ({result.unit}{explained})"
    rows = {name: name for name in result.figures if not name.startswith(COST)}
    costs = {f"  {name.removeprefix(COST)}": name for name in result.figures if name not in rows}
    heading = {"CPU, us a message or job:": ""} if costs else {}
    lines = [f"\n{title}", _line("", systems)]
    for head, name in (rows | heading | costs).items():
        lines.append(_line(head, [_cell(result, name, system) for system in systems]))
    lines += [f"  the disk was busy before it: {run}" for run in result.disk_not_still]
    return "\n".join(lines + [f"  FAILED {failure}" for failure in result.failures])


def _line(head: str, cells: Sequence[str]) -> str:
    return f"  {head:<44}" + "".join(f"{cell:>34}" for cell in cells)


def _cell(result: PartResult, name: str, system: str) -> str:
    if not name:
        return ""
    values = without_failures(result.figures[name].get(system, []))
    if not values or name.startswith(COST):
        return f"{statistics.median(values):.0f}" if values else "-"
    ratio = result.times_better_than_postfix.get(name, {}).get(system)
    spread = f" ({_number(min(values))}-{_number(max(values))})" if len(values) > 1 else ""
    better = f"  {ratio:.2f}x" if ratio is not None else ""
    return f"{_number(statistics.median(values))}{spread}{better}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
