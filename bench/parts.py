"""The parts of the benchmark: each puts one kind of load on a system and returns figures by name.

Every part first waits until the queue is empty and the disk is idle. A message counts as delivered
when the sink has accepted it, and as done when its outcome is committed too.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bench.load import connect, deliver, send, text_of
from bench.machine import cpu_seconds, each_process, machine_cpu_seconds, wait_until_idle
from bench.nullmailer import NullmailerSystem
from bench.postfix import PostfixSystem
from bench.services import wait
from bench.systems import Arrangement, RelaySystem

PAUSE = 0.1  # seconds between two single messages, so that the system is idle
MIN_VOLUME = 240.0  # MB; less is sent in about a second, too short for a rate
TO_250 = "from the dot to 250"
NO_RATIO = " (too little for a ratio)"

type System = RelaySystem | PostfixSystem | NullmailerSystem
type Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Scale:
    """The size of the loads: numbers of messages, of large ones, of single ones, of deliveries to
    the slow server, and of jobs.

    `connections`: how many are open while memory is measured; `volume`: bytes that pass meanwhile,
    so what does not fit into it at once is not measured. `disk_timeout`: seconds to wait for an
    idle disk. `overdue`: seconds that a held message waits; after GRACE workers poll for it, so the
    loss of its hint does not matter.
    """

    messages: int = 5000
    size: int = 4096
    sessions: int = 20
    large: int = 40
    large_size: int = 20_000_000
    singles: int = 300
    connections: tuple[int, ...] = (20, 100, 500)
    slow: int = 4000
    jobs: int = 8000
    volume: int = 2_000_000_000
    runs: int = 5
    disk_timeout: float = 20.0
    overdue: float = 5.5


QUICK = Scale(
    messages=1000,
    large=3,
    singles=40,
    connections=(20, 100),
    slow=1000,
    jobs=2000,
    volume=400_000_000,
    runs=1,
    disk_timeout=3.0,
)
SMOKE = Scale(
    messages=100,
    large=1,
    large_size=2_000_000,
    singles=10,
    connections=(1, 10),
    slow=100,
    jobs=64,
    volume=20_000_000,
    runs=1,
    disk_timeout=0.1,
    overdue=0.1,
)


@dataclass(slots=True)
class Run:
    """One run of a part on a system. `busy`: the disk was not idle within
    `scale.disk_timeout`."""

    system: System
    scale: Scale
    arrangement: Arrangement = field(default_factory=Arrangement)
    busy: bool = False

    def prepare(self) -> int:
        """Wait until the system and the disk are idle; return the sink's count."""
        self.wait_until_empty()
        self.system.flush()
        self.wait_for_disk()
        return self.system.sink.count()

    def wait_for_disk(self) -> None:
        self.busy |= not wait_until_idle(self.system.directory, self.scale.disk_timeout)

    def wait_until_empty(self) -> float:
        """Wait until all outcomes are committed; return the time."""
        what = f"{self.system.name}: the queue is empty"
        return wait(self.system.empty, what, timeout=120.0, pause=0.01)

    def wait_for(self, count: int, *, pause: float = 0.004) -> float:
        """Wait until the sink's count is `count`; return the time."""
        what = f"{self.system.name}: {count} delivered"
        return wait(lambda: self.system.sink.count() >= count, what, timeout=300.0, pause=pause)

    def send(
        self, messages: int, size: int = 0, *, sessions: int = 0, reuse: bool = False
    ) -> tuple[float, float, float]:
        """As `load.send`; the defaults are those of the scale."""
        return send(
            self.system.smtp_port,
            messages,
            size or self.scale.size,
            sessions=sessions or self.scale.sessions,
            reuse=reuse,
        )

    def fill_queue(self, *load: int, **how: Any) -> float:
        """Send messages that are not delivered until `system.release`; return the seconds that it
        took to accept them."""
        self.system.hold()
        _, seconds, _ = self.send(*load, **how)
        time.sleep(self.scale.overdue)
        return seconds

    def resident(self) -> float:
        """MiB: the sum of PSS of the processes that receive and deliver, and of their children.
        Memory that processes share is counted once."""
        roles = ("smtpd", "worker", "Postfix")
        pids = [pid for role in roles for pid in self.system.roles.get(role, [])]
        return sum(each_process(pids, lambda process: int(process.memory_full_info().pss))) / 2**20


@dataclass(frozen=True, slots=True)
class Part:
    """`run` returns the figures of one run in `unit`; those named "CPU ..." are microseconds a
    message. It is called once for each of the `arrangements`."""

    name: str
    title: str
    unit: str
    run: Callable[[Run], Figures]
    more_is_better: bool = True
    arrangements: tuple[Arrangement, ...] = (Arrangement(),)


