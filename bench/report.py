"""Results as tables and as JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.runs import PEER, Measurement

COST = "CPU "
_ROLES = ("smtpd", "worker", "database", "broker", "Postfix", "sink", "source", "machine")


def table(result: Measurement, systems: Sequence[str]) -> str:
    """A part as a table: a line for each figure, a column for each system; the median, the lowest
    and highest run, and the ratio to Postfix."""
    part = result.part
    lines = [
        f"\n{part.name}: {part.title} ({part.unit}; x: times better than {PEER})",
        _line("", systems),
    ]
    rates = [name for name in result.figures if not name.startswith(COST)]
    lines += [_line(name, [_cell(result, name, system) for system in systems]) for name in rates]
    costs = [f"{COST}{role}" for role in _ROLES if f"{COST}{role}" in result.figures]
    if costs:
        lines.append(_line("CPU, us a message:", ["" for _ in systems]))
        lines += [
            _line(f"  {name.removeprefix(COST)}", [_cost(result, name, s) for s in systems])
            for name in costs
        ]
    lines += [f"  the disk was busy before it: {run}" for run in result.busy_disk]
    return "\n".join(lines + [f"  FAILED {failure}" for failure in result.failures])


def _line(head: str, cells: Sequence[str]) -> str:
    return f"  {head:<32}" + "".join(f"{cell:>34}" for cell in cells)


def _cell(result: Measurement, name: str, system: str) -> str:
    median = result.median(name, system)
    if median is None:
        return "-"
    values = result.values(name, system)
    ratio = result.ratio(name, system)
    spread = f" ({_number(min(values))}-{_number(max(values))})" if len(values) > 1 else ""
    return f"{_number(median)}{spread}" + (f"  {ratio:.2f}x" if ratio is not None else "")


def _cost(result: Measurement, name: str, system: str) -> str:
    median = result.median(name, system)
    return "-" if median is None else f"{median:.0f}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def facts(about: Mapping[str, str]) -> str:
    """The facts that the figures depend on, a line each."""
    return "\n".join(f"  {name:<38}{value}" for name, value in about.items())


def as_json(results: Sequence[Measurement], about: Mapping[str, Any]) -> dict[str, Any]:
    """All figures of all runs: `{"about": {...}, "parts": [{"name", "unit", "figures": {name:
    {system: [...]}}}]}`. A run that failed is null."""
    parts = [
        {
            "name": result.part.name, "words": result.part.title, "unit": result.part.unit,
            "more_is_better": result.part.more_is_better, "figures": result.figures, "failures": result.failures,
            "disk_not_still": result.busy_disk,
            "times_better_than_postfix": {
                name: {s: round(ratio, 3) for s in systems if (ratio := result.ratio(name, s)) is not None}
                for name, systems in result.figures.items()
            },
        }
        for result in results
    ]  # fmt: skip
    return {"about": dict(about), "parts": parts}


def write(file: Path, results: Sequence[Measurement], about: Mapping[str, Any]) -> None:
    """Write the results as a JSON file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(as_json(results, about), indent=1) + "\n")
