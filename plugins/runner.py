"""Runs the hooks of the plugins: one plugin after the other, each within its time.

An `async def` runs on the event loop, a `def` in a thread. A hook that is late is cancelled and not
waited for; a thread cannot be cancelled, so what it returns later means nothing. A failure is
logged with its traceback and becomes FAILED, or None with `fail=open`.

What must stay true: whatever a hook does, the question gets its answer within the sum of the time
limits, unless the hook blocks the loop itself; then the log names it.
"""

import asyncio
import inspect
import time
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from plugins.threads import HookThreads
from qmqp_relay.answers import OK, Answer, Deny, DenySoft, as_answer
from qmqp_relay.registration import Relay
from qmqp_relay.session import Transaction
from relay import metrics
from relay.log import get_logger
from relay.plugin_entries import PluginEntry

FAILED = DenySoft("Local problem, try again later", enhanced="4.3.0")
"""The answer of a hook that failed. It says nothing about the plugin."""
LONGEST_STEP = 0.1
"""Seconds of an `async def` without an `await`, after which the log says that it blocks."""
STOP_TIMEOUT = 2.0
"""Seconds for each function of `Relay.at_stop`."""

log = get_logger(__name__)
_LABELS = {type(None): "declined", OK: "ok", Deny: "deny", DenySoft: "denysoft"}


class HookLate(Exception):
    """The time of a hook is over."""


class Verdict(NamedTuple):
    """An answer, and the plugin that gave it."""

    answer: Answer
    plugin: str


@dataclass(frozen=True, slots=True)
class LoadedPlugin:
    """One plugin: `name` as logs and metrics show it, `entry` as RELAY_PLUGINS has it, `source` its
    file, and `hooks` the names of its hooks."""

    name: str
    entry: PluginEntry
    source: str
    hooks: tuple[str, ...]
    relay: Relay


@dataclass(frozen=True, slots=True)
class HookFunction:
    """The function of one plugin for one hook; `timeout` in seconds."""

    plugin: str
    hook: str
    function: Callable[..., Any]
    argnames: Sequence[str]
    timeout: float
    fail_open: bool = False

    @property
    def is_async(self) -> bool:
        """Whether it runs on the event loop."""
        return inspect.iscoroutinefunction(self.function)


