"""The process: what smtpd is made of, started in order and stopped in order.

Nothing is listened on before settings, routes, database and spool are as they must be, and the
keeper is there. Stopping: no new connections; idle sessions hear 421; transactions in progress are
finished, for DRAIN_TIMEOUT at most; then the keeper finishes what it has and the process ends.
"""

import asyncio
import signal
from functools import partial

from reception.policy import Policy
from reception.receiver import THREADS, Openings, Receiver, Threads
from reception.spooler_client import SpoolerClient, launching
from relay import metrics
from relay.hints import FRESH, Hints, celery_app
from relay.log import get_logger
from relay.routes import Routes
from relay.settings import SmtpdSettings
from relay.startup import DurableState, new_loop, ready
from smtpd.descriptors import provide
from smtpd.server import SmtpServer, shown
from smtpd.session import Greeting

log = get_logger(__name__)


def size_offered(most: int, routes: Routes) -> int:
    """What SIZE offers: the least of `most` and what the routes take, with head-room below the
    latter.

    A server's limit is on what it stores, and what it refuses for its size bounces. Postfix stores
    records: each line takes an octet more than here (two from 128 octets on), each recipient some
    30 and three times its address, the fields that it adds 700; other servers store CRLF, which is
    an octet a line, too. A 20th and 4 KiB are room for lines of 20 octets and more on the average,
    and 30 recipients at the smallest limit; the more the longer they are. Not for columns of
    figures, nor for a thousand recipients where less than 4 MiB are taken.
    """
    least = routes.max_size()
    return most if least is None else max(1, min(most, least - least // 20 - 4096))


def run(settings: SmtpdSettings) -> int:
    """Serves until SIGTERM or SIGINT; the exit status. Raises SettingsError, PolicyError,
    ListenError, as `ready`."""
    policy, routes = Policy(settings), Routes.load(settings)
    state = ready(settings)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(_serve(settings, policy, routes, state))
    state.engine.dispose()
    return 0


async def _serve(
    settings: SmtpdSettings, policy: Policy, routes: Routes, state: DurableState
) -> None:
    spool, loop = state.spool, asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    hints = Hints(celery_app(settings), FRESH, settings.batch_size)
    largest = partial(size_offered, settings.max_message_size, routes)
    name, deadline = settings.hostname, settings.accept_deadline
    threads, store = Threads(THREADS), SpoolerClient(launching(settings, spool), hints.offer)
    last, bodies = provide(settings.max_connections)
    receiver = Receiver(
        loop, spool, store, routes.route_for, name, deadline, threads, Openings(bodies)
    )
    policy.max_message_size = largest()
    server = SmtpServer(
        loop, settings, receiver, policy, Greeting(settings.hostname, largest()), largest, last
    )
    await store.start()
    addresses = await server.listen(settings.smtp_listen)
    hints.start()
    log.info("listening", addresses=[shown(*address) for address in addresses])
    metrics.SESSIONS_OPEN.set_function(lambda: len(server.connections))
    stop_metrics = metrics.serve(settings, metrics.QueueMetrics(state.engine, spool, hints.lists))
    await stop.wait()
    stop_metrics()
    log.info("stopping", sessions=len(server.connections))
    await server.stop(settings.drain_timeout)
    await store.close(5.0)
    await loop.run_in_executor(None, threads.close, 5.0)
    await loop.run_in_executor(None, hints.close)
    await server.stop(0.0)
