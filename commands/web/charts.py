"""Graphs as numbers: where the bars, lines and grid of a page's SVG stand. The templates draw them.

What lies across is in hundredths of the width, what stands up in pixels: a narrow screen gets
narrower bars and the same words. Time is cut into steps that end now and not with the clock, so
that the newest bar is as long as all others: one of a step that has just begun would look like mail
that has stopped. Colours and patterns are the style sheet's; whatever a colour says, words say too.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from commands.output import Row

HEIGHT, TOP, BOTTOM = 180, 8, 22
KINDS = {  # of outcomes, from the axis up
    "delivered": ("delivered",),
    "deferred": ("deferred", "unreachable", "interrupted"),
    "failed": ("rejected", "unsendable"),
    "uncertain": ("uncertain", "malformed"),
}
KIND = {outcome: kind for kind, outcomes in KINDS.items() for outcome in outcomes}

type Bar = tuple[str, float, float, float, float]  # kind, x, y, width, height


@dataclass(frozen=True, slots=True)
class Graph:
    """`keys`: (kind, words); `steps`: (words, bars); `dots`: (words, x, y); `lines`: (x, y, x, y)
    between those.

    `marks` and `hours`: (place, words) of the axes.
    """

    title: str
    keys: list[tuple[str, str]]
    marks: list[tuple[float, str]]
    hours: list[tuple[float, str]]
    steps: list[tuple[str, list[Bar]]] = field(default_factory=list)
    dots: list[tuple[str, float, float]] = field(default_factory=list)
    lines: list[tuple[float, float, float, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Hour:
    """The same for those who want figures: tries by kind, and mean seconds of those that were
    accepted."""

    begin: str
    end: str
    tries: dict[str, int]
    seconds: float | None


def rate(now: datetime, rows: Iterable[Row], step: int, steps: int) -> Graph:
    """Tries a minute, by what became of them."""
    found: dict[int, dict[str, int]] = {}
    for row in rows:
        tries = found.setdefault(row["step"], dict.fromkeys(KINDS, 0))
        tries[KIND[row["outcome"]]] += row["tries"]
    highest = _above(max((sum(tries.values()) for tries in found.values()), default=0) * 60 / step)
    drawn = []
    for ago, tries in sorted(found.items(), reverse=True):
        floor, bars = _y(0), list[Bar]()
        for kind, count in tries.items():
            if count:
                high = count * 60 / step / highest * (_y(0) - _y(1))
                floor -= high
                bars.append(
                    (kind, _x(ago, steps), round(floor, 1), round(80 / steps, 2), round(high, 1))
                )
        drawn.append((f"{_between(now, ago, step)}: {_told(tries)}", bars))
    sums = {kind: sum(tries[kind] for tries in found.values()) for kind in KINDS}
    keys = [(kind, f"{count} {kind}") for kind, count in sums.items() if count]
    marks = [(_y(part / 2), f"{highest * part / 2:g}") for part in (0, 1, 2)]
    return Graph("Tries a minute", keys, marks, _hours(now, step * steps), drawn)


def latency(now: datetime, rows: Iterable[Row], step: int, steps: int) -> Graph:
    """Mean seconds of a try that was accepted, from connection to reply; the scale is logarithmic,
    1 ms to 1000 s."""
    found = {row["step"]: row["seconds"] for row in rows if row["outcome"] == "delivered"}
    at = {
        ago: (round(_x(ago, steps) + 40 / steps, 2), _y(_log(seconds)))
        for ago, seconds in found.items()
    }
    dots = [
        (f"{_between(now, ago, step)}: {seconds:.3f} s", *at[ago])
        for ago, seconds in sorted(found.items())
    ]
    lines = [(*at[ago + 1], *at[ago]) for ago in sorted(found) if ago + 1 in found]
    marks = [
        (_y(_log(seconds)), words)
        for seconds, words in ((0.001, "1 ms"), (0.1, "0.1 s"), (10, "10 s"), (1000, "1000 s"))
    ]
    keys = [("delivered", f"lately {found[min(found)]:.3f} s")] if found else []
    return Graph(
        "Seconds to be delivered", keys, marks, _hours(now, step * steps), dots=dots, lines=lines
    )


def hourly(now: datetime, rows: Sequence[Row], step: int, steps: int) -> list[Hour]:
    """What the graphs show, hour by hour, the newest first."""
    many, hours = 3600 // step, list[Hour]()
    for first in range(0, steps, many):
        of = [row for row in rows if first <= row["step"] < first + many]
        tries = {
            kind: sum(row["tries"] for row in of if KIND[row["outcome"]] == kind) for kind in KINDS
        }
        spent = sum(row["seconds"] * row["tries"] for row in of if row["outcome"] == "delivered")
        mean = spent / tries["delivered"] if tries["delivered"] else None
        hours.append(
            Hour(_clock(now, (first + many) * step), _clock(now, first * step), tries, mean)
        )
    return hours


def _told(tries: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in tries.items() if count)


def _log(seconds: float) -> float:
    return min(max((math.log10(max(seconds, 0.001)) + 3) / 6, 0.0), 1.0)


def _above(value: float) -> float:
    """The next round number."""
    if value <= 1:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * digit for digit in (1, 2, 3, 4, 6, 8, 10) if unit * digit >= value)


def _x(ago: int, steps: int) -> float:
    return round(100 * (steps - 1 - ago) / steps, 2)


def _y(part: float) -> float:
    return round(HEIGHT - BOTTOM - part * (HEIGHT - BOTTOM - TOP), 1)


def _hours(now: datetime, seconds: int) -> list[tuple[float, str]]:
    """Where the hours begin, but for those too near to an edge."""
    began = now.astimezone().replace(minute=0, second=0, microsecond=0)
    places = []
    for n in range(seconds // 3600 + 1):
        x = 100 - ((now - began).total_seconds() + n * 3600) / seconds * 100
        if 6 < x < 94:
            places.append((round(x, 2), _clock(began, n * 3600)))
    return places


def _between(now: datetime, ago: int, step: int) -> str:
    return f"{_clock(now, (ago + 1) * step)} to {_clock(now, ago * step)}"


def _clock(now: datetime, seconds_ago: int) -> str:
    return (now - timedelta(seconds=seconds_ago)).astimezone().strftime("%H:%M")
