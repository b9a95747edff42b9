"""How the time of a call grows with its input, as CPU time of this thread, so that a busy machine
changes little."""

import time
from collections.abc import Callable


def growth[Input](call: Callable[[Input], object], small: Input, large: Input) -> float:
    """How many times as long the call takes for `large` as for `small`: the least of several runs
    of each."""

    def seconds(given: Input, times: int) -> float:
        began = time.thread_time()
        for _ in range(times):
            call(given)
        return (time.thread_time() - began) / times

    return min(seconds(large, 1) for _ in range(3)) / min(seconds(small, 16) for _ in range(5))
