"""The smtpd process: starts its parts in order and stops them in order. It serves all doors.

smtpd listens when settings, routes, database and spool are in order and the spooler has started. It
does not wait for a database that is away if its spool is known. To stop, it accepts no connections,
sends 421 to idle sessions, lets transactions finish for at most RELAY_DRAIN_TIMEOUT, lets the
spooler finish, and ends.
"""

import asyncio
import signal
from collections.abc import Iterable
from functools import partial

from plugins.loader import load as load_plugins
from plugins.runner import Plugins
from qmqp_relay.hooks import SESSION_HOOKS
from qmqpd.server import QmqpConnection
from reception.authentication import Authenticator
from reception.hooks import HookHost
from reception.listeners import SystemdSockets
from reception.policy import Policy, qmqp_networks
from reception.rate_recorder import RateRecorder
from reception.receiver import THREADS, DiskThreads, Receiver
from reception.server import Door, FrontEnd
from reception.spooler_client import SpoolerClient, launcher
from relay import metrics
from relay.hints import FRESH, Hints
from relay.listeners import Listener
from relay.log import get_logger
from relay.routes import Routes
from relay.runtime import freeze_memory, new_loop
from relay.settings import SmtpdSettings
from relay.startup import DurableState, ready
from relay.tls import CertificatePair, certificate_pair
from smtpd.descriptors import reserve_descriptors
from smtpd.server import SmtpConnection

log = get_logger(__name__)


def offered_size(limit: int, routes: Routes) -> int:
    """The octets that SIZE offers: the least of `limit` and of what the routes accept, with a
    margin below the latter.

    A server limits what it stores, and a message that is too large bounces. Postfix stores records:
    a line takes an octet more than here (two from 128 octets on), a recipient 30 octets and three
    times its address, the added fields 700. Other servers store CRLF, also an octet a line. A 20th
    and 4 KiB suffice for lines of 20 octets on average, and for 30 recipients at the smallest
    limit. They do not suffice for columns of figures, nor for a thousand recipients below 4 MiB.
    """
    least = routes.max_size()
    return limit if least is None else max(1, min(limit, least - least // 20 - 4096))


def run(settings: SmtpdSettings) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status.

    Raises SettingsError, PluginError, SpoolerError, and the errors of `ready`. SIGHUP reads the
    certificate again.
    """
    doors = _doors(settings)
    routes = Routes.load(settings)
    certificate = certificate_pair(settings, settings.tls_client_ca)
    plugins = load_plugins(settings)
    state = ready(settings, accepts=True)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(_serve(settings, doors, routes, state, certificate, plugins))
    state.engine.dispose()
    return 0


def _ignore() -> None:
    """SIGHUP ends nothing; without a certificate there is nothing to read again."""


def _doors(settings: SmtpdSettings) -> list[tuple[Door, Iterable[Listener]]]:
    """The doors and their listeners; a door without a listener stays closed."""
    smtp = Policy(settings)
    qmqp = Policy(settings, qmqp_networks(settings), smtp.space, smtp.rates)
    return [
        (Door("smtp", "RELAY_SMTP_LISTEN", smtp, SmtpConnection), settings.smtp_listen),
        (Door("qmqp", "RELAY_QMQP_LISTEN", qmqp, QmqpConnection), settings.qmqp_listen),
    ]


async def _serve(
    settings: SmtpdSettings,
    doors: list[tuple[Door, Iterable[Listener]]],
    routes: Routes,
    state: DurableState,
    certificate: CertificatePair | None,
    plugins: Plugins | None,
) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, certificate.reload if certificate else _ignore)
    hints = Hints(settings.broker_url, FRESH, settings.batch_size)
    spooler = SpoolerClient(launcher(settings, state.spool), hints.offer, settings.accept_deadline)
    threads = DiskThreads(THREADS)
    last_descriptor, bodies = reserve_descriptors(settings.max_connections)
    receiver = Receiver(
        state.spool, spooler, routes.route_for, settings, threads, asyncio.Semaphore(bodies)
    )
    size_limit = partial(offered_size, settings.max_message_size, routes)
    authenticator = Authenticator(loop, settings.database_url)
    recorder = RateRecorder(loop, state.engine)
    for door, _listeners in doors:
        door.policy.on_rate_exceeded = recorder.note
    asked = plugins is not None and plugins.hooks & SESSION_HOOKS
    hooks = HookHost(plugins, routes.names) if plugins is not None and asked else None
    server = FrontEnd(
        loop, settings, receiver, size_limit, authenticator, last_descriptor, certificate, hooks
    )
    await spooler.start()
    freeze_memory()
    passed = SystemdSockets()
    for door, listeners in doors:
        open_at = await server.listen(door, listeners, passed)
        if open_at:
            log.info("listening", door=door.name, addresses=open_at)
        count = metrics.SESSIONS_OPEN.labels(door.name)
        count.set_function(partial(server.sessions.__getitem__, door.name))
    if passed.names:
        log.warning("sockets not used", names=passed.names)
    hints.start()
    metrics.JOURNAL_LAG_MESSAGES.set_function(lambda: spooler.lag.messages)
    metrics.JOURNAL_LAG_BYTES.set_function(lambda: spooler.lag.octets)
    metrics.JOURNAL_LAG_SECONDS.set_function(lambda: spooler.lag.seconds)
    queue = metrics.QueueMetrics(state.engine, state.spool, hints.lists)
    stop_metrics = metrics.serve(
        settings, queue, tls_context=(lambda: certificate.context) if certificate else None
    )
    await stop.wait()
    stop_metrics()
    log.info("stopping", sessions=len(server.connections))
    await server.stop(settings.drain_timeout)
    if hooks is not None:
        await hooks.stop()
    elif plugins is not None:
        await plugins.stop()
    await authenticator.close()
    await recorder.close()
    await spooler.close(5.0)
    await loop.run_in_executor(None, threads.close, 5.0)
    await loop.run_in_executor(None, hints.close)
    await server.stop(0.0)
