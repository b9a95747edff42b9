"""What is measured of a system: each part is one kind of load, and gives figures by name.

Every part waits for the queue to be empty and the disk to be still before it begins. A message
counts as delivered when the sink has acknowledged it, and as done when nothing of it is left in the
queue (its outcome is committed too).
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

from bench.load import SmtpClient, connected, send, text_of
from bench.machine import Disk
from bench.processes import cpu_seconds, machine_cpu_seconds, resident_bytes, wait
from bench.systems import System

PAUSE = 0.1  # seconds between two messages when nothing else is to go on

ENOUGH = 240.0  # MB; what is sent in less than a second or so says little about a rate

NO_RATIO = " (too little for a ratio)"

type Statistics = dict[str, float]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is done: messages of a load, large ones, single ones, deliveries to the slow server.

    `connections` goes up to RELAY_MAX_CONNECTIONS' default. `volume` is how many bytes pass while
    memory is looked at; `patience`, seconds that the disk may take to be still. What has waited for
    GRACE is found without hints, so after `overdue` seconds it does not matter what became of them.
    """

    messages: int = 5000
    size: int = 4096
    sessions: int = 20
    large: int = 40
    large_size: int = 20_000_000
    singles: int = 300
    connections: tuple[int, ...] = (1, 50, 200, 1000)
    slow: int = 1500
    volume: int = 80_000_000
    runs: int = 5
    patience: float = 20.0
    overdue: float = 5.5


QUICK = Scale(
    messages=1000, large=3, singles=40, connections=(1, 100), slow=500, runs=1, patience=3.0
)
SMOKE = Scale(
    messages=100, large=1, large_size=2_000_000, singles=10, connections=(1, 10), slow=100, volume=2_000_000,
    runs=1, patience=0.1, overdue=0.1,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """`run` gives its figures for one system, in `unit`; those named "CPU ..." are microseconds a
    message."""

    name: str
    words: str
    unit: str
    run: Callable[[System, Scale, Disk], Statistics]
    more_is_better: bool = True


def _prepare(system: System, disk: Disk) -> int:
    """Wait until nothing is going on; what the sink has by then."""
    wait(system.empty, f"{system.name}: the queue is empty", patience=120.0, pause=0.05)
    system.rest()
    disk.settle()
    return system.delivered()


def _wait_for(system: System, count: int, *, pause: float = 0.004) -> float:
    """Wait until the sink has so many in all; the moment."""
    return wait(
        lambda: system.delivered() >= count,
        f"{system.name}: {count} delivered",
        patience=300.0,
        pause=pause,
    )


def _load(system: System, scale: Scale, disk: Disk, *, reuse: bool, workers: int = 1) -> Statistics:
    if not system.arrange(workers):
        return {}
    count = scale.messages
    send(
        system.smtp_port, 100, scale.size, sessions=scale.sessions, reuse=reuse
    )  # plans, caches, processes
    before = _prepare(system, disk)
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


def _large(system: System, scale: Scale, disk: Disk) -> Statistics:
    if not system.arrange():
        return {}
    before, megabytes = _prepare(system, disk), scale.large * scale.large_size / 1e6
    system.hold()
    sent = send(system.smtp_port, scale.large, scale.large_size, sessions=2, reuse=True)
    time.sleep(scale.overdue)
    disk.settle()
    system.release()
    released = time.perf_counter()
    delivered = _wait_for(system, before + scale.large)
    out = "out" if megabytes > ENOUGH else "out" + NO_RATIO
    return {"in": megabytes / sent.seconds, out: megabytes / (delivered - released)}


def _latency(system: System, scale: Scale, disk: Disk) -> Statistics:
    if not system.arrange():
        return {}
    accepting, delivering, text = [], [], text_of(scale.size)
    before = _prepare(system, disk)
    with closing(SmtpClient(system.smtp_port)) as client:
        for number in range(1, scale.singles + 1):
            sent, accepted = client.message(text)
            delivered = _wait_for(system, before + number, pause=0.0002)
            accepting.append(1000 * (accepted - sent))
            delivering.append(1000 * (delivered - accepted))
            time.sleep(PAUSE)
    return {
        f"{name}, p{percent}": statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
        for name, values in (
            ("from the dot to 250", accepting),
            ("from 250 to the sink's yes", delivering),
        )
        for percent in (50, 99)
    }


def _slow(system: System, scale: Scale, disk: Disk, workers: int) -> Statistics:
    if not system.arrange(workers, slow=True):
        return {}
    count, before = scale.slow, _prepare(system, disk)
    system.hold()
    send(system.smtp_port, count, scale.size, sessions=scale.sessions)
    time.sleep(scale.overdue)
    system.release()
    # From a tenth to nine tenths: not the way up, and not the last that straggle in.
    low = _wait_for(system, before + count // 10)
    first = system.delivered()
    high = _wait_for(system, before + count * 9 // 10)
    return {f"workers: {workers}": (system.delivered() - first) / (high - low)}


def _slow_twice(system: System, scale: Scale, disk: Disk) -> Statistics:
    return _slow(system, scale, disk, 1) | _slow(system, scale, disk, 2)


def _memory(system: System, scale: Scale, disk: Disk) -> Statistics:
    if not system.arrange():
        return {}
    figures: Statistics = {}
    for count in scale.connections:
        _prepare(system, disk)
        with connected(system.smtp_port, count):
            figures[f"{count} idle connections"] = _resident(system)
    for size in (scale.size, 1_000_000, scale.large_size):
        _prepare(system, disk)
        figures[f"messages of {size:,} bytes"] = _highest(system, scale, size)
    return figures


def _highest(system: System, scale: Scale, size: int) -> float:
    """The most that is resident while four messages at once pass."""
    count, before, highest = max(4, min(400, scale.volume // size)), system.delivered(), 0.0
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send, system.smtp_port, count, size, sessions=4, reuse=True)
        while not sending.done():
            highest = max(highest, _resident(system))
        sending.result()
    _wait_for(system, before + count)
    return max(highest, _resident(system))


def _resident(system: System) -> float:
    """MiB: the proportional sets (PSS) of these processes and their children, the keeper among
    them, added up."""
    ours = [
        pid
        for role, pids in system.processes().items()
        if role in ("smtpd", "worker", "Postfix")
        for pid in pids
    ]
    return resident_bytes(ours) / 2**20


PARTS = (
    Part("load", "a connection a message", "messages a second", lambda s, n, d: _load(s, n, d, reuse=False)),
    Part("reuse", "connections kept", "messages a second", lambda s, n, d: _load(s, n, d, reuse=True)),
    Part("two", "two workers, as load", "messages a second", lambda s, n, d: _load(s, n, d, reuse=False, workers=2)),
    Part("large", "messages of 20 MB", "MB a second", _large),
    Part("latency", "one message at a time, nothing else going on", "ms", _latency, more_is_better=False),
    Part("slow", "to a server that takes 100 ms", "messages a second", _slow_twice),
    Part("memory", "resident, sum of PSS: smtpd, keeper, worker; all of Postfix", "MiB", _memory, more_is_better=False),
)  # fmt: skip
