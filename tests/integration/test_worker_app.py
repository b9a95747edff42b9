"""The worker as a process under Celery: `celery -A worker.app worker` and `qmqp-relay worker`,
signals and faults."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from celery import Celery

from qmqp.sink import Answer, Rule, running_sink
from relay.hint_entry import Hint
from relay.hints import FRESH, Hints
from relay.settings import WorkerSettings, load
from relay.spool.store import Spool
from tests import services
from tests.integration.harness import EngineHarness
from tests.services import Broker
from tests.waiting import until
from worker.app import WorkerProcess
from worker.engine import Engine

type Spawn = Callable[..., subprocess.Popen[Any]]
CELERY = (sys.executable, "-m", "celery", "-A", "worker.app")
WORKER = (*CELERY, "worker", "--without-gossip", "--without-mingle")
# It fails if it has imported the command line of Celery, which it does not need.
PROGRAM = """
from worker.app import *
status = run(load(WorkerSettings))
sys.exit(status or "celery.bin" in sys.modules)
"""
RUN = (sys.executable, "-c", PROGRAM)


class WorkerProcesses:
    """A queue with a spool, and worker processes on it."""

    def __init__(self, mail: EngineHarness, spawn: Spawn, log: Path) -> None:
        self.mail, self._spawn, self.log = mail, spawn, log

    def environment(self, **given: Any) -> dict[str, str]:
        settings = self.mail.settings
        relay = {
            "STATE_DIR": settings.state_dir,
            "DATABASE_URL": settings.database_url,
            "SPOOL_DIR": settings.spool_dir,
            "QMQP_SERVERS": ",".join(settings.qmqp_servers),
            "BROKER_URL": settings.broker_url,
            "GRACE": "300ms",
            "LEASE": "2s",
            "DRAIN_TIMEOUT": "2s",
            "UNSAFE_DURABILITY": "1",
            "LOG_FORMAT": "json",
        }
        ours = {f"RELAY_{name}": str(value) for name, value in {**relay, **given}.items()}
        return {**{n: v for n, v in os.environ.items() if not n.startswith("RELAY_")}, **ours}

    def start(self, *command: str, **given: Any) -> subprocess.Popen[Any]:
        with self.log.open("ab") as log:
            return self._spawn(
                command or WORKER, env=self.environment(**given), stdout=log, stderr=log
            )

    def said(self) -> str:
        return self.log.read_text()[-3000:]


@pytest.fixture
def processes(
    sqlite_url: str, spool: Spool, tmp_path: Path, spawn: Spawn
) -> Iterator[Callable[..., WorkerProcesses]]:
    opened: list[EngineHarness] = []

    def open_(port: int, broker_url: str, **given: Any) -> WorkerProcesses:
        opened.append(
            EngineHarness(
                sqlite_url,
                spool,
                tmp_path,
                qmqp_servers=(f"127.0.0.1:{port}",),
                broker_url=broker_url,
                **given,
            )
        )
        return WorkerProcesses(opened[-1], spawn, tmp_path / "worker.log")

    yield open_
    for one in opened:
        one.close()


def test_an_unauthorized_reply_from_before_the_setting_opens_the_circuit(
    processes: Callable[..., WorkerProcesses],
) -> None:
    with running_sink() as sink:
        at = processes(sink.port, "redis://127.0.0.1:1/0")
        queue_id = at.mail.accept()
        at.mail.change(
            """UPDATE deliveries SET state = 'bounced', due_at = @ago(60), finished_at = @now,
                last_outcome =
                'rejected', last_reply = 'you shall not pass', reason_source = 'server',
                last_server = :server WHERE queue_id = :id""",
            id=queue_id,
            server=f"127.0.0.1:{sink.port}",
        )
        worker = at.start(UNAUTHORIZED_REPLIES="shall not pass")
        until(lambda: at.mail.state(queue_id) == "deferred", 30, what=at.said)
        until(lambda: "circuit opened" in at.said(), what=at.said)
        assert "relay not authorized" in at.said()
        assert services.end(worker, signal.SIGTERM) == 0


def test_importing_the_application_needs_nothing(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "RELAY_STATE_DIR": str(tmp_path / "none"),
        "RELAY_BROKER_URL": "redis://127.0.0.1:1/0",
    }
    program = (
        "import threading, worker.app as a; print(sorted(a.app.tasks)[-1],"
        " threading.active_count())"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["deliver", "1"]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("command", [WORKER, RUN], ids=["celery", "run"])
def test_hints_are_delivered_and_sigterm_ends_the_worker(
    processes: Any, broker: Broker, command: tuple[str, ...]
) -> None:
    with running_sink() as sink:
        home = processes(
            sink.port, broker.url, grace=600.0
        )  # so that only a hint can be the reason
        ids = [home.mail.accept() for _ in range(30)]
        worker = home.start(*command, GRACE="10m")
        hints = Hints(home.mail.settings.broker_url, FRESH, 10)
        hints.start()
        hints.offer(ids)
        until(lambda: home.mail.states() == {"delivered"}, 30, what=home.said)
        hints.close()
        assert "Umask:\t0077\n" in Path(f"/proc/{worker.pid}/status").read_text(), (
            "only the own user may read new files"
        )
        assert services.end(worker) == 0
    assert sink.count == len(ids)
    assert home.mail.rows("SELECT end_reason FROM workers") == [{"end_reason": "stopped"}]
    assert list(home.mail.settings.state_dir.glob("*.heartbeat")) == []


def test_mail_is_delivered_without_a_broker(processes: Any) -> None:
    with running_sink() as sink:
        home = processes(sink.port, f"redis://127.0.0.1:{services.free_port()}/0")
        ids = [home.mail.accept() for _ in range(10)]
        worker = home.start()
        until(lambda: home.mail.states() == {"delivered"}, 30, what=home.said)
        assert services.end(worker) == 0, home.said()
    assert sink.count == len(ids)


def test_a_silent_broker_does_not_delay_the_end(processes: Any, broker: Broker) -> None:
    with running_sink() as sink:
        home = processes(sink.port, broker.url)
        worker = home.start()
        home.mail.accept()
        until(lambda: home.mail.states() == {"delivered"}, 30, what=home.said)
        broker.pause()
        try:
            services.end(worker, timeout=15)
        finally:
            broker.resume()
    assert home.mail.rows("SELECT end_reason FROM workers") == [{"end_reason": "stopped"}]


def test_sigterm_records_deliveries_that_do_not_end_in_time(processes: Any, broker: Broker) -> None:
    with running_sink(Rule(Answer(raw=b"", end="stay"))) as silent:
        home = processes(silent.port, broker.url)
        queue_id = home.mail.accept()
        worker = home.start()
        until(lambda: silent.count == 1, 30, what=home.said)
        assert services.end(worker, timeout=15) == 0, home.said()
    found = home.mail.delivery(queue_id)
    assert (found["state"], found["last_outcome"]) == ("deferred", "uncertain")


def test_B39_deliveries_of_a_killed_worker_are_uncertain_and_retried(
    processes: Any, broker: Broker
) -> None:
    with running_sink(Rule(Answer(raw=b"", end="stay"), times=1)) as sink:
        home = processes(sink.port, broker.url)
        queue_id = home.mail.accept()
        first = home.start(UNCERTAIN_DELAY="0s", RETRY_MIN="100ms")
        until(lambda: sink.count == 1, 30, what=home.said)
        services.end(first, signal.SIGKILL)
        home.start(UNCERTAIN_DELAY="0s", RETRY_MIN="100ms")
        until(lambda: home.mail.state(queue_id) == "delivered", 40, what=home.said)
    assert [outcome for _, outcome in home.mail.attempts(queue_id)] == ["uncertain", "delivered"]


@pytest.mark.parametrize(
    ("options", "given", "expected"),
    [
        (("--pool", "solo"), {}, "only the threads pool"),
        ((), {"QMQP_SERVERS": "no:such:port"}, "bad QMQP server"),
        ((), {"LEASE": "soon"}, "RELAY_LEASE"),
        (
            (),
            {"ROUTES": "/nowhere/routes.toml"},
            "RELAY_ROUTES: /nowhere/routes.toml: No such file",
        ),
    ],
)
def test_a_setup_that_cannot_work_is_refused_in_one_line(
    processes: Any, options: tuple[str, ...], given: dict[str, str], expected: str
) -> None:
    home = processes(1, "redis://127.0.0.1:1/0")
    worker = home.start(*WORKER, *options, **given)
    assert worker.wait(30) != 0
    assert expected in home.said().strip().splitlines()[-1]


def test_a_defect_at_startup_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery only logs an exception of a signal's receiver: such a worker would take hints and send
    nothing."""
    process = object.__new__(WorkerProcess)
    process.settings, process.app = load(WorkerSettings), Celery(set_as_current=False)
    monkeypatch.setattr(WorkerProcess, "start", lambda _: 1 / 0)
    with pytest.raises(SystemExit):
        process.on_init(SimpleNamespace(app=process.app, pool_cls="threads"))


