"""The history that the benchmarks fill a database with: both databases get the same names."""

from sqlalchemy import text

from bench import history
from relay.db.engine import connect, writing
from relay.db.sql import Queries
from relay.ids import dashed, new_id
from tests.state_guard import unguarded


def test_history_has_the_names_of_its_rows(database_url: str) -> None:
    engine, numbers = connect(database_url), range(1, 201)
    with writing(engine) as connection, unguarded(connection):

        def values(sql: str) -> list[str]:
            return list(connection.execute(text(sql)).scalars())

        Queries(engine, history.__name__).run(
            connection,
            "fill",
            rows=len(numbers),
            first=1_700_000_000_000,
            step=1000,
            finished=50,
            soon=1_800_000_000_000_000,
            worker=dashed(new_id()),
        )
        assert values("SELECT sender FROM messages ORDER BY id") == [
            f"sender{n}@example.com" for n in numbers
        ]
        assert values("SELECT address FROM recipients ORDER BY queue_id") == [
            f"recipient{n}@d{n % 97}.example.org" for n in numbers
        ]
        servers = [f"192.0.2.{n % 4}:628" for n in numbers]
        assert values("SELECT server FROM attempts ORDER BY queue_id") == servers
        assert values("SELECT last_server FROM deliveries ORDER BY queue_id") == servers
    engine.dispose()
