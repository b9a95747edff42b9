"""Graphs as numbers: the positions of bars, lines and grid of a page's SVG, for the templates.

Horizontal positions are in hundredths of the width, vertical ones in pixels, so a narrow screen
gets narrower bars and the same text. Time is divided into steps that end now, not at a full hour:
the newest bar covers a whole step, because a step that has just begun would look like mail that has
stopped. The style sheet sets colours and patterns; text always repeats what a colour says.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from relay.report.rows import Row

HEIGHT, TOP, BOTTOM = 180, 8, 22
KINDS = {  # of outcomes, in the order of the bars from the axis up
    "delivered": ("delivered",),
    "deferred": ("deferred", "unreachable", "interrupted"),
    "failed": ("rejected", "unsendable"),
    "uncertain": ("uncertain", "malformed"),
}
KIND = {outcome: kind for kind, outcomes in KINDS.items() for outcome in outcomes}

type Bar = tuple[str, float, float, float, float]  # kind, x, y, width, height


@dataclass(frozen=True, slots=True)
class Graph:
    """`keys`: (kind, text); `steps`: (text, bars); `dots`: (text, x, y); `lines`: (x, y, x, y)
    between dots; `marks` and `hours`: (position, text) on the axes."""

    title: str
    keys: list[tuple[str, str]]
    marks: list[tuple[float, str]]
    hours: list[tuple[float, str]]
    steps: list[tuple[str, list[Bar]]] = field(default_factory=list)
    dots: list[tuple[str, float, float]] = field(default_factory=list)
    lines: list[tuple[float, float, float, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Hour:
    """The numbers of one hour: attempts by kind, and mean seconds of those that delivered."""

    begin: str
    end: str
    tries: dict[str, int]
    seconds: float | None


def rate(now: datetime, rows: Iterable[Row], step: int, steps: int) -> Graph:
    """Attempts per minute by kind of outcome."""
    by_step: dict[int, dict[str, int]] = {}
    for row in rows:
        tries = by_step.setdefault(row["step"], dict.fromkeys(KINDS, 0))
        tries[KIND[row["outcome"]]] += row["tries"]
    highest = _above(
        max((sum(tries.values()) for tries in by_step.values()), default=0) * 60 / step
    )
    drawn = []
    for ago, tries in sorted(by_step.items(), reverse=True):
        floor, bars = _y(0), list[Bar]()
        for kind, count in tries.items():
            if count:
                height = count * 60 / step / highest * (_y(0) - _y(1))
                floor -= height
                bars.append(
                    (kind, _x(ago, steps), round(floor, 1), round(80 / steps, 2), round(height, 1))
                )
        drawn.append((f"{_between(now, ago, step)}: {_counts(tries)}", bars))
    sums = {kind: sum(tries[kind] for tries in by_step.values()) for kind in KINDS}
    keys = [(kind, f"{count} {kind}") for kind, count in sums.items() if count]
    marks = [(_y(part / 2), f"{highest * part / 2:g}") for part in (0, 1, 2)]
    return Graph("Attempts per minute", keys, marks, _hours(now, step * steps), drawn)


def latency(now: datetime, rows: Iterable[Row], step: int, steps: int) -> Graph:
    """Mean seconds of an attempt that delivered, from connection to reply, on a logarithmic scale
    from 1 ms to 1000 s."""
    means = {row["step"]: row["seconds"] for row in rows if row["outcome"] == "delivered"}
    points = {
        ago: (round(_x(ago, steps) + 40 / steps, 2), _y(_log(seconds)))
        for ago, seconds in means.items()
    }
    dots = [
        (f"{_between(now, ago, step)}: {seconds:.3f} s", *points[ago])
        for ago, seconds in sorted(means.items())
    ]
    lines = [(*points[ago + 1], *points[ago]) for ago in sorted(means) if ago + 1 in means]
    marks = [
        (_y(_log(seconds)), text)
        for seconds, text in ((0.001, "1 ms"), (0.1, "0.1 s"), (10, "10 s"), (1000, "1000 s"))
    ]
    keys = [("delivered", f"lately {means[min(means)]:.3f} s")] if means else []
    return Graph(
        "Seconds to be delivered", keys, marks, _hours(now, step * steps), dots=dots, lines=lines
    )


def hourly(now: datetime, rows: Sequence[Row], step: int, steps: int) -> list[Hour]:
    """The numbers of the graphs by hour, the newest first."""
    size, hours = 3600 // step, list[Hour]()
    for first in range(0, steps, size):
        some = [row for row in rows if first <= row["step"] < first + size]
        tries = {
            kind: sum(row["tries"] for row in some if KIND[row["outcome"]] == kind)
            for kind in KINDS
        }
        spent = sum(row["seconds"] * row["tries"] for row in some if row["outcome"] == "delivered")
        mean = spent / tries["delivered"] if tries["delivered"] else None
        hours.append(
            Hour(_clock(now, (first + size) * step), _clock(now, first * step), tries, mean)
        )
    return hours


def _counts(tries: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in tries.items() if count)


def _log(seconds: float) -> float:
    return min(max((math.log10(max(seconds, 0.001)) + 3) / 6, 0.0), 1.0)


def _above(value: float) -> float:
    """The next round number above."""
    if value <= 1:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * digit for digit in (1, 2, 3, 4, 6, 8, 10) if unit * digit >= value)


def _x(ago: int, steps: int) -> float:
    return round(100 * (steps - 1 - ago) / steps, 2)


def _y(part: float) -> float:
    return round(HEIGHT - BOTTOM - part * (HEIGHT - BOTTOM - TOP), 1)


def _hours(now: datetime, seconds: int) -> list[tuple[float, str]]:
    """Where the hours begin, without those too near to an edge."""
    began = now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    positions = []
    for n in range(seconds // 3600 + 1):
        x = 100 - ((now - began).total_seconds() + n * 3600) / seconds * 100
        if 6 < x < 94:
            positions.append((round(x, 2), _clock(began, n * 3600)))
    return positions


def _between(now: datetime, ago: int, step: int) -> str:
    return f"{_clock(now, (ago + 1) * step)} to {_clock(now, ago * step)}"


def _clock(now: datetime, seconds_ago: int) -> str:
    return (now - timedelta(seconds=seconds_ago)).astimezone(UTC).strftime("%H:%M")