@pytest.mark.parametrize("early", [True, False])
def test_a_hint_is_offered_by_route(early: bool) -> None:
    offers = list[Any]()

    def offer(*arguments: Any, **options: Any) -> threading.Event:
        offers.append((arguments, options))
        ended = threading.Event()
        ended.set()
        return ended

    process = object.__new__(WorkerProcess)
    process.engine = cast(Engine, SimpleNamespace(offer=offer))
    process.deliver(Hint({"bulk": ["1"], "": ["2"]}, early), FRESH)
    wanted = {"early": early}
    assert offers == [((["1"], FRESH, "bulk"), wanted), ((["2"], FRESH, ""), wanted)]


def test_an_early_hint_needs_no_task_unless_another_one_waits() -> None:
    offered = list[threading.Event]()

    def offer(*_: Any, **__: Any) -> threading.Event:
        offered.append(threading.Event())
        return offered[-1]

    process = WorkerProcess(load(WorkerSettings), Celery(set_as_current=False))
    process.engine = cast(Engine, SimpleNamespace(offer=offer))
    hint = Hint({"bulk": ["1"], "default": ["1"]}, early=True)
    assert process.take_early(hint, FRESH)
    for claimed in (*offered,):
        assert not process.take_early(hint, FRESH)
        claimed.set()
    assert process.take_early(hint, FRESH)
    assert len(offered) == 4


def test_a_worker_refuses_the_spool_of_another_database(processes: Any) -> None:
    home = processes(1, "redis://127.0.0.1:1/0")
    (home.mail.settings.spool_dir / "spool-id").write_text("0" * 32 + "\n")
    worker = home.start()
    assert worker.wait(30) != 0
    assert "is not the spool of this database" in home.said()


def test_celery_inspect_works(processes: Any, broker: Broker) -> None:
    home = processes(1, broker.url)
    home.start(REMOTE_CONTROL="true")

    def ping() -> bool:
        answer = subprocess.run(
            [*CELERY, "inspect", "ping"],
            env=home.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        return "pong" in answer.stdout

    until(ping, 40, what=home.said)