class Plugins:
    """The plugins of a process. `loaded` is in the order in which they run."""

    def __init__(
        self,
        loaded: Sequence[LoadedPlugin],
        functions: Mapping[str, Sequence[HookFunction]],
    ) -> None:
        self.loaded = loaded
        self._functions = {name: tuple(found) for name, found in functions.items() if found}
        self._threads = HookThreads()
        self._late: set[asyncio.Task[Any]] = set()  # hooks that were cancelled

    @property
    def hooks(self) -> frozenset[str]:
        """The hooks that some plugin has."""
        return frozenset(self._functions)

    def functions(self, hook: str) -> tuple[HookFunction, ...]:
        """The functions of a hook, in the order in which they run."""
        return self._functions.get(hook, ())

    async def ask(self, hook: str, **arguments: Any) -> Verdict | None:
        """Asks the plugins in order; the first answer, or None."""
        transaction: Transaction | None = arguments.get("transaction")
        for function in self.functions(hook):
            reason = transaction and transaction.hold_reason
            answer = await self._run(function, arguments)
            if transaction is not None and transaction.hold_reason != reason:
                transaction.held_by = function.plugin
            if answer is not None:
                return Verdict(answer, function.plugin)
        return None

    async def tell(self, hook: str, **arguments: Any) -> bool:
        """Runs the hook of every plugin, whatever they return; False if one of them failed."""
        answers = [
            await self._run(function, arguments, ignored=True) for function in self.functions(hook)
        ]
        return FAILED not in answers

    async def tell_one(self, plugin: str, hook: str, **arguments: Any) -> bool:
        """Runs the hook of one plugin; False if it failed or was late, whatever `fail=` says."""
        answers = [
            await self._run(replace(function, fail_open=False), arguments, ignored=True)
            for function in self._functions.get(hook, ())
            if function.plugin == plugin
        ]
        return FAILED not in answers

    async def stop(self) -> None:
        """Calls what the plugins gave to `Relay.at_stop`, the last first."""
        for plugin in reversed(self.loaded):
            for function in reversed(plugin.relay.stopping):
                try:
                    result = function()
                    if inspect.isawaitable(result):
                        async with asyncio.timeout(STOP_TIMEOUT):
                            await result
                except Exception:
                    log.exception("plugin not stopped", plugin=plugin.name)
        self._threads.close()

    async def _run(
        self, one: HookFunction, given: Mapping[str, Any], *, ignored: bool = False
    ) -> Answer | None:
        arguments = [given[name] for name in one.argnames]
        run = self._on_the_loop if one.is_async else self._in_a_thread
        started = time.monotonic()
        try:
            result = await run(one, arguments)
            answer = None if ignored else as_answer(result)
            label = _LABELS[type(answer)]
        except HookLate:
            label, answer = "late", FAILED
            log.error("hook timed out", plugin=one.plugin, hook=one.hook, seconds=one.timeout)
        except (Exception, SystemExit):
            label, answer = "failed", FAILED
            log.exception("hook failed", plugin=one.plugin, hook=one.hook)
        metrics.hook_called(one.plugin, one.hook, label, time.monotonic() - started)
        return None if answer is FAILED and one.fail_open else answer

    async def _on_the_loop(self, one: HookFunction, arguments: Sequence[Any]) -> object:
        task = asyncio.Task(
            _guarded(one, arguments), loop=asyncio.get_running_loop(), eager_start=True
        )
        try:
            if not task.done():
                await asyncio.wait((task,), timeout=one.timeout)
        finally:
            if not task.done():
                self._late.add(task)  # the loop has only a weak reference
                task.add_done_callback(self._ended_late)
                task.cancel()
        if not task.done():
            raise HookLate
        if task.cancelled():
            raise RuntimeError("the hook cancelled itself")
        return task.result()

    def _ended_late(self, task: asyncio.Task[Any]) -> None:
        self._late.discard(task)
        if not task.cancelled():
            task.exception()  # its question has been answered

    async def _in_a_thread(self, one: HookFunction, arguments: Sequence[Any]) -> object:
        future = self._threads.submit(partial(one.function, *arguments))
        waiting = asyncio.wrap_future(future)
        try:
            await asyncio.wait((waiting,), timeout=one.timeout)
        finally:
            waiting.cancel()  # does nothing if it is done
        if not waiting.done() or waiting.cancelled():
            raise HookLate
        result = waiting.result()
        if inspect.iscoroutine(result):
            result.close()
            raise TypeError("a def returned a coroutine; write async def")
        return result


async def _guarded(one: HookFunction, arguments: Sequence[Any]) -> object:
    """Runs an `async def`. SystemExit in a task would end the process."""
    try:
        return await _WatchedSteps(one, one.function(*arguments))
    except SystemExit as error:
        raise RuntimeError(f"the hook called sys.exit({error.code!r})") from error


class _WatchedSteps:
    """Awaits a coroutine, and logs when one of its steps takes too long: meanwhile no other session
    goes on."""

    def __init__(self, one: HookFunction, coroutine: Coroutine[Any, Any, object]) -> None:
        self._one = one
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, object]:
        send: Callable[[], Any] = partial(self._coroutine.send, None)
        while True:
            started = time.monotonic()
            try:
                waited_for = send()
            except StopIteration as end:
                return end.value
            finally:
                seconds = time.monotonic() - started
                if seconds > LONGEST_STEP:
                    log.warning(
                        "hook blocked the loop",
                        plugin=self._one.plugin,
                        hook=self._one.hook,
                        seconds=round(seconds, 3),
                    )
            try:
                yield waited_for
                send = partial(self._coroutine.send, None)
            except BaseException as error:
                send = partial(self._coroutine.throw, error)
