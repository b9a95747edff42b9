"""Startup of smtpd and worker: the database is reachable and durable, the schema is current, and
the spool is the right one.

An outage does not end a start: services start in any order, for example after a reboot.
"""

import os
from dataclasses import dataclass

from sqlalchemy import Engine

from relay.db import engine as database
from relay.log import first_line, get_logger
from relay.redaction import redacted
from relay.settings import Settings, unknown_names
from relay.spool.store import Spool

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DurableState:
    """The database and the spool, both checked."""

    engine: Engine
    spool: Spool


def ready(settings: Settings, *, accepts: bool = False) -> DurableState:
    """Check the database and the spool; raises DatabaseError or SpoolError.

    Waits for the database, unless the process only `accepts` mail and the spool is known: the
    journal takes mail without a database, and its committer checks the database later
    (`relay.spool.mark`).
    """
    for name, nearest in unknown_names().items():
        log.warning("unknown setting", name=name, nearest=nearest)
    os.umask(0o077)  # commands do this too; a worker that `celery` starts is not one
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = database.connect(settings.database_url, hot=True)
    if accepts and (spool := Spool.known(settings.spool_dir, unsafe=settings.unsafe_durability)):
        try:
            return _checked(settings, engine)
        except Exception as error:
            if not database.is_outage(error):
                raise
            log.warning("accepting without the database", reason=first_line(error))
            return DurableState(engine, spool)
    return database.retry_until_available(lambda: _checked(settings, engine))


def _checked(settings: Settings, engine: Engine) -> DurableState:
    database.check_schema(engine)
    faults = [] if settings.unsafe_durability else database.check_durable(engine)
    if faults:
        raise database.DatabaseError(
            f"{redacted(settings.database_url)} would lose mail at a power failure:"
            f" {', '.join(faults)}; turn it on, or set RELAY_UNSAFE_DURABILITY=1 for a test"
        )
    spool = Spool(settings.spool_dir)
    spool.prepare(engine, unsafe=settings.unsafe_durability)
    return DurableState(engine, spool)
