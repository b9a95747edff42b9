"""Delays: bounds, growth, jitter."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.backoff import delay, jitter

FRACTION = st.floats(0, 1, exclude_max=True)


@given(st.integers(-5, 10_000), st.floats(0.01, 1e4), st.floats(1, 1e4), FRACTION)
def test_never_shorter_than_the_least_nor_longer_than_the_most(
    step: int, least: float, ratio: float, x: float
) -> None:
    most = least * ratio
    assert least <= delay(step, least=least, most=most, draw=lambda: x) <= most


@given(st.integers(0, 100), FRACTION)
def test_a_later_step_is_never_shorter_for_the_same_draw(step: int, x: float) -> None:
    now, later = (delay(s, least=30, most=3600, draw=lambda: x) for s in (step, step + 1))
    assert later >= now


@pytest.mark.parametrize(
    ("step", "lowest", "highest"),
    [(0, 30, 60), (1, 60, 120), (5, 960, 1920), (6, 1800, 3600), (40, 1800, 3600)],
)
def test_each_step_doubles_up_to_the_most(step: int, lowest: float, highest: float) -> None:
    assert delay(step, least=30, most=3600, draw=lambda: 0.0) == lowest
    assert delay(step, least=30, most=3600, draw=lambda: 1.0) == highest


def test_deliveries_deferred_together_come_due_apart() -> None:
    assert len({delay(0, least=30, most=3600) for _ in range(100)}) > 90


@given(st.floats(0, 1e6), FRACTION)
def test_a_spread_wait_is_at_most_half_as_long_again(seconds: float, x: float) -> None:
    assert seconds <= jitter(seconds, draw=lambda: x) <= seconds * 1.5
