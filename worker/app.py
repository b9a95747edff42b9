"""The worker as a Celery application: `celery -A worker.app worker`, or `qmqp-relay worker`.

The one task, `deliver(ids)`, offers its messages to the engine of this process. Engine, sweeper,
cleaner and rerouter run from the signal `worker_init` on, with or without a broker, until SIGTERM.
Importing this module starts nothing: `celery inspect` and Flower import it too.

What must stay true: only the threads pool is used, because every other pool forks, patches or
blocks what the engine's threads need; no REMAP_SIGTERM and no soft shutdown, which crash that pool.
SIGTERM drains. A thread waits for it from the start and ends the process if Celery does not: a
silent broker can block Celery for minutes.
"""

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import sqlalchemy
from celery import Celery, Task, signals
from celery.concurrency import get_implementation
from celery.concurrency.thread import TaskPool
from celery.exceptions import SecurityWarning
from celery.utils.nodenames import host_format

from plugins.entries import plugin_entries
from relay import metrics
from relay.db.engine import DatabaseError, retry_until_available
from relay.dsn.generator import DsnGenerator
from relay.events.outbox import Outbox
from relay.events.subscriptions import Subscriptions
from relay.events.webhooks import Webhook, load_webhooks
from relay.hint_entry import TASK, Hint
from relay.hints import QUEUES, RETRY, Hints
from relay.log import configure, get_logger
from relay.queue.claim import WorkerQueue
from relay.queue.operations import QueueOperations
from relay.queue.rescue import Rescuer
from relay.routes import Routes, parse_server
from relay.runtime import freeze_memory
from relay.settings import SettingsError, WorkerSettings, load
from relay.spool.journal.directory import JournalDirectory
from relay.spool.mark import SpoolMark
from relay.spool.store import SpoolError
from relay.startup import ready
from relay.tls import metrics_context
from worker.celery_app import celery_app
from worker.circuit_breaker import ServerPool
from worker.cleaner import Cleaner
from worker.consumer import LARGEST, TAKE_EARLY
from worker.delivery import report_failure
from worker.engine import RECORDING_TIME, Engine
from worker.event_receiver import EventReceiver
from worker.notifier import CONCURRENCY, Notifier
from worker.periodic import PeriodicThread
from worker.producer import HintBatch
from worker.rerouter import Rerouter
from worker.segment_cleaner import SegmentCleaner
from worker.spool_keeper import SpoolKeeper
from worker.sweeper import Sweeper

if TYPE_CHECKING:
    from plugins.runner import Plugins
    from worker.plugin_receiver import PluginReceiver

log = get_logger(__name__)
WRONG_USE = 2  # the exit status of a command for a bad setting (commands.errors)
CELERY_TIME = 3.0  # seconds for Celery to end by itself after the drain


