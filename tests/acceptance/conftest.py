"""The fixture `start_up`: `qmqp-relay up` as people start it; what still runs when the test ends is killed."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.stack import StartUp, Up, processes_of
from tests.waiting import until


@pytest.fixture
def start_up(tmp_path: Path) -> Iterator[StartUp]:
    """`start_up("--demo", QMQP_SERVERS=...)`: a relay that is up, in the STATE_DIR `var` of the test."""
    started: list[Up] = []

    def start(*options: str, **settings: str) -> Up:
        up = Up(Path(settings.pop("STATE_DIR", str(tmp_path / "var"))), *options, **settings)
        started.append(up)
        up.start()
        return up

    yield start
    for up in started:
        if up.process is not None:
            up.end(signal.SIGKILL)
        for pid in processes_of(up.state_dir):
            os.kill(pid, signal.SIGKILL)
        until(lambda up=up: not processes_of(up.state_dir), what="nothing is left running")  # type: ignore[misc]