def _load(run: Run, *, reuse: bool) -> Figures:
    system, count = run.system, run.scale.messages
    # First some messages for plans, caches and processes.
    run.send(100, reuse=reuse)
    before = run.prepare()
    used = {role: cpu_seconds(pids) for role, pids in system.roles.items()}
    busy = machine_cpu_seconds()
    began, seconds, source = run.send(count, reuse=reuse)
    delivered = run.wait_for(before + count)
    done = run.wait_until_empty()
    cpu = {role: cpu_seconds(pids) - used[role] for role, pids in system.roles.items()}
    cpu |= {"source": source, "machine": machine_cpu_seconds() - busy}
    return {
        "accepted": count / seconds,
        "delivered": count / (delivered - began),
        "done": count / (done - began),
        **{f"CPU {role}": 1e6 * seconds / count for role, seconds in cpu.items()},
    }


def _large(run: Run) -> Figures:
    megabytes = run.scale.large * run.scale.large_size / 1e6
    before = run.prepare()
    seconds = run.fill_queue(run.scale.large, run.scale.large_size, sessions=2, reuse=True)
    run.wait_for_disk()
    run.system.release()
    released = time.perf_counter()
    delivered = run.wait_for(before + run.scale.large)
    out = "out" if megabytes > MIN_VOLUME else "out" + NO_RATIO
    return {"in": megabytes / seconds, out: megabytes / (delivered - released)}


def percentiles(name: str, seconds: list[float]) -> Figures:
    """Percentiles in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"{name}, p{percent}": 1000 * cuts[percent - 1] for percent in (50, 95, 99)}


def _latency(run: Run) -> Figures:
    text = text_of(run.scale.size)
    replies, deliveries = [], []
    before = run.prepare()
    with connect(run.system.smtp_port) as client:
        for number in range(1, run.scale.singles + 1):
            sent, accepted = deliver(client, text)
            replies.append(accepted - sent)
            deliveries.append(run.wait_for(before + number, pause=0.0002) - accepted)
            time.sleep(PAUSE)
    return percentiles(TO_250, replies) | percentiles("from 250 to the sink's yes", deliveries)


def _loaded(run: Run) -> Figures:
    text = text_of(run.scale.size)
    replies = []
    run.send(100)
    before = run.prepare()
    with ThreadPoolExecutor(1) as pool, connect(run.system.smtp_port) as client:
        load = pool.submit(run.send, run.scale.messages)
        while not load.done():
            sent, accepted = deliver(client, text)
            replies.append(accepted - sent)
    load.result()
    run.wait_for(before + run.scale.messages + len(replies))
    return percentiles(TO_250, replies)


def _slow(run: Run) -> Figures:
    before = run.prepare()
    run.fill_queue(run.scale.slow)
    run.system.release()
    # The middle eight tenths: without the start and the last few.
    low = run.wait_for(before + run.scale.slow // 10)
    first = run.system.sink.count()
    high = run.wait_for(before + run.scale.slow * 9 // 10)
    name = f"workers: {run.arrangement.workers}, connections: {run.arrangement.connections}"
    return {name: (run.system.sink.count() - first) / (high - low)}


def _memory(run: Run) -> Figures:
    figures: Figures = {}
    for count in run.scale.connections:
        run.prepare()
        with ExitStack() as stack:
            for _ in range(count):
                stack.enter_context(connect(run.system.smtp_port))
            figures[f"{count} idle connections"] = run.resident()
    sizes = (run.scale.size, run.scale.large_size)
    for size, sessions in itertools.product(sizes, run.scale.connections):
        if size * sessions > run.scale.volume:
            continue
        count = min(10 * sessions, run.scale.volume // size)
        before = run.prepare()
        samples = []
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(run.send, count, size, sessions=sessions, reuse=True)
            while not sending.done():
                samples.append(run.resident())
        sending.result()
        run.wait_for(before + count)
        figures[f"{sessions} sessions of {size:,} bytes"] = max(*samples, run.resident())
    return figures


PARTS = (
    Part("load", "a connection a message", "messages a second", partial(_load, reuse=False)),
    Part("reuse", "connections kept", "messages a second", partial(_load, reuse=True)),
    Part(
        "two",
        "two workers, as load",
        "messages a second",
        partial(_load, reuse=False),
        arrangements=(Arrangement(workers=2),),
    ),
    Part("large", "messages of 20 MB", "MB a second", _large),
    Part(
        "latency", "one message at a time, on an idle system", "ms", _latency, more_is_better=False
    ),
    Part("loaded", "one message at a time beside the load", "ms", _loaded, more_is_better=False),
    Part(
        "slow",
        "to a server that takes 100 ms",
        "messages a second",
        _slow,
        arrangements=(
            Arrangement(slow=True),
            Arrangement(workers=2, slow=True),
            Arrangement(connections=200, slow=True),
        ),
    ),
    Part(
        "memory",
        "resident, sum of PSS: smtpd, spooler, worker; all of a peer",
        "MiB",
        _memory,
        more_is_better=False,
    ),
)
