"""The database of a command: opened for reading, never created; and the id that an operator typed
looked up in it."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sqlalchemy import Engine

from relay.db import engine as database
from relay.report.filters import Filter
from relay.report.queries import QueueReader
from relay.settings import Settings


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[Engine]:
    """The database, closed at the end; raises DatabaseError if a SQLite file does not exist."""
    url = database.normalized(settings.database_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        raise database.DatabaseError(
            f"there is no database {url.database} yet: run `qmqp-relay up` or `qmqp-relay migrate`"
        )
    engine = database.connect(settings.database_url)
    try:
        yield engine
    finally:
        engine.dispose()


def resolved(queue: QueueReader, filter_: Filter) -> Filter:
    """The filter with its id in full; raises NoSuchMessage."""
    return filter_ if filter_.id is None else replace(filter_, id=queue.resolve(filter_.id))
