"""How long to wait before the next attempt.

A delay doubles with every try that a server deferred, from RETRY_MIN to RETRY_MAX, and is drawn at
random from the upper half of its step: what was deferred in one second does not come back in one
second, and a thousand messages for one slow server spread over the whole step. Delays are
durations, never times of day: the database adds them to its own clock, so that the worker's clock
does not matter.
"""

import random
from collections.abc import Callable

# Beyond this many doublings any sensible RETRY_MIN has reached RETRY_MAX; it keeps the power from
# overflowing.
_STEPS = 32


def delay(
    step: int, *, least: float, most: float, draw: Callable[[], float] = random.random
) -> float:
    """Seconds to wait after `step` earlier deferrals: in [least, 2 least] at step 0, in [most / 2,
    most] in the end.

    Never shorter than `least`, never longer than `most`; `draw` gives numbers in [0, 1).
    """
    ceiling = min(most, least * 2.0 ** (min(max(step, 0), _STEPS) + 1))
    floor = max(min(least, ceiling), ceiling / 2)
    return floor + draw() * (ceiling - floor)


def jitter(seconds: float, *, draw: Callable[[], float] = random.random) -> float:
    """`seconds` and up to half as much again, for waits that do not grow but must not end all at
    once."""
    return seconds * (1 + draw() / 2)
