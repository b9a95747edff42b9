"""The worker as Celery knows it: `celery -A worker.app worker`, or `qmqp-relay worker`.

The one task, `deliver(ids)`, offers its messages to this process' engine and returns when the last
one is out of its hands. Engine, sweeper and housekeeper live from the signal `worker_init` on,
whether there is a broker or not (with one that refuses connections `worker_ready` never comes), and
end with SIGTERM. Importing this module starts nothing and connects to nothing: `celery inspect` and
Flower import it too.

What must stay true: the threads pool only, because every other pool forks, patches or blocks what
the engine's threads stand on; no REMAP_SIGTERM and no soft shutdown, which that pool answers with a
crash. SIGTERM drains, and a thread that waits for it from the start ends the process when Celery
does not: a broker that is silent hangs it for minutes.
"""

import logging
import os
import signal
import sys
import threading
import warnings
from functools import partial
from typing import Any, NoReturn

from celery import Celery, Task, signals
from celery.concurrency import get_implementation
from celery.concurrency.thread import TaskPool
from celery.exceptions import SecurityWarning

from relay import metrics
from relay.db.engine import DatabaseError
from relay.dsn.generator import DsnGenerator
from relay.hints import QUEUES, RETRY, TASK, Hints, celery_app
from relay.log import configure, get_logger
from relay.queue.claim import WorkerQueue
from relay.queue.operations import QueueOperations
from relay.queue.rescue import Rescuer
from relay.routes import Routes, parse_server
from relay.settings import SettingsError, WorkerSettings, load
from relay.spool.store import SpoolError
from relay.startup import ready, retry_until_available
from worker.circuit_breaker import ServerPool
from worker.cleaner import Cleaner
from worker.consumer import LARGEST
from worker.delivery import report_failure
from worker.engine import RECORDING_TIME, Engine
from worker.rerouter import Rerouter
from worker.sweeper import Sweeper

log = get_logger(__name__)
CONCURRENCY = 4  # tasks only wait; what limits sending is WORKER_CONNECTIONS
WRONG_USE = 2  # the exit status of a command for a bad setting (commands.errors)
CELERY_TIME = 3.0  # for Celery to end by itself once we have (seconds)


