"""The matrix of faults of a worker or its machine, by the phase of a transfer, as in
`docs/delivery.md`.

A real worker process has five messages, one in each phase: connecting; within the body; after the
last byte and before the reply; after the reply and before its completion is committed; and one
whose claim waits for its commit. Servers that stop until the test opens them keep it there, and so
does a writer that holds the write lock of the database. Then the worker is killed, stopped, or
loses its lease. Another worker delivers the rest to a server that accepts everything, and the test
counts duplicates. RELAY_TESTS_WRITE=1 writes the table again.
"""

import errno
import os
import signal
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qmqp.body import BodyFile
from qmqp.sink import Answer, Rule, Sink, running_sink
from relay.db.engine import write_lock
from relay.spool.store import Spool
from tests import services
from tests.integration.gated_server import GatedServer, gated_server
from tests.integration.harness import BODY, EngineHarness
from tests.integration.test_delivery_matrix import in_page
from tests.integration.test_worker_app import WorkerProcesses
from tests.services import Postgres
from tests.waiting import stands_still, until

BEGIN = "<!-- made by tests/integration/test_worker_matrix.py: begin -->"
HEAD = (
    "| fault | phase | attempts recorded | state | next | accepted twice |\n"
    "|---|---|---|---|---|---|"
)
UNCLAIMED, CONNECTING, MIDDLE, WAITING, ANSWERED, LATE = (
    "before its claim is committed",
    "connecting",
    "in the body",
    "after the last byte, before the reply",
    "after the reply (K), before its record",
    "after the last byte; K comes within DRAIN_TIMEOUT",
)
PHASES = (UNCLAIMED, CONNECTING, MIDDLE, WAITING, LATE, ANSWERED)
LEASE = 4  # seconds
LONG = b"Subject: long\n\n" + bytes(
    12_000_000
)  # more than the kernel keeps for a peer that does not read


