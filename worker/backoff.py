"""How long a deferred delivery waits.

A delay doubles with every deferral, from RETRY_MIN to RETRY_MAX, and is drawn at random from the
upper half of its step, so that messages which were deferred together are not retried together.
Delays are durations and no times of day: the database adds them to its own clock, so the worker's
clock does not matter.
"""

import random
from collections.abc import Callable

# After so many doublings any sensible RETRY_MIN has reached RETRY_MAX; the power cannot overflow.
MAX_DOUBLINGS = 32


def delay(
    step: int, *, least: float, most: float, draw: Callable[[], float] = random.random
) -> float:
    """Seconds to wait after `step` earlier deferrals: in [least, 2 least] at step 0, in [most / 2,
    most] in the end.

    Never shorter than `least`, never longer than `most`; `draw` gives numbers in [0, 1).
    """
    ceiling = min(most, least * 2.0 ** (min(max(step, 0), MAX_DOUBLINGS) + 1))
    floor = max(min(least, ceiling), ceiling / 2)
    return floor + draw() * (ceiling - floor)


def jitter(seconds: float, *, draw: Callable[[], float] = random.random) -> float:
    """`seconds` and up to half as much again, for waits that do not grow and must not end
    together."""
    return seconds * (1 + draw() / 2)