class Process:
    """What lives in a worker process beside Celery."""

    def __init__(self, settings: WorkerSettings, app: Celery) -> None:
        self.settings, self.app = settings, app
        self.engine: Engine | None = None
        self._asked, self._ended = threading.Event(), threading.Event()
        # Strong references: a signal would forget a bound method that nobody else holds.
        signals.setup_logging.connect(self._on_setup_logging, weak=False)
        signals.worker_init.connect(self._on_init, weak=False)
        signals.worker_shutting_down.connect(self._on_shutting_down, weak=False)
        signals.worker_shutdown.connect(self._on_shutdown, weak=False)

    def deliver(self, ids: dict[str, list[str]], lane: str) -> None:
        """Hand messages, by route, to the engine; returns when none of them waits for it any
        more."""
        if self.engine is not None:
            for ticket in [self.engine.offer(some, lane, route) for route, some in ids.items()]:
                ticket.wait()

    def start(self) -> None:
        """Check database and spool, then start everything; raises SystemExit for what waiting will
        not mend."""
        settings = self.settings
        try:
            routes = Routes.load(settings)
            state = ready(settings)
        except (SettingsError, DatabaseError, SpoolError) as error:
            _refuse(str(error))
        queue = WorkerQueue(state.engine, settings)
        servers = ServerPool(
            settings.server_connections,
            routed=lambda: {one.name for route in routes.all() for one in route.servers},
            backoff=(settings.retry_min, settings.retry_max),
        )
        self.engine = Engine(settings, queue, state.spool, routes, servers=servers)
        self._hints = Hints(self.app, RETRY, settings.batch_size)
        generator = DsnGenerator(
            state.engine, state.spool, settings, routes.route_for, partial(_not_authorized, servers)
        )
        rescuer = Rescuer(state.engine, settings)
        servers.pauses = retry_until_available(rescuer.paused)
        self._sweeper = Sweeper(settings, rescuer, generator, self.engine, self._hints)
        self._housekeeper = Cleaner(settings, state.engine, state.spool)
        operations = QueueOperations(state.engine, notices=settings.bounces == "dsn")
        self._rerouter = Rerouter(rescuer, operations, routes)
        # Celery's own handler comes later; a SIGTERM before that would leave what the engine sends
        # by then in doubt.
        signal.signal(signal.SIGTERM, self._on_shutting_down)
        for part in (self.engine, self._hints, self._sweeper, self._housekeeper, self._rerouter):
            part.start()
        metrics.serve(settings, metrics.QueueMetrics(state.engine, state.spool, self._hints.lists))
        threading.Thread(target=self._wait_for_the_end, name="end", daemon=True).start()

    def _wait_for_the_end(self) -> None:
        self._asked.wait()
        limit = self.settings.drain_timeout + 2 * RECORDING_TIME
        last = threading.Timer(limit, _leave, args=("could not drain in time",))
        last.daemon = True
        last.start()
        self._sweeper.close()
        self._housekeeper.close()
        self._rerouter.close()
        self._hints.close()
        recorded = self.engine is None or self.engine.drain(self.settings.drain_timeout)
        log.info("drained", recorded=recorded)
        last.cancel()
        self._ended.set()
        if not threading.Event().wait(CELERY_TIME):
            _leave("Celery did not end by itself", 0 if recorded else 1)

    # Signals

    def _on_setup_logging(self, **_: Any) -> None:
        configure(self.settings)

    def _on_init(self, sender: Any, **_: Any) -> None:
        if sender.app is not self.app:
            return
        if not issubclass(get_implementation(sender.pool_cls), TaskPool):
            _refuse("only the threads pool can be used: start it with --pool threads")
        if os.environ.get("REMAP_SIGTERM"):
            _refuse("unset REMAP_SIGTERM: the threads pool cannot be stopped that way")
        configure(self.settings)
        try:
            self.start()
        except (
            Exception
        ):  # Celery would log it and go on, a worker that takes hints and sends nothing
            log.exception("worker not started")
            sys.exit(1)

    def _on_shutting_down(self, *_: Any, **__: Any) -> None:
        self._asked.set()  # in a signal handler: nothing more than that

    def _on_shutdown(self, **_: Any) -> None:
        if self.engine is not None:
            self._asked.set()
            self._ended.wait()


def _not_authorized(servers: ServerPool, name: str, reply: str) -> None:
    report_failure(servers, parse_server(name), reply, unauthorized=True)


def _refuse(why: str) -> NoReturn:
    """End the process for what another start would meet again; `up` knows that by the status."""
    sys.stderr.write(f"qmqp-relay worker: {why}\n")
    sys.exit(WRONG_USE)


def _leave(why: str, code: int = 1) -> None:
    """End the process, whatever other threads are in the middle of."""
    log.warning("leaving", reason=why)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)


def build(settings: WorkerSettings) -> Celery:
    """The Celery application of a worker with these settings."""
    made = celery_app(settings)
    made.conf.update(
        broker_transport_options=made.conf.broker_transport_options
        | {LARGEST: settings.batch_size},
        worker_consumer="worker.consumer:Consumer",
        worker_enable_remote_control=settings.remote_control,
    )
    process = Process(settings, made)

    def deliver(task: Task, ids: dict[str, list[str]]) -> None:
        process.deliver(ids, (task.request.delivery_info or {}).get("routing_key", ""))

    made.task(deliver, name=TASK, bind=True, shared=False)
    return made


def run(settings: WorkerSettings, *options: str) -> int:
    """A worker in the foreground until SIGTERM or SIGINT; `options` are more of Celery's. The exit
    code."""
    # It is about pickle, which we do not accept; who runs the relay as root has been told by other
    # means.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    argv = [
        "--quiet",
        "worker",
        "--pool",
        "threads",
        "--concurrency",
        str(CONCURRENCY),
        "--queues",
        ",".join(QUEUES),
    ]
    argv += [
        "--without-gossip",
        "--without-mingle",
        "--hostname",
        f"worker-{os.getpid()}@%h",
        *options,
    ]
    return build(settings).start(argv=argv) or 0


def _settings() -> WorkerSettings:
    try:
        return load(WorkerSettings)
    except SettingsError as error:
        _refuse(str(error))


app = build(_settings())