@contextmanager
def deaf() -> Iterator[int]:
    """The port of a server that answers no SYN."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        sockets[0].bind(("127.0.0.1", 0))
        sockets[0].listen(0)
        for waiting in sockets[1:]:
            waiting.setblocking(False)
            waiting.connect_ex(sockets[0].getsockname())
        yield sockets[0].getsockname()[1]


@dataclass
class WorkerInEveryPhase:
    """A worker with a message in every phase."""

    processes: WorkerProcesses
    worker: subprocess.Popen[Any]
    gates: dict[str, GatedServer]
    ids: dict[str, str] = field(default_factory=dict)

    @property
    def mail(self) -> EngineHarness:
        return self.processes.mail

    def said(self, event: str) -> bool:
        return f'"event": "{event}"' in self.processes.log.read_text()

    def begin(self, phase: str) -> None:
        self.ids[phase] = self.mail.accept(
            f"b@{place(phase)}.test", body=LONG if phase == MIDDLE else BODY
        )

    def tried(self, phase: str, times: int) -> bool:
        return len(self.mail.attempts(self.ids[phase])) == times

    @contextmanager
    def in_every_phase(self) -> Iterator[None]:
        """Inside this context only the test commits."""
        gates = {phase: gate for phase, gate in self.gates.items() if phase != UNCLAIMED}
        for phase in (CONNECTING, *gates):
            self.begin(phase)
        for phase, gate in gates.items():
            assert gate.reached.wait(30), (phase, self.processes.said())
        until(lambda: self.mail.state(self.ids[CONNECTING]) == "sending")
        with write_lock(self.mail.database):
            self.gates[ANSWERED].open.set()
            until(
                lambda: self.said("delivered"), what=self.processes.said
            )  # logged, and not recorded
            self.ids[UNCLAIMED] = self.mail.accept(f"b@{place(UNCLAIMED)}.test", has_lock=True)
            until(lambda: waits_for_its_turn(self.worker.pid))
            yield

    def rows(self, fault: str) -> list[str]:
        """A line for each phase: the state in the database now, and the duplicates at the end."""
        found = {
            phase: (self.mail.attempts(i), self.mail.delivery(i)) for phase, i in self.ids.items()
        }
        again = delivered_by_another(self.mail)
        until(
            lambda: not any(self.mail.spool.path(i).exists() for i in self.ids.values()),
            what="no body is left",
        )
        lines = []
        for phase in filter(self.ids.__contains__, PHASES):
            queue_id = self.ids[phase]
            tries, delivery = found[phase]
            times = again[queue_id] + (self.gates[phase].taken if phase in self.gates else 0)
            lines.append(line(fault, phase, tries, delivery, times))
        return lines


def place(phase: str) -> str:
    """The route of a phase."""
    return "".join(letter for letter in phase.lower() if letter.isalpha())[:40]


def waits_for_its_turn(pid: int) -> bool:
    found = [fields.split() for fields in Path("/proc/locks").read_text().splitlines()]
    return any(fields[1] == "->" and fields[5] == str(pid) for fields in found)


def line(
    fault: str,
    phase: str,
    tries: list[tuple[str | None, str]],
    delivery: dict[str, Any],
    times: int,
) -> str:
    recorded = ", ".join(f"`{outcome}`" for _, outcome in tries) or "none"
    deferred = {
        "uncertain": "again after UNCERTAIN_DELAY",
        "unsendable": "read again in a minute; held if that fails too",
    }
    following = {
        "queued": "any worker sends it",
        "delivered": "the body is removed",
        "held": "an operator decides",
        "deferred": deferred.get(delivery["last_outcome"]),
    }[delivery["state"]]
    assert following
    assert times < 2 or "`uncertain`" in recorded, "no double is hidden"
    twice = {1: "no", 2: "yes", 0: "-"}[times]
    return f"| {fault} | {phase} | {recorded} | `{delivery['state']}` | {following} | {twice} |"


def delivered_by_another(mail: EngineHarness) -> Counter[str]:
    """Another worker sends the remaining mail to a server that accepts everything; the received
    requests, by message."""
    with running_sink() as good:
        routes = write_routes(mail.settings.state_dir / "good.toml", {})
        other = EngineHarness(
            str(mail.settings.database_url),
            mail.spool,
            mail.settings.state_dir,
            qmqp_servers=(f"127.0.0.1:{good.port}",),
            routes=routes,
        )
        with other.working():
            other.change(
                "UPDATE deliveries SET due_at = @now, state = 'queued' WHERE state = 'deferred'"
            )
            other.change("UPDATE deliveries SET route = 'default' WHERE state = 'queued'")
            until(lambda: other.states() <= {"delivered", "held"}, 30)
        other.close()
    names = {
        row["address"]: row["id"]
        for row in mail.rows("SELECT address, @hex(queue_id) AS id FROM recipients")
    }
    return Counter(names[got.recipients[0].decode()] for got in good.received)


def until_it_is(
    mail: EngineHarness,
    queue_id: str,
    state: str,
    *,
    claims: int = 0,
    said: Callable[[], str] = str,
) -> dict[str, Any]:
    def so() -> dict[str, Any]:
        found = mail.delivery(queue_id)
        return found if found["state"] == state and found["claim_count"] >= claims else {}

    return until(so, 20, what=lambda: f"{queue_id} {state}\n{said()}")


def write_routes(path: Path, ports: dict[str, int]) -> Path:
    route = '[{0}]\nrecipients = ["{0}.test"]\nservers = ["127.0.0.1:{1}"]\n'
    path.write_text("".join(route.format(place(phase), port) for phase, port in ports.items()))
    return path


@contextmanager
def scene(
    database_url: str, directory: Path, spawn: Callable[..., Any], *more: str
) -> Iterator[WorkerInEveryPhase]:
    directory.mkdir()
    (directory / "spool").mkdir(mode=0o700)
    gates = {
        MIDDLE: GatedServer(20_000),
        **{phase: GatedServer() for phase in (WAITING, *more, ANSWERED, UNCLAIMED)},
    }
    gates[UNCLAIMED].open.set()
    with deaf() as port, ExitStack() as stack:
        for gate in gates.values():
            stack.callback(gate.close)
        ports = {phase: gate.port for phase, gate in gates.items()} | {CONNECTING: port}
        routes = write_routes(directory / "routes.toml", ports)
        mail = EngineHarness(
            database_url,
            Spool(directory / "spool"),
            directory,
            routes=routes,
            broker_url="redis://127.0.0.1:1/0",
            uncertain_delay=900.0,
        )
        stack.callback(mail.close)
        processes = WorkerProcesses(mail, spawn, directory / "worker.log")
        patience = {
            "CONNECT_TIMEOUT": "5m",
            "IO_TIMEOUT": "5m",
            "DRAIN_TIMEOUT": "3s",
            "LEASE": f"{LEASE}s",
        }
        yield WorkerInEveryPhase(processes, processes.start(**patience, ROUTES=str(routes)), gates)


def expire_worker(mail: EngineHarness) -> None:
    """Expire the worker as a sweeper does."""
    mail.change("UPDATE workers SET lease_expires_at = @ago(1) WHERE ended_at IS NULL")
    for worker, until_ in mail.rescuer.expired_leases():
        assert mail.rescuer.expire_worker(worker, until_)


def killed(scene: WorkerInEveryPhase) -> list[str]:
    with scene.in_every_phase():
        services.end(scene.worker, signal.SIGKILL)
    expire_worker(scene.mail)
    return scene.rows("the worker is killed")


def stopped(scene: WorkerInEveryPhase) -> list[str]:
    with scene.in_every_phase():
        scene.worker.send_signal(signal.SIGTERM)
        until(lambda: scene.said("draining"), what=scene.processes.said)
        scene.gates[LATE].open.set()
    assert services.end(scene.worker) == 0, scene.processes.said()
    return scene.rows("the worker gets SIGTERM")


def expired_while_stopped(scene: WorkerInEveryPhase) -> list[str]:
    """The worker is stopped until another has expired it. When it runs again, the reply that it
    waits for has arrived."""
    with scene.in_every_phase():
        scene.worker.send_signal(signal.SIGSTOP)
        until(lambda: stands_still(scene.worker.pid))
    expire_worker(scene.mail)
    scene.gates[WAITING].open.set()
    threading.Event().wait(0.8 * LEASE)  # it is late by its own clock
    scene.worker.send_signal(signal.SIGCONT)
    for phase in (WAITING, ANSWERED, UNCLAIMED):
        until_it_is(scene.mail, scene.ids[phase], "delivered", said=scene.processes.said)
    until(lambda: scene.said("own lease lost"))
    for phase in (CONNECTING, MIDDLE):
        until(partial(scene.tried, phase, 2), what=scene.processes.said)
    services.end(scene.worker)
    return scene.rows("the worker loses its lease, and continues")


# The fault is on the machine


def with_files(mail: EngineHarness, sink: Sink) -> list[str]:
    """Bodies that cannot be sent, and bodies that cannot be read for now."""
    lines = []
    missing, short = mail.accept(), mail.accept()
    mail.spool.path(missing).unlink()
    os.truncate(mail.spool.path(short), 5)
    with mail.working():
        until(lambda: mail.states() == {"held"})
    for queue_id, fault in (
        (missing, "the body file is missing"),
        (short, "the body file has another size"),
    ):
        lines.append(line(fault, "opening", mail.attempts(queue_id), mail.delivery(queue_id), 0))

    def unopened(queue_id: str, size: int) -> BodyFile:
        raise OSError(code, os.strerror(code))

    def unreadable(queue_id: str, size: int) -> BodyFile:
        # Nothing is mapped at the beginning of this file: EIO.
        return BodyFile(os.open("/proc/self/mem", os.O_RDONLY), size)

    def dead() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    whole = "the disk fails ({}); this worker claims nothing for a while"
    place = "the disk cannot read the place of the body ({})"
    faults: list[tuple[str, int, str, Callable[[str, int], BodyFile]]] = [
        (whole, errno.EIO, "opening", unopened),
        (whole, errno.EMFILE, "opening", unopened),
        (whole, errno.EIO, "in the body", unreadable),
        (place, errno.EIO, "opening", unopened),
        (place, errno.EIO, "in the body", unreadable),
    ]
    for what, code, where, failing in faults:
        queue_id, before = mail.accept(), sink.count
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mail.spool, "open", failing)
            if what is whole:
                patch.setattr(mail.spool, "check_disk", dead)
            with mail.working():
                state = "queued" if what is whole else "deferred"
                delivery = until_it_is(mail, queue_id, state, claims=1)
                tries = mail.attempts(queue_id)
                patch.undo()
                mail.pass_time(100)
                mail.rescuer.requeue_due(10)
                until_it_is(mail, queue_id, "delivered")
        text = what.format(errno.errorcode[code])
        lines.append(line(text, where, tries, delivery, sink.count - before))
    return lines


def without_database(postgres: Postgres, url: str, spool: Spool, directory: Path) -> list[str]:
    with gated_server() as gate:
        mail = EngineHarness(
            url, spool, directory, qmqp_servers=(f"127.0.0.1:{gate.port}",), lease=60.0
        )
        queue_id = mail.accept()
        with mail.working():
            assert gate.reached.wait(30)
            postgres.kill()
            gate.open.set()
            postgres.start()
            until(lambda: mail.state(queue_id) == "delivered", 20)
        tries, delivery = mail.attempts(queue_id), mail.delivery(queue_id)
        mail.close()
    return [line("the database is away and comes back", ANSWERED, tries, delivery, gate.taken)]


def test_the_matrix_of_failing_workers_is_that_of_the_page(
    sqlite_url: str,
    sqlite_template: Path,
    postgres: Postgres,
    postgres_url: str,
    spool: Spool,
    tmp_path: Path,
    spawn: Callable[..., Any],
) -> None:
    def played(faulty: Callable[[WorkerInEveryPhase], list[str]], *more: str) -> list[str]:
        url = copied(sqlite_template, tmp_path / f"{faulty.__name__}-database")
        with scene(url, tmp_path / faulty.__name__, spawn, *more) as one:
            return faulty(one)

    with ThreadPoolExecutor(3) as pool:
        parts = [
            pool.submit(played, killed),
            pool.submit(played, stopped, LATE),
            pool.submit(played, expired_while_stopped),
        ]
        lines = [one for part in parts for one in part.result()]
    with running_sink(Rule(Answer())) as sink:
        mail = EngineHarness(sqlite_url, spool, tmp_path, qmqp_servers=(f"127.0.0.1:{sink.port}",))
        lines += with_files(mail, sink)
        mail.close()
    lines += without_database(postgres, postgres_url, spool, tmp_path)
    in_page(BEGIN, "\n".join([HEAD, *lines]))


def copied(template: Path, directory: Path) -> str:
    directory.mkdir()
    for file in template.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return f"sqlite:///{directory}/relay.db"
