"""Without plugins a message costs nothing of them: no code of theirs runs, and no task is made."""

import asyncio
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from reception.receiver import BLOCK
from relay.spool.store import Spool
from tests.integration.front_end import starting
from tests.integration.plugins import host, plugin_file
from tests.integration.test_smtpd import SmtpHarness, smtp_door, talking

ROOT = Path(__file__).parents[2]
OF_PLUGINS = tuple(str(ROOT / name) for name in ("plugins", "qmqp_relay", "reception/hooks.py"))


class Counted:
    """What the loop of a front end does from now on: calls into the code of plugins, and tasks."""

    def __init__(self, running: SmtpHarness) -> None:
        self.calls = Counter[str]()
        self.tasks = 0
        self._running = running
        self._in_loop(self._begin)

    def end(self) -> None:
        self._in_loop(self._end)

    def _in_loop(self, call: Callable[[], object]) -> None:
        done = threading.Event()

        def run() -> None:
            call()
            done.set()

        self._running.loop.call_soon_threadsafe(run)
        assert done.wait(10)

    def _begin(self) -> None:
        self._running.loop.set_task_factory(self._task)
        sys.setprofile(self._profile)

    def _end(self) -> None:
        sys.setprofile(None)
        self._running.loop.set_task_factory(None)

    def _profile(self, frame: FrameType, kind: str, _: Any) -> None:
        if kind == "call" and frame.f_code.co_filename.startswith(OF_PLUGINS):
            self.calls[frame.f_code.co_qualname] += 1

    def _task(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        self.tasks += 1
        return asyncio.Task(coroutine, loop=loop, **options)


@pytest.fixture
def start(spool: Spool, tmp_path: Path) -> Iterator[Callable[..., SmtpHarness]]:
    with starting(SmtpHarness, smtp_door, spool) as begin:
        yield lambda plugin="": begin(
            hooks=host(str(plugin_file(tmp_path, plugin))) if plugin else None
        )


def session(running: SmtpHarness, size: int) -> None:
    """Two messages, refusals, RSET and QUIT."""
    with talking(running) as client:
        client.begin()
        client.send((b"y" * 60 + b"\r\n") * (size // 62 + 1) + b".\r\n")
        client.expect(b"250")
        client.say(b"MAIL FROM:<a@example.com>", b"250")
        client.say(b"RCPT TO:<no address", b"501")
        client.say(b"RCPT TO:<b@example.org>", b"250")
        client.say(b"RSET", b"250")
        client.say(b"NOOP", b"250")
        client.say(b"QUIT", b"221")
        assert client.closed()


@pytest.mark.parametrize(("size", "tasks"), [(1000, 0), (3 * BLOCK, 1)])
def test_without_plugins_a_message_costs_nothing_of_them(
    start: Callable[..., SmtpHarness], size: int, tasks: int
) -> None:
    running = start()
    session(running, size)
    counted = Counted(running)
    session(running, size)
    counted.end()
    assert counted.calls == {}
    assert counted.tasks == tasks, "a large message has one, which writes it"


def test_with_a_plugin_the_same_counts_are_not_zero(start: Callable[..., SmtpHarness]) -> None:
    running = start("@hookimpl\nasync def rcpt(): pass\n")
    counted = Counted(running)
    session(running, 1000)
    counted.end()
    assert counted.calls["Plugins.ask"] > 0
    assert counted.tasks > 0
