"""The smtpd process: starts its parts in order and stops them in order.

smtpd listens when settings, routes, database and spool are in order and the spooler has started. To
stop, it accepts no connections, sends 421 to idle sessions, lets transactions finish for at most
RELAY_DRAIN_TIMEOUT, lets the spooler finish, and ends.
"""

import asyncio
import signal
from functools import partial

from reception.authentication import Authenticator
from reception.policy import Policy
from reception.receiver import THREADS, DiskThreads, Receiver
from reception.spooler_client import SpoolerClient, launcher
from relay import metrics
from relay.hints import FRESH, Hints, celery_app
from relay.log import get_logger
from relay.routes import Routes
from relay.settings import SmtpdSettings, format_address
from relay.startup import DurableState, freeze_memory, new_loop, ready
from smtpd.descriptors import reserve_descriptors
from smtpd.server import SmtpServer

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

    Raises SettingsError, SpoolerError, and the errors of `ready`.
    """
    policy = Policy(settings)
    routes = Routes.load(settings)
    state = ready(settings)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(_serve(settings, policy, routes, state))
    state.engine.dispose()
    return 0


async def _serve(
    settings: SmtpdSettings, policy: Policy, routes: Routes, state: DurableState
) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    hints = Hints(celery_app(settings), FRESH, settings.batch_size)
    spooler = SpoolerClient(launcher(settings, state.spool), hints.offer)
    threads = DiskThreads(THREADS)
    last_descriptor, bodies = reserve_descriptors(settings.max_connections)
    receiver = Receiver(
        state.spool, spooler, routes.route_for, settings, threads, asyncio.Semaphore(bodies)
    )
    size_limit = partial(offered_size, settings.max_message_size, routes)
    authenticator = Authenticator(loop, settings.database_url)
    server = SmtpServer(
        loop, settings, receiver, policy, size_limit, authenticator, last_descriptor
    )
    await spooler.start()
    freeze_memory()
    addresses = await server.listen(settings.smtp_listen)
    hints.start()
    log.info("listening", addresses=[format_address(*address) for address in addresses])
    metrics.SESSIONS_OPEN.set_function(lambda: len(server.connections))
    queue = metrics.QueueMetrics(state.engine, state.spool, hints.lists)
    stop_metrics = metrics.serve(settings, queue)
    await stop.wait()
    stop_metrics()
    log.info("stopping", sessions=len(server.connections))
    await server.stop(settings.drain_timeout)
    await authenticator.close()
    await spooler.close(5.0)
    await loop.run_in_executor(None, threads.close, 5.0)
    await loop.run_in_executor(None, hints.close)
    await server.stop(0.0)
