"""Graphs as numbers: the positions of bars, lines and grid of a page's SVG, for the templates.

Horizontal positions are in hundredths of the width, vertical ones in pixels, so a narrow screen
gets narrower bars and the same text. Time is divided into steps that end now, not at a full hour:
the newest bar covers a whole step, because a step that has just begun would look like mail that has
stopped. The style sheet sets colours and patterns; text always repeats what a colour says.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from relay.report.rows import Row

HEIGHT, TOP, BOTTOM = 180, 8, 22
DAY = 86400
KINDS = {  # of outcomes, in the order of the bars from the axis up
    "delivered": ("delivered",),
    "deferred": ("deferred", "unreachable", "interrupted"),
    "failed": ("rejected", "unsendable"),
    "uncertain": ("uncertain", "malformed"),
}
OUT = {"delivered": ("delivered",), "failed": ("rejected",)}  # outcomes that end a delivery
KIND = {outcome: kind for kind, outcomes in KINDS.items() for outcome in outcomes}

type Bar = tuple[str, float, float, float, float]  # kind, x, y, width, height


@dataclass(frozen=True, slots=True)
class Span:
    """A time to choose: `steps` bars of `step` seconds. `mark`: seconds between two marks of its
    axis; `row`: seconds of a row of the table."""

    name: str
    words: str
    step: int
    steps: int
    mark: int
    row: int


SPANS = {
    "1h": Span("1 h", "last hour", 60, 60, 900, 300),
    "6h": Span("6 h", "last six hours", 300, 72, 3600, 3600),
    "24h": Span("24 h", "last 24 hours", 1200, 72, 4 * 3600, 2 * 3600),
    "7d": Span("7 d", "last seven days", 7200, 84, 86400, 86400),
}
USUAL = "6h"


@dataclass(frozen=True, slots=True)
class Graph:
    """`keys`: (kind, text); `steps`: (text, bars); `dots`: (text, x, y); `lines`: (x, y, x, y)
    of one kind; `marks` and `hours`: (position, text) on the axes; `empty`: what there is not, if
    there are no keys."""

    title: str
    keys: list[tuple[str, str]]
    marks: list[tuple[float, str]]
    hours: list[tuple[float, str]]
    steps: list[tuple[str, list[Bar]]] = field(default_factory=list)
    dots: list[tuple[str, float, float]] = field(default_factory=list)
    lines: list[tuple[float, float, float, float]] = field(default_factory=list)
    line_kind: str = "delivered"
    empty: str = "No server was tried"


@dataclass(frozen=True, slots=True)
class NumberRow:
    """The numbers of a part of the span: deliveries that arrived, attempts by kind, and mean
    seconds of those that delivered."""

    begin: str
    end: str
    arrived: int
    tries: dict[str, int]
    seconds: float | None


def flow(now: datetime, arrivals: Iterable[Row], attempts: Iterable[Row], span: Span) -> Graph:
    """Deliveries per minute: those that arrived as a line, those that ended as bars."""
    came = {row["step"]: row["deliveries"] for row in arrivals if 0 <= row["step"] < span.steps}
    went: dict[int, dict[str, int]] = {}
    kinds = {outcome: kind for kind, outcomes in OUT.items() for outcome in outcomes}
    for row in attempts:
        if row["outcome"] in kinds:
            counts = went.setdefault(row["step"], dict.fromkeys(OUT, 0))
            counts[kinds[row["outcome"]]] += row["tries"]
    most = max((*came.values(), *(sum(counts.values()) for counts in went.values())), default=0)
    highest = _above(most * 60 / span.step)
    drawn = [
        (
            f"{_between(now, ago, span)}: {came.get(ago, 0)} in, {_counts(counts) or 'none'} out",
            _bars(counts, ago, span, highest),
        )
        for ago, counts in sorted(went.items(), reverse=True)
    ]
    points = [
        (
            round(_x(ago, span.steps) + 40 / span.steps, 2),
            _y(came.get(ago, 0) * 60 / span.step / highest),
        )
        for ago in reversed(range(span.steps))
    ]
    keys = [("in", f"{sum(came.values()):,} in")] if came else []
    sums = {kind: sum(counts[kind] for counts in went.values()) for kind in OUT}
    keys += [(kind, f"{count:,} {kind}") for kind, count in sums.items() if count]
    return Graph(
        "In and out, deliveries per minute",
        keys,
        _rate_marks(highest),
        _marks(now, span),
        drawn,
        lines=[(*a, *b) for a, b in pairwise(points)] if came else [],
        line_kind="in",
        empty="No mail came in or went out",
    )


def rate(now: datetime, rows: Iterable[Row], span: Span) -> Graph:
    """Attempts per minute by kind of outcome."""
    by_step: dict[int, dict[str, int]] = {}
    for row in rows:
        tries = by_step.setdefault(row["step"], dict.fromkeys(KINDS, 0))
        tries[KIND[row["outcome"]]] += row["tries"]
    highest = _above(
        max((sum(tries.values()) for tries in by_step.values()), default=0) * 60 / span.step
    )
    drawn = [
        (f"{_between(now, ago, span)}: {_counts(tries)}", _bars(tries, ago, span, highest))
        for ago, tries in sorted(by_step.items(), reverse=True)
    ]
    sums = {kind: sum(tries[kind] for tries in by_step.values()) for kind in KINDS}
    keys = [(kind, f"{count} {kind}") for kind, count in sums.items() if count]
    return Graph("Attempts per minute", keys, _rate_marks(highest), _marks(now, span), drawn)


def latency(now: datetime, rows: Iterable[Row], span: Span) -> Graph:
    """Mean seconds of an attempt that delivered, from connection to reply, on a logarithmic scale
    from 1 ms to 1000 s."""
    means = {row["step"]: row["seconds"] for row in rows if row["outcome"] == "delivered"}
    points = {
        ago: (round(_x(ago, span.steps) + 40 / span.steps, 2), _y(_log(seconds)))
        for ago, seconds in means.items()
    }
    dots = [
        (f"{_between(now, ago, span)}: {seconds:.3f} s", *points[ago])
        for ago, seconds in sorted(means.items())
    ]
    lines = [(*points[ago + 1], *points[ago]) for ago in sorted(means) if ago + 1 in means]
    marks = [
        (_y(_log(seconds)), text)
        for seconds, text in ((0.001, "1 ms"), (0.1, "0.1 s"), (10, "10 s"), (1000, "1000 s"))
    ]
    keys = [("delivered", f"lately {means[min(means)]:.3f} s")] if means else []
    return Graph(
        "Seconds to be delivered",
        keys,
        marks,
        _marks(now, span),
        dots=dots,
        lines=lines,
        empty="No mail was delivered",
    )


def numbers(
    now: datetime, arrivals: Sequence[Row], attempts: Sequence[Row], span: Span
) -> list[NumberRow]:
    """The numbers of the graphs, a row for each part of the span, the newest first."""
    size, rows = span.row // span.step, list[NumberRow]()
    for first in range(0, span.steps, size):
        some = [row for row in attempts if first <= row["step"] < first + size]
        tries = {
            kind: sum(row["tries"] for row in some if KIND[row["outcome"]] == kind)
            for kind in KINDS
        }
        came = sum(row["deliveries"] for row in arrivals if first <= row["step"] < first + size)
        spent = sum(row["seconds"] * row["tries"] for row in some if row["outcome"] == "delivered")
        mean = spent / tries["delivered"] if tries["delivered"] else None
        begin, end = (first + size) * span.step, first * span.step
        rows.append(NumberRow(_clock(now, begin, span), _clock(now, end, span), came, tries, mean))
    return rows


def _bars(counts: Mapping[str, int], ago: int, span: Span, highest: float) -> list[Bar]:
    """The bars of a step, one on the other."""
    floor, bars = _y(0), list[Bar]()
    for kind, count in counts.items():
        if count:
            height = count * 60 / span.step / highest * (_y(0) - _y(1))
            floor -= height
            width = round(80 / span.steps, 2)
            bars.append((kind, _x(ago, span.steps), round(floor, 1), width, round(height, 1)))
    return bars


def _rate_marks(highest: float) -> list[tuple[float, str]]:
    return [(_y(part / 2), f"{highest * part / 2:g}") for part in (0, 1, 2)]


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


def _marks(now: datetime, span: Span) -> list[tuple[float, str]]:
    """Where hours or days begin, without those too near to an edge."""
    seconds, began = span.step * span.steps, now.timestamp() // span.mark * span.mark
    positions = []
    for n in range(seconds // span.mark + 1):
        at = began - n * span.mark
        x = 100 - (now.timestamp() - at) / seconds * 100
        if 6 < x < 94:
            form = "%a %d" if span.mark >= DAY else "%H:%M"
            positions.append((round(x, 2), datetime.fromtimestamp(at, UTC).strftime(form)))
    return positions


def _between(now: datetime, ago: int, span: Span) -> str:
    begin, end = (ago + 1) * span.step, ago * span.step
    return f"{_clock(now, begin, span)} to {_clock(now, end, span)}"


def _clock(now: datetime, seconds_ago: int, span: Span) -> str:
    at = (now - timedelta(seconds=seconds_ago)).astimezone(UTC)
    return at.strftime("%a %H:%M" if span.step * span.steps > DAY else "%H:%M")
