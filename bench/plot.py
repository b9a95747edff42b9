"""A plot of a result file, drawn as SVG by hand: bars of medians with their spread, a panel for
each unit, and what a message costs in CPU.

`python -m bench.plot RESULT.json PLOT.svg` draws one again.
"""

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

_COLOURS = ("#2f6f9f", "#7fb2d6", "#c9772f", "#6b8f3c", "#8a5fa8", "#b0a38c", "#555555")
_WIDTH, _LEFT, _BAR, _GAP = 900, 250, 16, 14
_ROLES = ("smtpd", "worker", "database", "broker", "Postfix", "sink", "source")
# Title, parts, what stands before the names of their figures.
_PANELS = (
    (
        "messages a second",
        {"load": "a connection a message: ", "reuse": "kept connections: ", "two": "two workers: "},
    ),
    ("messages a second to a server that takes 100 ms", {"slow": ""}),
    ("MB a second, messages of 20 MB", {"large": ""}),
    ("ms, one message at a time (less is better)", {"latency": ""}),
    ("MiB resident, sum of PSS (less is better)", {"memory": ""}),
)

type Runs = Mapping[str, Sequence[float]]  # by system
type Values = Mapping[str, Runs]


def draw(document: Mapping[str, Any]) -> str:
    """The plot of what `report.as_json` made."""
    parts: dict[str, Values] = {
        part["name"]: _without_gaps(part["figures"]) for part in document["parts"]
    }
    lines: list[str] = []
    y = 10
    for title, of in _PANELS:
        rows = [
            (f"{words}{name}", runs)
            for part, words in of.items()
            for name, runs in parts.get(part, {}).items()
            if not name.startswith("CPU ")
        ]
        if rows:
            y = _panel_of_bars(lines, y + 20, f"{title} (line: lowest to highest run)", rows)
    y = _panel_of_costs(lines, y + 20, parts.get("load", {}))
    about = document["about"]
    words = f"{about.get('when', '')}  {about.get('processor', '')}  {about.get('disk', '')}"
    lines.append(_text(10, y + 24, words[:150], size=10))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 40}" font-family="sans-serif">'
    return "\n".join(
        [head, f'<rect width="{_WIDTH}" height="{y + 40}" fill="white"/>', *lines, "</svg>", ""]
    )


def _without_gaps(figures: Mapping[str, Mapping[str, Sequence[float | None]]]) -> Values:
    """The runs that did not fail."""
    kept = {
        name: {system: [run for run in runs if run is not None] for system, runs in of.items()}
        for name, of in figures.items()
    }
    return {
        name: {system: runs for system, runs in of.items() if runs} for name, of in kept.items()
    }


def _panel_of_bars(lines: list[str], y: int, title: str, rows: Sequence[tuple[str, Runs]]) -> int:
    lines.append(_text(10, y, title, bold=True))
    systems = list(dict.fromkeys(system for _, values in rows for system in values))
    highest = max((max(runs) for _, values in rows for runs in values.values()), default=1.0)
    y = _legend(lines, y + 18, systems)
    for label, values in rows:
        lines.append(_text(10, y + _BAR, label))
        for system, runs in values.items():
            middle, scale = statistics.median(runs), (_WIDTH - _LEFT - 70) / highest
            lines.append(_rect(_LEFT, y, middle * scale, _COLOURS[systems.index(system)]))
            low, high, mid = _LEFT + min(runs) * scale, _LEFT + max(runs) * scale, y + _BAR / 2
            lines.append(f'<path d="M{low:.1f} {mid}H{high:.1f}" stroke="black"/>')
            lines.append(
                _text(high + 6, y + _BAR - 4, f"{middle:.0f}" if middle >= 20 else f"{middle:.1f}")
            )
            y += _BAR + 2
        y += _GAP
    return y


def _panel_of_costs(lines: list[str], y: int, figures: Values) -> int:
    costs = {role: figures[f"CPU {role}"] for role in _ROLES if f"CPU {role}" in figures}
    systems = list(dict.fromkeys(system for values in costs.values() for system in values))
    if not systems:
        return y
    lines.append(_text(10, y, "CPU a message, microseconds (a connection a message)", bold=True))
    y = _legend(lines, y + 18, list(costs))
    medians = {s: {r: statistics.median(v[s]) for r, v in costs.items() if s in v} for s in systems}
    scale = (_WIDTH - _LEFT - 70) / max(sum(of.values()) for of in medians.values())
    for system, spent in medians.items():
        lines.append(_text(10, y + _BAR, system))
        x = float(_LEFT)
        for role, value in spent.items():
            lines.append(_rect(x, y, value * scale, _COLOURS[list(costs).index(role)]))
            x += value * scale
        lines.append(_text(x + 6, y + _BAR - 4, f"{sum(spent.values()):.0f}"))
        y += _BAR + _GAP
    return y


def _legend(lines: list[str], y: int, names: Iterable[str]) -> int:
    for number, name in enumerate(names):
        x = 10 + number * 125 if number else 10
        lines.append(
            f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{_COLOURS[number]}"/>'
        )
        lines.append(_text(x + 14, y, name, size=11))
    return y + 14


def _rect(x: float, y: float, width: float, colour: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{max(width, 0.5):.1f}" height="{_BAR}" fill="{colour}"/>'
    )


def _text(x: float, y: float, words: str, *, size: int = 12, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}"{weight}>{escape(words)}</text>'


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    target.write_text(draw(json.loads(source.read_text())))


if __name__ == "__main__":
    main()
