"""The parts of the benchmark: each puts one kind of load on a system and returns figures by name.

Every part first waits until the queue is empty and the disk is idle. A message counts as delivered
when the sink has accepted it, and as done when its outcome is committed too.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from bench.load import connect, deliver, idle_connections, send, text_of
from bench.machine import Disk
from bench.processes import cpu_seconds, machine_cpu_seconds, resident_bytes, wait
from bench.systems import System

PAUSE = 0.1  # seconds between two single messages, so that the system is idle
MIN_VOLUME = 240.0  # MB; less is sent in about a second, too short for a rate
NO_RATIO = " (too little for a ratio)"

type Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Scale:
    """The size of the loads: numbers of messages, of large ones, of single ones, and of deliveries
    to the slow server.

    `connections` goes up to the default of RELAY_MAX_CONNECTIONS. `volume`: bytes that pass while
    memory is measured. `disk_timeout`: seconds to wait for an idle disk. `overdue`: seconds that a
    held message waits; after GRACE workers poll for it, so the loss of its hint does not matter.
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
    disk_timeout: float = 20.0
    overdue: float = 5.5


QUICK = Scale(
    messages=1000, large=3, singles=40, connections=(1, 100), slow=500, runs=1, disk_timeout=3.0
)
SMOKE = Scale(
    messages=100, large=1, large_size=2_000_000, singles=10, connections=(1, 10), slow=100, volume=2_000_000,
    runs=1, disk_timeout=0.1, overdue=0.1,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """`run` returns the figures of one system in `unit`; those named "CPU ..." are microseconds a
    message."""

    name: str
    title: str
    unit: str
    run: Callable[[System, Scale, Disk], Figures]
    more_is_better: bool = True


def _prepare(system: System, disk: Disk) -> int:
    """Wait until the system and the disk are idle; return the sink's count."""
    wait(system.empty, f"{system.name}: the queue is empty", timeout=120.0, pause=0.05)
    system.flush()
    disk.wait_until_idle()
    return system.delivered()


def _wait_for(system: System, count: int, *, pause: float = 0.004) -> float:
    """Wait until the sink's count is `count`; return the time."""
    return wait(
        lambda: system.delivered() >= count,
        f"{system.name}: {count} delivered",
        timeout=300.0,
        pause=pause,
    )


def _load(system: System, scale: Scale, disk: Disk, *, reuse: bool, workers: int = 1) -> Figures:
    if not system.arrange(workers):
        return {}
    count = scale.messages
    # First some messages for plans, caches and processes.
    send(system.smtp_port, 100, scale.size, sessions=scale.sessions, reuse=reuse)
    before = _prepare(system, disk)
    roles = system.processes()
    used = cpu_seconds(roles)
    busy = machine_cpu_seconds()
    sent = send(system.smtp_port, count, scale.size, sessions=scale.sessions, reuse=reuse)
    delivered = _wait_for(system, before + count)
    done = wait(system.empty, f"{system.name}: the queue is empty", pause=0.01)
    cpu = {role: value - used[role] for role, value in cpu_seconds(roles).items()}
    cpu |= {"source": sent.cpu, "machine": machine_cpu_seconds() - busy}
    return {
        "accepted": count / sent.seconds,
        "delivered": count / (delivered - sent.began),
        "done": count / (done - sent.began),
        **{f"CPU {role}": 1e6 * seconds / count for role, seconds in cpu.items()},
    }


def _large(system: System, scale: Scale, disk: Disk) -> Figures:
    if not system.arrange():
        return {}
    megabytes = scale.large * scale.large_size / 1e6
    before = _prepare(system, disk)
    system.hold()
    sent = send(system.smtp_port, scale.large, scale.large_size, sessions=2, reuse=True)
    time.sleep(scale.overdue)
    disk.wait_until_idle()
    system.release()
    released = time.perf_counter()
    delivered = _wait_for(system, before + scale.large)
    out = "out" if megabytes > MIN_VOLUME else "out" + NO_RATIO
    return {"in": megabytes / sent.seconds, out: megabytes / (delivered - released)}


def _latency(system: System, scale: Scale, disk: Disk) -> Figures:
    if not system.arrange():
        return {}
    text = text_of(scale.size)
    times: dict[str, list[float]] = {"from the dot to 250": [], "from 250 to the sink's yes": []}
    before = _prepare(system, disk)
    with connect(system.smtp_port) as client:
        for number in range(1, scale.singles + 1):
            sent, accepted = deliver(client, text)
            delivered = _wait_for(system, before + number, pause=0.0002)
            for values, seconds in zip(
                times.values(), (accepted - sent, delivered - accepted), strict=True
            ):
                values.append(1000 * seconds)
            time.sleep(PAUSE)
    return {
        f"{name}, p{percent}": statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
        for name, values in times.items()
        for percent in (50, 99)
    }


def _slow(system: System, scale: Scale, disk: Disk, workers: int) -> Figures:
    if not system.arrange(workers, slow=True):
        return {}
    count = scale.slow
    before = _prepare(system, disk)
    system.hold()
    send(system.smtp_port, count, scale.size, sessions=scale.sessions)
    time.sleep(scale.overdue)
    system.release()
    # The middle eight tenths: without the start and the last few.
    low = _wait_for(system, before + count // 10)
    first = system.delivered()
    high = _wait_for(system, before + count * 9 // 10)
    return {f"workers: {workers}": (system.delivered() - first) / (high - low)}


def _slow_twice(system: System, scale: Scale, disk: Disk) -> Figures:
    return _slow(system, scale, disk, 1) | _slow(system, scale, disk, 2)


def _memory(system: System, scale: Scale, disk: Disk) -> Figures:
    if not system.arrange():
        return {}
    figures: Figures = {}
    for count in scale.connections:
        _prepare(system, disk)
        with idle_connections(system.smtp_port, count):
            figures[f"{count} idle connections"] = _resident(system)
    for size in (scale.size, 1_000_000, scale.large_size):
        _prepare(system, disk)
        figures[f"messages of {size:,} bytes"] = _highest(system, scale, size)
    return figures


def _highest(system: System, scale: Scale, size: int) -> float:
    """The highest memory while four messages at once pass."""
    count = max(4, min(400, scale.volume // size))
    before = system.delivered()
    highest = 0.0
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send, system.smtp_port, count, size, sessions=4, reuse=True)
        while not sending.done():
            highest = max(highest, _resident(system))
        sending.result()
    _wait_for(system, before + count)
    return max(highest, _resident(system))


def _resident(system: System) -> float:
    """MiB: the sum of PSS of the processes that receive and deliver, and of their children."""
    roles = system.processes()
    pids = [pid for role in ("smtpd", "worker", "Postfix") for pid in roles.get(role, [])]
    return resident_bytes(pids) / 2**20


PARTS = (
    Part("load", "a connection a message", "messages a second", lambda s, n, d: _load(s, n, d, reuse=False)),
    Part("reuse", "connections kept", "messages a second", lambda s, n, d: _load(s, n, d, reuse=True)),
    Part("two", "two workers, as load", "messages a second", lambda s, n, d: _load(s, n, d, reuse=False, workers=2)),
    Part("large", "messages of 20 MB", "MB a second", _large),
    Part("latency", "one message at a time, on an idle system", "ms", _latency, more_is_better=False),
    Part("slow", "to a server that takes 100 ms", "messages a second", _slow_twice),
    Part("memory", "resident, sum of PSS: smtpd, spooler, worker; all of Postfix", "MiB", _memory, more_is_better=False),
)  # fmt: skip
