"""The positions and texts in the graphs of the pages."""

from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest

from commands.web import charts

NOW = datetime(2026, 3, 1, 12, 34, 56, tzinfo=UTC)


def row(step: int, outcome: str, tries: int, seconds: float = 0.5) -> dict[str, Any]:
    return {"step": step, "outcome": outcome, "tries": tries, "seconds": seconds}


def test_a_steady_rate_is_level_up_to_now() -> None:
    graph = charts.rate(NOW, [row(step, "delivered", 50) for step in range(72)], charts.SPANS["6h"])
    bars = [bar for _, bars in graph.steps for bar in bars]
    assert len(bars) == 72
    assert len({(y, high) for _, _, y, _, high in bars}) == 1
    assert 98 < bars[-1][1] + bars[-1][3] <= 100, "the newest ends at the right edge"
    assert [text for _, text in graph.marks] == ["0", "5", "10"]
    assert graph.keys == [("delivered", "3600 delivered")]


def test_a_bar_has_a_text_and_stands_on_the_axis() -> None:
    rows = [
        row(0, "unreachable", 1),
        row(0, "delivered", 2),
        row(0, "rejected", 3),
        row(0, "malformed", 4),
    ]
    ((text, bars),) = charts.rate(NOW, rows, charts.SPANS["6h"]).steps
    clock = NOW.astimezone(UTC)
    assert text == f"{clock:%H}:29 to {clock:%H}:34: 2 delivered, 1 deferred, 3 failed, 4 uncertain"
    assert [kind for kind, *_ in bars] == list(charts.KINDS)
    floor = float(charts.HEIGHT - charts.BOTTOM)
    for _, _, y, _, high in bars:
        assert abs(y + high - floor) <= 0.2
        floor = y


def test_hours_are_marked_where_they_begin() -> None:
    hours = charts.rate(NOW, [], charts.SPANS["6h"]).hours
    assert [text[3:] for _, text in hours] == ["00"] * len(hours)
    assert 5 <= len(hours) <= 6
    gaps = {round(a - b, 1) for (a, _), (b, _) in pairwise(hours)}
    assert gaps == {16.7}


def test_latency_lines_join_only_adjacent_steps() -> None:
    rows = [
        row(0, "delivered", 1, 0.01),
        row(1, "delivered", 1, 0.1),
        row(3, "delivered", 1),
        row(2, "deferred", 9),
    ]
    graph = charts.latency(NOW, rows, charts.SPANS["6h"])
    assert len(graph.dots) == 3
    assert len(graph.lines) == 1
    assert graph.keys == [("delivered", "lately 0.010 s")]
    assert charts.latency(NOW, [], charts.SPANS["6h"]).keys == []


def test_hours_sum_tries_and_average_seconds() -> None:
    rows = [
        row(0, "delivered", 1, 1.0),
        row(11, "delivered", 3, 2.0),
        row(12, "deferred", 5),
        row(71, "rejected", 7),
    ]
    hours = charts.numbers(NOW, [], rows, charts.SPANS["6h"])
    assert [(sum(hour.tries.values()), hour.seconds) for hour in hours] == [
        (4, 1.75),
        (5, None),
        (0, None),
        (0, None),
        (0, None),
        (7, None),
    ]
    assert hours[0].begin[3:] == hours[0].end[3:] == "34"


def arrived(step: int, deliveries: int) -> dict[str, Any]:
    return {"step": step, "deliveries": deliveries}


def test_in_and_out_have_one_scale() -> None:
    span = charts.SPANS["6h"]
    attempts = [row(0, "delivered", 40), row(0, "rejected", 10), row(1, "deferred", 99)]
    graph = charts.flow(NOW, [arrived(0, 100), arrived(71, 50)], attempts, span)
    assert [text for _, text in graph.marks] == ["0", "10", "20"], "deliveries per minute"
    assert graph.keys == [("in", "150 in"), ("delivered", "40 delivered"), ("failed", "10 failed")]
    assert [text for text, _ in graph.steps] == [
        "12:29 to 12:34: 100 in, 40 delivered, 10 failed out"
    ]
    axis, top = (charts.HEIGHT - charts.BOTTOM, charts.TOP)
    assert [kind for kind, *_ in graph.steps[0][1]] == ["delivered", "failed"]
    *_, (_, before, x, y) = graph.lines
    assert (before, y) == (axis, top), "the line falls to nothing between, and ends at the top"
    assert len(graph.lines) == span.steps - 1
    assert graph.lines[0][1] == (axis + top) / 2, "half as much six hours ago"
    assert 98 < x <= 100


def test_nothing_in_and_out_is_said() -> None:
    graph = charts.flow(NOW, [], [], charts.SPANS["1h"])
    assert (graph.keys, graph.lines, graph.steps) == ([], [], [])
    assert graph.empty == "No mail came in or went out"


@pytest.mark.parametrize("name", charts.SPANS)
def test_each_span_has_marks_and_rows(name: str) -> None:
    span = charts.SPANS[name]
    marks = charts.rate(NOW, [], span).hours
    assert 3 <= len(marks) <= 7
    assert all(6 < x < 94 for x, _ in marks)
    assert ("Sun" in marks[0][1]) is (name == "7d")
    rows = charts.numbers(NOW, [arrived(step, 1) for step in range(span.steps)], [], span)
    assert 6 <= len(rows) <= 12
    assert sum(one.arrived for one in rows) == span.steps
    assert span.row % span.step == 0
