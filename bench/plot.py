"""Draws a result file as SVG: medians as bars, with a line from the lowest to the highest run, and
the CPU time of a message by role.

`python -m bench.plot RESULT.json PLOT.svg` draws an old result again.
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes

# Title, and the parts of the panel with the prefix of their figures' names.
_PANELS = {
    "messages a second": {
        "load": "a connection a message: ", "reuse": "kept connections: ", "two": "two workers: ",
    },
    "messages a second to a server that takes 100 ms": {"slow": ""},
    "MB a second, messages of 20 MB": {"large": ""},
    "ms, one message at a time (less is better)": {"latency": ""},
    "MiB resident, sum of PSS (less is better)": {"memory": ""},
}  # fmt: skip
_COST = "CPU a message, microseconds (a connection a message)"
_ROLES = ("smtpd", "worker", "database", "broker", "Postfix", "sink", "source")

type Runs = Mapping[str, Sequence[float]]  # by system; failed runs are left out
type Figures = dict[str, Runs]  # by name


def draw(document: Mapping[str, Any], file: Path) -> None:
    """Write the plot of a `report.as_json` document to `file`; nothing while all runs failed."""
    parts = {part["name"]: _without_failures(part["figures"]) for part in document["parts"]}
    panels: dict[str, Figures] = {
        title: {
            f"{prefix}{name}": runs
            for part, prefix in prefixes.items()
            for name, runs in parts.get(part, {}).items()
            if not name.startswith("CPU ")
        }
        for title, prefixes in _PANELS.items()
    }
    load = parts.get("load", {})
    panels[_COST] = {role: load[f"CPU {role}"] for role in _ROLES if f"CPU {role}" in load}
    panels = {title: figures for title, figures in panels.items() if figures}
    if not panels:
        return
    heights = [1 + len(figures) for figures in panels.values()]
    figure, grid = pyplot.subplots(
        len(panels), figsize=(11, 0.7 * sum(heights)), height_ratios=heights, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, (title, figures) in zip(grid.flat, panels.items(), strict=True):
        _draw_panel(axes, figures)
        axes.set_title(title, loc="left")
    about = document["about"]
    figure.supxlabel("  ".join(about.get(key, "") for key in ("when", "processor", "disk"))[:150])
    with pyplot.rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(file)
    pyplot.close(figure)


def _without_failures(figures: Mapping[str, Mapping[str, Sequence[float | None]]]) -> Figures:
    return {
        name: {
            system: [run for run in runs if run is not None]
            for system, runs in by_system.items()
            if any(run is not None for run in runs)
        }
        for name, by_system in figures.items()
    }


def _draw_panel(axes: Axes, figures: Figures) -> None:
    systems = list(dict.fromkeys(system for runs in figures.values() for system in runs))
    height = 0.8 / max(1, len(systems))
    for number, system in enumerate(systems):
        rows = [
            (row + number * height, by_system[system])
            for row, by_system in enumerate(figures.values())
            if system in by_system
        ]
        medians = [statistics.median(runs) for _, runs in rows]
        spread = [
            [median - min(runs) for median, (_, runs) in zip(medians, rows, strict=True)],
            [max(runs) - median for median, (_, runs) in zip(medians, rows, strict=True)],
        ]
        bars = axes.barh([y for y, _ in rows], medians, height, xerr=spread, label=system)
        axes.bar_label(bars, fmt="%.4g", padding=4)
    axes.set_yticks(range(len(figures)), list(figures))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    draw(json.loads(source.read_text()), target)


if __name__ == "__main__":
    main()
