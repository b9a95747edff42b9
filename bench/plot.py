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

from bench.results import COST, ROLES, without_failures

# Title, and the parts of the panel with the prefix of their figures' names.
_PANELS = {
    "messages a second": {
        "load": "a connection a message: ",
        "reuse": "kept connections: ",
        "two": "two workers: ",
    },
    "messages a second to a server that takes 100 ms": {"slow": ""},
    "jobs a second through SQL alone": {"ledger": ""},
    "MB a second, messages of 20 MB": {"large": ""},
    "ms, one message at a time (less is better)": {"latency": "", "loaded": "beside the load: "},
    "MiB resident, sum of PSS (less is better)": {"memory": ""},
}
_COST = "CPU a message, microseconds (a connection a message)"

type Figures = Mapping[str, Mapping[str, Sequence[float | None]]]  # by name and system


def draw(document: Mapping[str, Any], file: Path) -> None:
    """Write the plot of a result file to `file`; nothing while all runs failed."""
    parts: dict[str, Figures] = {part["name"]: part["figures"] for part in document["parts"]}
    panels = {
        title: {
            f"{prefix}{name}": by_system
            for part, prefix in prefixes.items()
            for name, by_system in parts.get(part, {}).items()
            if not name.startswith(COST)
        }
        for title, prefixes in _PANELS.items()
    }
    load = parts.get("load", {})
    panels[_COST] = {role: load[COST + role] for role in ROLES[:-1] if COST + role in load}
    panels = {title: figures for title, figures in panels.items() if figures}
    if not panels:
        return
    heights = [1 + len(figures) for figures in panels.values()]
    figure, grid = pyplot.subplots(
        len(panels),
        figsize=(11, 0.7 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axes, (title, figures) in zip(grid.flat, panels.items(), strict=True):
        _draw_panel(axes, figures)
        axes.set_title(title, loc="left")
    about = document["about"]
    figure.supxlabel("  ".join(about.get(key, "") for key in ("when", "processor", "disk"))[:150])
    with pyplot.rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(file)
    pyplot.close(figure)


def _draw_panel(axes: Axes, figures: Figures) -> None:
    systems = list(dict.fromkeys(system for by_system in figures.values() for system in by_system))
    height = 0.8 / len(systems)
    for number, system in enumerate(systems):
        rows = {
            row + number * height: without_failures(by_system[system])
            for row, by_system in enumerate(figures.values())
            if system in by_system
        }
        medians = [statistics.median(runs) for runs in rows.values()]
        spread = [
            [median - min(runs) for median, runs in zip(medians, rows.values(), strict=True)],
            [max(runs) - median for median, runs in zip(medians, rows.values(), strict=True)],
        ]
        bars = axes.barh(list(rows), medians, height, xerr=spread, label=system)
        axes.bar_label(bars, fmt="%.4g", padding=4)
    axes.set_yticks(range(len(figures)), list(figures))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    draw(json.loads(source.read_text()), target)