class WorkerProcess:
    """What runs in a worker process beside Celery."""

    def __init__(self, settings: WorkerSettings, app: Celery) -> None:
        self.settings = settings
        self.app = app
        self.engine: Engine | None = None
        self._taken: list[HintBatch] = []  # of the last early hint
        self._stop_requested = threading.Event()
        self._drained = threading.Event()
        # Strong references: a signal drops a bound method to which there is no other reference.
        signals.setup_logging.connect(self.on_setup_logging, weak=False)
        signals.worker_init.connect(self.on_init, weak=False)
        signals.worker_shutting_down.connect(self.on_shutting_down, weak=False)
        signals.worker_shutdown.connect(self.on_shutdown, weak=False)

    def deliver(self, hint: Hint, queue: str) -> None:
        """Offer messages, by route, to the engine; returns when the claim requests with them
        were answered, or they were dropped."""
        for batch in self._offer(hint, queue):
            batch.wait()

    def take_early(self, hint: Hint, queue: str) -> bool:
        """Offer the messages of an early hint, without a task. False while those of another one
        wait, so that no more wait here than in Celery's tasks. For the consumer's thread."""
        if not all(batch.is_set() for batch in self._taken):
            return False
        self._taken = self._offer(hint, queue)
        return True

    def _offer(self, hint: Hint, queue: str) -> list[HintBatch]:
        engine = self.engine
        if engine is None:
            return []
        return [
            engine.offer(ids, queue, route, early=hint.early) for route, ids in hint.ids.items()
        ]

    def start(self) -> None:
        """Check database and spool, then start everything. Raises SystemExit for a fault that
        another start would meet again."""
        settings = self.settings
        try:
            routes = Routes.load(settings)
            plugins = _plugins_with_events(settings)
            state = ready(settings)
        except (SettingsError, DatabaseError, SpoolError) as error:
            _refuse(str(error))
        mark = SpoolMark(JournalDirectory(state.spool.handle), state.spool.identity)
        mark.guard(state.engine)
        state.engine.dispose()  # the connections that were opened before the guard
        servers = ServerPool(
            settings.server_connections,
            routed=lambda: {server.name for route in routes.all() for server in route.servers},
            backoff=(settings.retry_min, settings.retry_max),
        )
        queue = WorkerQueue(state.engine, settings)
        rescuer = Rescuer(state.engine, settings)
        operations = QueueOperations(state.engine, sends_dsns=settings.bounces == "dsn")
        generator = DsnGenerator(
            state.engine,
            state.spool,
            settings,
            routes.route_for,
            lambda name, reply: report_failure(
                servers, parse_server(name), reply, unauthorized=True
            ),
        )
        servers.pauses = retry_until_available(rescuer.paused)
        self.engine = engine = Engine(settings, queue, state.spool, routes, servers=servers)
        keeper = SpoolKeeper(state.engine, state.spool, mark, lambda: engine.outcomes)
        hints = Hints(settings.broker_url, RETRY, settings.batch_size)
        parts: tuple[PeriodicThread | Hints | Notifier, ...] = (
            Sweeper(settings, rescuer, generator, self.engine, hints),
            Cleaner(settings, state.engine, state.spool),
            SegmentCleaner(settings, state.engine, state.spool),
            Rerouter(rescuer, operations, routes),
            keeper,
            hints,
            *_notifiers(settings, state.engine, plugins),
        )
        # Celery installs its own handler later. A SIGTERM before that would make uncertain what the
        # engine is sending.
        signal.signal(signal.SIGTERM, self.on_shutting_down)
        self.engine.start()
        for part in parts:
            part.start()
        reported = metrics.QueueMetrics(state.engine, state.spool, hints.lists)
        metrics.serve(settings, reported, tls_context=metrics_context(settings))
        threading.Thread(
            target=self._drain, args=(engine, keeper, parts), name="end", daemon=True
        ).start()
        freeze_memory()

    def _drain(
        self,
        engine: Engine,
        keeper: SpoolKeeper,
        parts: Sequence[PeriodicThread | Hints | Notifier],
    ) -> None:
        self._stop_requested.wait()
        limit = self.settings.drain_timeout + 2 * RECORDING_TIME
        timer = threading.Timer(limit, _leave, args=("the drain took too long",))
        timer.daemon = True
        timer.start()
        for part in parts:
            part.close()
        recorded = engine.drain(self.settings.drain_timeout)
        keeper.finish()
        log.info("drained", recorded=recorded)
        timer.cancel()
        self._drained.set()
        time.sleep(CELERY_TIME)
        _leave("Celery did not end by itself", 0 if recorded else 1)

    # Signals

    def on_setup_logging(self, **_: Any) -> None:
        """Take the place of Celery's logging."""
        configure(self.settings)

    def on_init(self, sender: Any, **_: Any) -> None:
        """Start, or end the process."""
        if sender.app is not self.app:
            return
        if not issubclass(get_implementation(sender.pool_cls), TaskPool):
            _refuse("only the threads pool can be used: start it with --pool threads")
        if os.environ.get("REMAP_SIGTERM"):
            _refuse("unset REMAP_SIGTERM: the threads pool cannot be stopped that way")
        configure(self.settings)
        try:
            self.start()
        except Exception:  # Celery would go on, with a worker that takes hints and sends nothing
            log.exception("worker not started")
            sys.exit(1)

    def on_shutting_down(self, *_: Any, **__: Any) -> None:
        """Request the drain. It is a signal handler, so it does no more."""
        self._stop_requested.set()

    def on_shutdown(self, **_: Any) -> None:
        """Let Celery end after the drain."""
        if self.engine is not None:
            self._stop_requested.set()
            self._drained.wait()


