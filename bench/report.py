"""Results as tables."""

import statistics
from collections.abc import Mapping, Sequence

from bench.runs import PEER, Result, without_failures

COST = "CPU "
ROLES = ("smtpd", "worker", "database", "broker", "Postfix", "sink", "source", "machine")


def table(result: Result, systems: Sequence[str]) -> str:
    """A part as a table: a line for each figure, a column for each system; the median, the lowest
    and highest run, and the ratio to Postfix."""
    title = f"{result.name}: {result.words} ({result.unit}; x: times better than {PEER})"
    rows = {name: name for name in result.figures if not name.startswith(COST)}
    costs = {f"  {role}": name for role in ROLES if (name := f"{COST}{role}") in result.figures}
    lines = [f"\n{title}", _line("", systems)]
    lines += [_line(head, [_cell(result, rows[head], s) for s in systems]) for head in rows]
    lines += ["  CPU, us a message:"] * bool(costs)
    lines += [_line(head, [_cost(result, costs[head], s) for s in systems]) for head in costs]
    lines += [f"  the disk was busy before it: {run}" for run in result.disk_not_still]
    return "\n".join(lines + [f"  FAILED {failure}" for failure in result.failures])


def _line(head: str, cells: Sequence[str]) -> str:
    return f"  {head:<32}" + "".join(f"{cell:>34}" for cell in cells)


def _cell(result: Result, name: str, system: str) -> str:
    values = without_failures(result.figures[name].get(system, []))
    if not values:
        return "-"
    ratio = result.times_better_than_postfix.get(name, {}).get(system)
    spread = f" ({_number(min(values))}-{_number(max(values))})" if len(values) > 1 else ""
    better = f"  {ratio:.2f}x" if ratio is not None else ""
    return f"{_number(statistics.median(values))}{spread}{better}"


def _cost(result: Result, name: str, system: str) -> str:
    values = without_failures(result.figures[name].get(system, []))
    return f"{statistics.median(values):.0f}" if values else "-"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def facts(about: Mapping[str, str]) -> str:
    """The facts that the figures depend on, a line each."""
    return "\n".join(f"  {name:<38}{value}" for name, value in about.items())
