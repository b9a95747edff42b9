"""What is measured of a system: each part is one kind of load, and gives figures by name.

Every part waits for the queue to be empty and the disk to be still before it begins. A message counts as delivered when
the sink has acknowledged it, and as done when nothing of it is left in the queue (its outcome is committed too).
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from bench import machine
from bench.load import Client, connected, send, text_of
from bench.processes import cpu_seconds, machine_cpu_seconds, resident_bytes, wait
from bench.systems import System

PAUSE = 0.1  # seconds between two messages when nothing else is to go on

OVERDUE = 5.5  # seconds; what has waited for GRACE is found without hints, so it does not matter what became of them

type Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is done: messages of a load, large ones, single ones for latency, seconds that the disk may take."""

    messages: int = 5000
    size: int = 4096
    sessions: int = 20
    large: int = 12
    large_size: int = 20_000_000
    singles: int = 100
    connections: tuple[int, ...] = (1, 50, 200)
    runs: int = 5
    patience: float = 20.0


QUICK = Scale(messages=1000, large=3, singles=40, connections=(1, 100), runs=1, patience=3.0)


@dataclass(frozen=True, slots=True)
class Part:
    """`run` gives its figures for one system, in `unit`; those named "CPU ..." are microseconds a message."""

    name: str
    words: str
    unit: str
    run: Callable[[System, Scale], Figures]
    more_is_better: bool = True


def _prepare(system: System, scale: Scale) -> int:
    """Wait until nothing is going on; what the sink has by then."""
    wait(system.empty, f"{system.name}: the queue is empty", patience=120.0, pause=0.05)
    system.rest()
    machine.settle(system.directory, scale.patience)
    return system.delivered()


def _wait_for(system: System, count: int, *, pause: float = 0.004) -> float:
    """Wait until the sink has so many in all; the moment."""
    return wait(lambda: system.delivered() >= count, f"{system.name}: {count} delivered", patience=300.0, pause=pause)


def _load(system: System, scale: Scale, *, reuse: bool, workers: int = 1) -> Figures:
    if not system.arrange(workers):
        return {}
    count = scale.messages
    send(system.smtp_port, 100, scale.size, sessions=scale.sessions, reuse=reuse)  # plans, caches, processes
    before = _prepare(system, scale)
    roles = system.processes()
    used, busy = cpu_seconds(roles), machine_cpu_seconds()
    sent = send(system.smtp_port, count, scale.size, sessions=scale.sessions, reuse=reuse)
    delivered = _wait_for(system, before + count)
    done = wait(system.empty, f"{system.name}: the queue is empty", pause=0.01)
    spent = {role: value - used[role] for role, value in cpu_seconds(roles).items()}
    spent |= {"source": sent.cpu, "machine": machine_cpu_seconds() - busy}
    return {
        "accepted": count / sent.seconds,
        "delivered": count / (delivered - sent.began),
        "done": count / (done - sent.began),
        **{f"CPU {role}": 1e6 * seconds / count for role, seconds in spent.items()},
    }


def _large(system: System, scale: Scale) -> Figures:
    if not system.arrange():
        return {}
    before, megabytes = _prepare(system, scale), scale.large * scale.large_size / 1e6
    system.hold()
    sent = send(system.smtp_port, scale.large, scale.large_size, sessions=2, reuse=True)
    time.sleep(OVERDUE)
    machine.settle(system.directory, scale.patience)
    system.release()
    released = time.perf_counter()
    delivered = _wait_for(system, before + scale.large)
    return {"in": megabytes / sent.seconds, "out": megabytes / (delivered - released)}


def _latency(system: System, scale: Scale) -> Figures:
    if not system.arrange():
        return {}
    accepting, delivering, text = [], [], text_of(scale.size)
    client, before = Client(system.smtp_port), _prepare(system, scale)
    for number in range(1, scale.singles + 1):
        sent, accepted = client.message(text)
        delivered = _wait_for(system, before + number, pause=0.0002)
        accepting.append(1000 * (accepted - sent))
        delivering.append(1000 * (delivered - accepted))
        time.sleep(PAUSE)
    client.close()
    return {
        f"{name}, p{percent}": statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
        for name, values in (("from the dot to 250", accepting), ("from 250 to the sink's yes", delivering))
        for percent in (50, 99)
    }


def _slow(system: System, scale: Scale, workers: int) -> Figures:
    if not system.arrange(workers, slow=True):
        return {}
    count = max(500, min(scale.messages, 1500))
    before = _prepare(system, scale)
    system.hold()
    send(system.smtp_port, count, scale.size, sessions=scale.sessions)
    time.sleep(OVERDUE)
    system.release()
    # From a tenth to nine tenths: not the way up, and not the last that straggle in.
    low = _wait_for(system, before + count // 10)
    first = system.delivered()
    high = _wait_for(system, before + count * 9 // 10)
    return {f"workers: {workers}": (system.delivered() - first) / (high - low)}


def _memory(system: System, scale: Scale) -> Figures:
    if not system.arrange():
        return {}
    figures: Figures = {}
    for count in scale.connections:
        _prepare(system, scale)
        with connected(system.smtp_port, count):
            figures[f"{count} idle connections"] = _resident(system)
    for size in (scale.size, 1_000_000, scale.large_size):
        _prepare(system, scale)
        figures[f"messages of {size:,} bytes"] = _highest(system, scale, size)
    return figures


def _highest(system: System, scale: Scale, size: int) -> float:
    """The most that is resident while four messages at once pass."""
    count, before, highest = max(4, min(400, 80_000_000 // size)), system.delivered(), 0.0
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send, system.smtp_port, count, size, sessions=4, reuse=True)
        while not sending.done():
            highest = max(highest, _resident(system))
        sending.result()
    _wait_for(system, before + count)
    return max(highest, _resident(system))


def _resident(system: System) -> float:
    ours = [pid for role, pids in system.processes().items() if role in ("smtpd", "worker", "Postfix") for pid in pids]
    return resident_bytes(ours) / 2**20


PARTS = (
    Part("load", "a connection a message", "messages a second", lambda s, n: _load(s, n, reuse=False)),
    Part("reuse", "connections kept", "messages a second", lambda s, n: _load(s, n, reuse=True)),
    Part("two", "two workers, as load", "messages a second", lambda s, n: _load(s, n, reuse=False, workers=2)),
    Part("large", "messages of 20 MB", "MB a second", _large),
    Part("latency", "one message at a time, nothing else going on", "ms", _latency, more_is_better=False),
    Part("slow", "to a server that takes 100 ms", "messages a second", lambda s, n: _slow(s, n, 1) | _slow(s, n, 2)),
    Part("memory", "resident: smtpd and worker, or all of Postfix", "MiB", _memory, more_is_better=False),
)  # fmt: skip
