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

from sqlalchemy import Engine

from bench.services import BenchPostgres
from relay.db.engine import connect, migrate, writing
from relay.db.sql import dialect_of
from relay.ids import dashed, new_id

_SERIES = {
    True: "SELECT n FROM generate_series(1, {rows}) AS n",
    False: """WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {rows})
        SELECT n FROM s""",
}
_HEX = {True: "lpad(to_hex({}), {}, '0')", False: "printf('%0{1}x', {0})"}
_AT = {True: "to_timestamp(({}) / 1000.0)", False: "({}) * 1000"}
_INSERTS = (
    """INSERT INTO messages (id, sender, size, received_at, client_address, helo, protocol,
        header_message_id)
    SELECT {id}, 'sender' || n % 1000 || '@example.com', 4096, {arrival}, '192.0.2.1',
        'client.example.com', 'ESMTP', '<' || n || '@client.example.com>'
    FROM numbers""",
    """INSERT INTO recipients (queue_id, position, address, delivery)
    SELECT {id}, 1, 'recipient' || n || '@d' || n % 97 || '.example.org', 1
    FROM numbers""",
    """INSERT INTO deliveries (queue_id, number, route, state, due_at, expires_at, claim_count,
        last_outcome, last_reply, reason_source, last_server, finished_at)
    SELECT {id}, 1, 'default', state, CASE WHEN state = 'deferred' THEN {soon} END, {soon}, 1,
        {outcome}, {reply}, 'server', {server},
        CASE WHEN state IN ('delivered', 'bounced') THEN {arrival} END
    FROM numbers""",
    """INSERT INTO attempts (queue_id, delivery, claim, attempt_index, worker, server, started_at,
        finished_at, outcome, reply, bytes_sent)
    SELECT {id}, 1, 1, 1, {worker}, {server}, {arrival}, {arrival}, {outcome}, {reply}, 4200
    FROM numbers""",
)


def fill(url: str, rows: int, *, finished: int = 0, seconds: float = 3600) -> None:
    """Make the schema and `rows` messages of one recipient each, which arrived in the last
    `seconds` seconds."""
    migrate(url)
    engine = connect(url)
    postgresql = engine.dialect.name == "postgresql"
    spell = dialect_of(engine)
    step = max(1, round(seconds * 1000 / rows))
    arrived = f"({round(time.time() * 1000) - rows * step} + n * {step})"
    hexed = _HEX[postgresql].format(arrived, 12)
    number = _HEX[postgresql].format("n", 12)
    uuid = f"substr({hexed}, 1, 8) || '-' || substr({hexed}, 9, 4) || '-7abc-8def-' || {number}"
    parameters = {
        "id": f"CAST({uuid} AS uuid)" if postgresql else uuid,
        "arrival": _AT[postgresql].format(arrived),
        "soon": spell("@later(3600)"),
        "worker": f"'{dashed(new_id())}'",
        "outcome": "CASE state WHEN 'delivered' THEN 'delivered' WHEN 'bounced' THEN 'rejected'"
        " ELSE 'deferred' END",
        "server": "'192.0.2.' || n % 4 || ':628'",
        "reply": "CASE state WHEN 'delivered' THEN 'ok ' || n ELSE '451 4.7.1 recipient' || n"
        " || '@example.org is greylisted, come back later' END",
    }
    if postgresql:
        parameters["worker"] = f"CAST({parameters['worker']} AS uuid)"
    state = f"""CASE WHEN n % 100 < {finished} AND n % 50 = 0 THEN 'bounced'
        WHEN n % 100 < {finished} THEN 'delivered'
        WHEN n % 1000 = 999 THEN 'held'
        ELSE 'deferred' END AS state"""
    numbers = f"SELECT n, {state} FROM ({_SERIES[postgresql].format(rows=rows)}) AS all_of_them"
    with writing(engine) as connection:
        if postgresql:
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        connection.exec_driver_sql(
            f"CREATE TABLE numbers AS {numbers}".replace("%", "%%" if postgresql else "%")
        )
        for insert in _INSERTS:
            statement = insert.format(**parameters)
            connection.exec_driver_sql(statement.replace("%", "%%") if postgresql else statement)
        connection.exec_driver_sql("DROP TABLE numbers")
    analyze(engine)
    engine.dispose()


def analyze(engine: Engine) -> None:
    """Update the statistics of the planner, as autovacuum does in time."""
    postgresql = engine.dialect.name == "postgresql"
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if postgresql:
            connection.exec_driver_sql("SET statement_timeout = 0")
        connection.exec_driver_sql("VACUUM ANALYZE" if postgresql else "ANALYZE")


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
        Path(directory).chmod(0o755)  # another user may run PostgreSQL
        postgres = BenchPostgres(Path(directory, "postgres"))
        try:
            measure("postgresql", postgres.url(), **options)
        finally:
            postgres.stop()
        measure("sqlite", f"sqlite:///{Path(directory).resolve()}/relay.db", **options)
