"""Databases with a long history: SQL fills them as they would look after days of mail.

Messages arrive at equal intervals, the last one now. `finished` of a hundred are delivered, or
bounced if they are a fiftieth, with the attempt that it took. The others wait, nearly all of them
deferred with a reply of the server. What must stay true: ids sort by arrival, and each row is one
that the relay could write.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.services import postgresql
from relay.db.engine import connect, migrate, writing
from relay.db.sql import Queries
from relay.ids import dashed, new_id

HOUR = 3600.0


def fill(url: str, rows: int, *, finished: int = 0, seconds: float = HOUR) -> None:
    """Make the schema and `rows` messages of one recipient each, which arrived in the last
    `seconds` seconds."""
    migrate(url)
    now = round(time.time() * 1000)
    step = max(1, round(seconds * 1000 / rows))
    run(
        url,
        "fill",
        rows=rows,
        first=now - rows * step,
        step=step,
        finished=finished,
        soon=round((now + HOUR * 1000) * 1000),
        worker=dashed(new_id()),
    )


def run(url: str, name: str, **parameters: int | str) -> None:
    """Run statements of history.*.sql, and bring the statistics of the planner up to date."""
    engine = connect(url)
    queries = Queries(engine, __name__)
    with writing(engine) as connection:
        queries.run(connection, name, **parameters)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        queries.run(connection, "analyze")
    engine.dispose()


def on_each_database(
    measure: Callable[..., None], program: str, heading: str, **defaults: int
) -> None:
    """Call `measure` with the name and the URL of a new database of either kind, and with the
    options of the command line, whose names and defaults are given. Print the heading first."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args())
    print(f"{options}, load {os.getloadavg()[0]:.1f}\n{heading}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        top = Path(directory)
        top.chmod(0o755)  # another user may run PostgreSQL
        with postgresql(top / "postgres") as (_, url):
            measure("postgresql", url, **options)
        measure("sqlite", f"sqlite:///{top.resolve()}/relay.db", **options)
