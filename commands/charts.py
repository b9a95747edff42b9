"""Graphs as numbers: where the bars, lines and grid of a page's SVG stand. The templates draw them.

A graph is WIDTH by HEIGHT units, the plot what is left of it beside the labels. Colours are the style sheet's.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from commands.tables import Row

WIDTH, HEIGHT = 720, 180
LEFT, BOTTOM, TOP = 44, 20, 8
KINDS = {  # of outcomes, from the axis up
    "accepted": ("accepted",),
    "deferred": ("deferred", "unreachable", "interrupted"),
    "failed": ("rejected", "unsendable"),
    "uncertain": ("uncertain", "malformed"),
}


@dataclass(frozen=True, slots=True)
class Graph:
    """`bars`: (kind, x, y, width, height, words); `line`: points; `marks` and `hours`: (place, words) of the axes."""

    title: str
    words: str
    bars: list[tuple[str, float, float, float, float, str]]
    line: str
    marks: list[tuple[float, str]]
    hours: list[tuple[float, str]]
    empty: bool


def rate(now: int, rows: Iterable[Row], step: int, steps: int) -> Graph:
    """Tries a minute, by what became of them."""
    tries: dict[tuple[int, str], int] = {}
    for row in rows:
        kind = next(kind for kind, outcomes in KINDS.items() if row["outcome"] in outcomes)
        tries[row["step"], kind] = tries.get((row["step"], kind), 0) + row["tries"]
    totals = {at: sum(tries.get((at, kind), 0) for kind in KINDS) for at in range(now - steps + 1, now + 1)}
    highest = _above(max(totals.values(), default=0) * 60 / step)
    bars = []
    for at in totals:
        floor = float(HEIGHT - BOTTOM)
        for kind in KINDS:
            if count := tries.get((at, kind), 0):
                high = count * 60 / step / highest * (HEIGHT - BOTTOM - TOP)
                floor -= high
                words = f"{_clock(at * step)} {count} {kind}"
                bars.append((kind, _x(at, now, steps), floor, _width(steps) * 0.8, high, words))
    marks = [(_y(part / 2), f"{highest * part / 2:g}") for part in (0, 1, 2)]
    sums = {kind: sum(count for (_, one), count in tries.items() if one == kind) for kind in KINDS}
    words = ", ".join(f"{count} {kind}" for kind, count in sums.items() if count)
    return Graph("Tries a minute", words, bars, "", marks, _hours(now, step, steps), not words)


def latency(now: int, rows: Iterable[Row], step: int, steps: int) -> Graph:
    """Mean seconds of a try that was accepted, from connection to reply; the scale is logarithmic, 1 ms to 1000 s."""
    found = {row["step"]: max(row["seconds"], 0.001) for row in rows if row["outcome"] == "accepted"}
    points = [(at, seconds) for at, seconds in sorted(found.items()) if now - steps < at <= now]
    half = _width(steps) * 0.4
    line = " ".join(f"{_x(at, now, steps) + half:.1f},{_y(_log(seconds)):.1f}" for at, seconds in points)
    dots = [
        ("dot", _x(at, now, steps) + half, _y(_log(seconds)), 0.0, 0.0, f"{_clock(at * step)} {seconds:.3f} s")
        for at, seconds in points
    ]
    marks = [(_y(_log(seconds)), words) for seconds, words in ((0.001, "1 ms"), (0.1, "0.1 s"), (10, "10 s"))]
    words = f"lately {points[-1][1]:.3f} s" if points else ""
    return Graph("Seconds to be accepted", words, dots, line, marks, _hours(now, step, steps), not points)


def _log(seconds: float) -> float:
    return min(max((math.log10(seconds) + 3) / 6, 0.0), 1.0)


def _above(value: float) -> float:
    """The next round number."""
    if value <= 1:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * digit for digit in (1, 2, 3, 4, 6, 8, 10) if unit * digit >= value)


def _width(steps: int) -> float:
    return (WIDTH - LEFT) / steps


def _x(at: int, now: int, steps: int) -> float:
    return round(LEFT + (at - now + steps - 1) * _width(steps), 1)


def _y(part: float) -> float:
    return HEIGHT - BOTTOM - part * (HEIGHT - BOTTOM - TOP)


def _hours(now: int, step: int, steps: int) -> list[tuple[float, str]]:
    """Where the hours begin, but for those too near to an edge."""
    hours = ((_x(at, now, steps), at * step) for at in range(now - steps + 1, now + 1) if at * step % 3600 == 0)
    return [(x, _clock(at)) for x, at in hours if LEFT + 16 < x < WIDTH - 16]


def _clock(seconds: int) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%H:%M")
