"""Results for people (tables) and for programs (JSON)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.runs import PEER, Measurement

COST = "CPU "
_ROLES = ("smtpd", "worker", "database", "broker", "Postfix", "sink", "source", "machine")


def table(result: Measurement, systems: Sequence[str]) -> str:
    """One part: a line a figure, a column a system; median, lowest and highest, and the ratio to
    Postfix."""
    part = result.part
    lines = [
        f"\n{part.name}: {part.words} ({part.unit}; x: times better than {PEER})",
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
    lines += [f"  the disk was not still before it: {run}" for run in result.restless]
    return "\n".join(lines + [f"  FAILED {failure}" for failure in result.failures])


def _line(head: str, cells: Sequence[str]) -> str:
    return f"  {head:<32}" + "".join(f"{cell:>34}" for cell in cells)


def _cell(result: Measurement, name: str, system: str) -> str:
    values, median, ratio = (
        result.values(name, system),
        result.median(name, system),
        result.ratio(name, system),
    )
    if median is None:
        return "-"
    jitter = f" ({_number(min(values))}-{_number(max(values))})" if len(values) > 1 else ""
    return f"{_number(median)}{jitter}" + (f"  {ratio:.2f}x" if ratio is not None else "")


def _cost(result: Measurement, name: str, system: str) -> str:
    median = result.median(name, system)
    return "-" if median is None else f"{median:.0f}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def facts(about: Mapping[str, str]) -> str:
    """What the figures depend on, a line each."""
    return "\n".join(f"  {name:<38}{value}" for name, value in about.items())


def as_json(results: Sequence[Measurement], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, every run: `{"about": {...}, "parts": [{"name", "unit", "figures": {name:
    {system: [...]}}}]}`.

    Of each system there is a figure a turn, null where that run failed.
    """
    parts = [
        {
            "name": result.part.name, "words": result.part.words, "unit": result.part.unit,
            "more_is_better": result.part.more_is_better, "figures": result.figures, "failures": result.failures,
            "disk_not_still": result.restless,
            "times_better_than_postfix": {
                name: {s: round(ratio, 3) for s in systems if (ratio := result.ratio(name, s)) is not None}
                for name, systems in result.figures.items()
            },
        }
        for result in results
    ]  # fmt: skip
    return {"about": dict(about), "parts": parts}


def write(file: Path, results: Sequence[Measurement], about: Mapping[str, Any]) -> None:
    """Write the JSON file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(as_json(results, about), indent=1) + "\n")