def _plugins_with_events(settings: WorkerSettings) -> "Plugins | None":
    """The plugins, if one of them has the hook `event`. Raises SettingsError."""
    if not plugin_entries(settings):  # as in most workers, which import no more of them
        return None
    from plugins.loader import load as load_plugins
    from worker.plugin_receiver import HOOK

    plugins = load_plugins(settings)
    return plugins if plugins is not None and HOOK in plugins.hooks else None


def _notifiers(
    settings: WorkerSettings, engine: sqlalchemy.Engine, plugins: "Plugins | None"
) -> Sequence[Notifier]:
    """The notifier, if there is a receiver of events. Its subscriptions are registered here, before
    mail flows, so that it gets every event of this worker."""
    webhooks = load_webhooks(settings)
    hooked = _hooked(plugins)
    if not webhooks and not hooked:
        return ()
    subscriptions = Subscriptions(engine)
    wanted = [webhook.subscription for webhook in webhooks]
    wanted += [receiver.subscription for receiver in hooked]
    retry_until_available(lambda: subscriptions.register(wanted))
    return (
        Notifier(
            Outbox(engine),
            subscriptions,
            lambda: [*_clients(webhooks), *hooked],
            stop=plugins.stop if plugins is not None else None,
        ),
    )


def _hooked(plugins: "Plugins | None") -> "Sequence[PluginReceiver]":
    """The plugins that receive events."""
    if plugins is None:
        return ()
    from worker.plugin_receiver import receiving

    return receiving(plugins)


def _clients(webhooks: Sequence[Webhook]) -> Sequence[EventReceiver]:
    """A client of each webhook; imported here, because most workers have none."""
    if not webhooks:
        return ()
    from worker.webhook_client import WebhookClient

    return [WebhookClient(webhook, connections=CONCURRENCY) for webhook in webhooks]


def _refuse(reason: str) -> NoReturn:
    """End the process for a fault that another start would meet again; `up` knows the status."""
    sys.stderr.write(f"qmqp-relay worker: {reason}\n")
    sys.exit(WRONG_USE)


def _leave(reason: str, status: int = 1) -> None:
    """End the process without waiting for other threads."""
    log.warning("forced exit", reason=reason)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


def build(settings: WorkerSettings) -> Celery:
    """The Celery application of a worker with these settings."""
    application = celery_app(settings)
    process = WorkerProcess(settings, application)
    transport = application.conf.broker_transport_options | {
        LARGEST: settings.batch_size,
        TAKE_EARLY: process.take_early,
    }
    application.conf.update(
        broker_transport_options=transport,
        worker_consumer="worker.consumer:Consumer",
        worker_enable_remote_control=settings.remote_control,
    )

    def deliver(task: Task, ids: dict[str, list[str]], *, early: bool = False) -> None:
        queue = (task.request.delivery_info or {}).get("routing_key", "")
        process.deliver(Hint(ids, early), queue)

    application.task(deliver, name=TASK, bind=True, shared=False)
    return application


def run(settings: WorkerSettings) -> int:
    """Run a worker in the foreground until SIGTERM or SIGINT; the exit status.

    It is what `celery worker` runs, without the command line of Celery, which takes 7 MiB.
    """
    # Celery warns root about pickle, which the relay does not accept.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    worker = build(settings).Worker(
        hostname=host_format(f"worker-{os.getpid()}@%h"),
        pool_cls="threads",
        queues=QUEUES,
        quiet=True,
        without_gossip=True,
        without_mingle=True,
    )
    worker.start()
    return worker.exitcode or 0


def _settings() -> WorkerSettings:
    try:
        return load(WorkerSettings)
    except SettingsError as error:
        _refuse(str(error))


app = build(_settings())
