"""Databases with a long past: filled by SQL, as they would look after days of mail.

Message n of a fill arrives a fixed time after the one before, the last one now. `finished` of a
hundred are delivered or, every fiftieth of them, bounced, with the attempt that it took; the others
wait, nearly all deferred with words of the server. What must stay true: ids sort by arrival, as
ours do, and no row is one that the program could not make.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from relay.db.engine import connect, migrate, writing
from relay.db.sql import dialect_of
from relay.ids import dashed, new_id
from tests.services import Postgres

_SERIES = {
    True: "SELECT n FROM generate_series(1, {rows}) AS n",
    False: "WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {rows}) SELECT n FROM s",
}
_HEX = {True: "lpad(to_hex({}), {}, '0')", False: "printf('%0{1}x', {0})"}
_AT = {True: "to_timestamp(({}) / 1000.0)", False: "({}) * 1000"}
_INSERTS = (
    """INSERT INTO messages (id, sender, size, received_at, client_address, helo, protocol, header_message_id)
        SELECT {id}, 'sender' || n % 1000 || '@example.com', 4096, {arrival}, '192.0.2.1', 'client.example.com',
        'ESMTP', '<' || n || '@client.example.com>' FROM numbers""",
    """INSERT INTO recipients (queue_id, position, address, delivery)
        SELECT {id}, 1, 'recipient' || n || '@d' || n % 97 || '.example.org', 1 FROM numbers""",
    """INSERT INTO deliveries (queue_id, number, route, state, due_at, expires_at, claim_count, last_outcome, last_reply,
        reason_source, last_server, finished_at) SELECT {id}, 1, 'default', state, CASE WHEN state = 'deferred' THEN {soon} END,
        {soon}, 1, CASE state WHEN 'delivered' THEN 'delivered' WHEN 'bounced' THEN 'rejected' ELSE 'deferred' END,
        {reply}, 'server', {server}, CASE WHEN state IN ('delivered', 'bounced') THEN {arrival} END FROM numbers""",
    """INSERT INTO attempts (queue_id, delivery, claim, attempt_index, worker, server, started_at, finished_at, outcome, reply,
        bytes_sent) SELECT {id}, 1, 1, 1, {worker}, {server}, {arrival}, {arrival},
        CASE state WHEN 'delivered' THEN 'delivered' WHEN 'bounced' THEN 'rejected' ELSE 'deferred' END, {reply}, 4200
        FROM numbers""",
)


def fill(url: str, rows: int, *, finished: int = 0, seconds: float = 3600) -> None:
    """Make the schema, and so many messages of one recipient each, which came in the last so many
    seconds."""
    migrate(url)
    engine = connect(url)
    postgresql, spell = engine.dialect.name == "postgresql", dialect_of(engine)
    step = max(1, round(seconds * 1000 / rows))
    arrived = f"({round(time.time() * 1000) - rows * step} + n * {step})"
    hexed = _HEX[postgresql].format(arrived, 12)
    words = f"substr({hexed}, 1, 8) || '-' || substr({hexed}, 9, 4) || '-7abc-8def-' || {_HEX[postgresql].format('n', 12)}"
    given = {
        "id": f"CAST({words} AS uuid)" if postgresql else words,
        "arrival": _AT[postgresql].format(arrived),
        "soon": spell("@later(3600)"),
        "worker": f"'{dashed(new_id())}'",
        "server": "'192.0.2.' || n % 4 || ':628'",
        "reply": "CASE state WHEN 'delivered' THEN 'ok ' || n ELSE '451 4.7.1 recipient' || n"
        " || '@example.org is greylisted, come back later' END",
    }
    if postgresql:
        given["worker"] = f"CAST({given['worker']} AS uuid)"
    state = f"""CASE WHEN n % 100 < {finished} AND n % 50 = 0 THEN 'bounced' WHEN n % 100 < {finished} THEN 'delivered'
        WHEN n % 1000 = 999 THEN 'held' ELSE 'deferred' END AS state"""
    numbers = f"SELECT n, {state} FROM ({_SERIES[postgresql].format(rows=rows)}) AS all_of_them"
    with writing(engine) as connection:
        if postgresql:
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        connection.exec_driver_sql(
            f"CREATE TABLE numbers AS {numbers}".replace("%", "%%" if postgresql else "%")
        )
        for insert in _INSERTS:
            statement = insert.format(**given)
            connection.exec_driver_sql(statement.replace("%", "%%") if postgresql else statement)
        connection.exec_driver_sql("DROP TABLE numbers")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if postgresql:  # as autovacuum has done in a database that has its age
            connection.exec_driver_sql("SET statement_timeout = 0")
        connection.exec_driver_sql("VACUUM ANALYZE" if postgresql else "ANALYZE")
    engine.dispose()


def on_each(measure: Callable[[str, str], None]) -> None:
    """Give `measure` the name and the URL of a new database of either kind, below a directory that
    goes with it."""
    server = Postgres()
    server.start()
    try:
        measure("postgresql", server.url())
    finally:
        server.stop()
    with tempfile.TemporaryDirectory() as directory:
        measure("sqlite", f"sqlite:///{Path(directory).resolve()}/relay.db")
