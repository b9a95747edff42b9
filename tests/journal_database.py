"""A real database for simulated processes: SQLite, with transactions that fail, and backups.

Each process has its own engine, made by `relay.db.engine.connect`. What is simulated: the turn to
write, which is a step of the process before BEGIN and another one behind COMMIT, so a process never
ends or sleeps within a transaction that others wait for; the time, which is that of
`SimulatedClock`; and durability: a COMMIT counts as durable when it has returned, but for that of a
message that is announced, which the next COMMIT makes durable, as on PostgreSQL.
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import OperationalError

from relay.db.engine import connect, prepare_connections
from relay.ids import dashed
from tests.journal_disk import SimulatedProcess


@dataclass
class SimulatedClock:
    """Stands in the place of the module `time`; it runs only when `now` is changed."""

    now: float = 1.8e9

    def time(self) -> float:
        """Seconds since 1970."""
        return self.now

    def monotonic(self) -> float:
        """Seconds."""
        return self.now

    def microseconds(self) -> int:
        """As the database has it."""
        return round(self.now * 1e6)


class SimulatedDatabase:
    """`committed` is called behind each COMMIT; `observer` is a connection for the checks."""

    def __init__(
        self, path: Path, spool: str, clock: SimulatedClock, committed: Callable[[], object]
    ) -> None:
        self.path, self.committed = path, committed
        self._clock = clock
        self._engines: list[Engine] = []
        self._durable: sqlite3.Connection | None = None  # None: all that is committed
        self._before: list[sqlite3.Connection] = []  # a transaction that is not synced
        # A process may be killed while it uses one, and then no pool closes it.
        self._connections: list[sqlite3.Connection] = []
        self.observer = sqlite3.connect(path, isolation_level=None)
        self._prepare(self.observer)
        self.observer.execute("DROP VIEW clock")
        self.observer.execute("CREATE VIEW clock AS SELECT simulated_now() AS now")
        row = dashed(spool), clock.microseconds()
        self.observer.execute("INSERT INTO spool (id, created_at) VALUES (?, ?)", row)

    def connect(self, process: SimulatedProcess) -> Engine:
        """An engine for one process."""
        engine = connect(f"sqlite:///{self.path}")
        prepare_connections(engine, self._prepare)
        event.listen(engine, "begin", partial(_before_query, process), insert=True)
        event.listen(engine, "before_execute", self._before_execute)
        _OWNERS[engine] = self, process
        self._engines.append(engine)
        process.at_end.append(partial(self._end, engine))
        return engine

    def close(self) -> None:
        """Close everything."""
        for engine in [*self._engines]:
            self._end(engine)
        for connection in self._connections:
            connection.close()

    def back_up(self) -> sqlite3.Connection:
        """A copy."""
        copy = sqlite3.connect(":memory:")
        self.observer.backup(copy)
        return copy

    def restore(self, backup: sqlite3.Connection, *, live: bool) -> None:
        """Put a backup in the place of everything. `live`: the connections do not notice."""
        if not live:
            for engine in self._engines:
                engine.dispose()
        backup.backup(self.observer)

    @property
    def may_lose(self) -> bool:
        """Whether a crash loses something."""
        return self._durable is not None

    def crash(self) -> None:
        """What is not durable is lost, and every connection ends."""
        if self._durable is not None:
            self.restore(self._durable, live=False)
            self._durable = None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Around one that writes."""
        self._before.clear()
        yield
        if not self._before:
            self._durable = None
        elif self._durable is None:
            (self._durable,) = self._before
        self.committed()

    def _before_execute(
        self, _connection: Connection, statement: Any, _several: Any, parameters: Any, _options: Any
    ) -> None:
        if parameters.get("announced") is not None and not self._before:
            self._before.append(self.back_up())
            self._connections += self._before

    def mark(self) -> int:
        """The mark of the spool."""
        ((mark,),) = self.observer.execute("SELECT mark FROM spool")
        return int(mark)

    def _end(self, engine: Engine) -> None:
        self._engines.remove(engine)
        engine.dispose()

    def _prepare(self, connection: sqlite3.Connection, _record: Any = None) -> None:
        self._connections.append(connection)
        connection.create_function("simulated_now", 0, self._clock.microseconds)
        connection.execute("PRAGMA synchronous=OFF").close()  # the machine stays up
        connection.execute("PRAGMA busy_timeout=0").close()  # no transaction waits for another


_OWNERS: WeakKeyDictionary[Engine, tuple[SimulatedDatabase, SimulatedProcess]] = WeakKeyDictionary()


def _before_query(process: SimulatedProcess, connection: Connection) -> None:
    """Before BEGIN of a transaction that only reads."""
    if connection.get_execution_options().get("relay_writing"):
        return
    if process.step("query"):
        raise _unavailable("no connection")


@contextmanager
def turn_to_write(engine: Engine) -> Iterator[None]:
    """Stands in the place of `relay.db.engine.write_lock`."""
    database, process = _OWNERS[engine]
    if process.step("transaction"):
        raise _unavailable("no connection")
    with database.transaction():
        yield
    if process.step("committed"):
        raise _unavailable("the reply to COMMIT was lost")


def _unavailable(reason: str) -> OperationalError:
    return OperationalError(None, None, sqlite3.OperationalError(reason))
