"""What smtpd and worker do before they touch mail: database reachable and durable, schema ours,
spool the right one.

Nothing here gives up because something is away: services start in any order, also after a host
reboot.
"""

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Engine

from relay.db import engine as database
from relay.log import first_line, get_logger
from relay.settings import Settings, redacted, unknown_names
from relay.spool.store import Spool

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DurableState:
    """The durable state, checked."""

    engine: Engine
    spool: Spool


def ready(settings: Settings) -> DurableState:
    """Wait for the database, then check it and the spool; raises DatabaseError or SpoolError."""
    for warning in unknown_names():
        log.warning(warning)
    os.umask(0o077)  # as commands do, for a worker that `celery` started
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = database.connect(settings.database_url, hot=True)
    return retry_until_available(lambda: _checked(settings, engine))


def _checked(settings: Settings, engine: Engine) -> DurableState:
    database.wait_until_ready(engine)
    faults = [] if settings.unsafe_durability else database.check_durable(engine)
    if faults:
        raise database.DatabaseError(
            f"{redacted(settings.database_url)} would forget mail at a power cut: {', '.join(faults)};"
            " turn it on, or set RELAY_UNSAFE_DURABILITY=1 for a test"
        )
    spool = Spool(settings.spool_dir)
    spool.prepare(engine, unsafe=settings.unsafe_durability)
    return DurableState(engine, spool)


def retry_until_available[Answer](ask: Callable[[], Answer]) -> Answer:
    """Ask the database until it answers: who starts in the middle of an outage waits for its
    end."""
    while True:
        try:
            return ask()
        except Exception as error:
            if not database.is_outage(error):
                raise
            log.warning(
                "waiting for the database", reason=first_line(getattr(error, "orig", error))
            )
        time.sleep(1.0)


def new_loop() -> asyncio.AbstractEventLoop:
    """An event loop: uvloop's, where there is a wheel of it; else slower, not different."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
