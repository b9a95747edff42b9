"""Transactions over a connection that is kept: each is whole or is not, and ends with its call."""

from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from relay.db.engine import connect, is_outage, reading
from relay.db.single import SingleTransactions
from relay.db.sql import Queries
from relay.ids import dashed, new_id
from tests.waiting import until

STATEMENTS = {
    "insert": "INSERT INTO segments (id, committed_to) VALUES (:id, :position) RETURNING id",
    "count": "SELECT count(*) FROM segments WHERE id = :id",
    "backend": "SELECT pg_backend_pid()",
    "divide": "SELECT 1 / :zero",
    "percent": "SELECT '5 %' || CAST(:text AS text)",
}


class OwnQueries(Queries):
    """The statements above; `position` is a parameter that they share."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, "relay.queue.accept", position=0)
        self._statements = {name: (text(query),) for name, query in STATEMENTS.items()}


@pytest.fixture
def single(engine: Engine) -> SingleTransactions:
    return SingleTransactions(engine, OwnQueries(engine))


def run(single: SingleTransactions, name: str, **parameters: Any) -> Any:
    ((value,),) = single.run((name, parameters))
    return value


def segments(engine: Engine, *ids: str) -> list[int]:
    with reading(engine) as connection:
        return [
            connection.execute(text(STATEMENTS["count"]), {"id": one}).scalar_one() for one in ids
        ]


def test_the_rows_of_the_last_statement_are_returned_after_the_commit(
    engine: Engine, single: SingleTransactions
) -> None:
    first, second = dashed(new_id()), dashed(new_id())
    run(single, "insert", id=first)
    assert segments(engine, first) == [1]
    ((count,),) = single.run(("insert", {"id": second}), ("count", {"id": second}))
    assert count == 1, "the second statement sees what the first one did"
    assert segments(engine, second) == [1]
    assert single.run(("count", {"id": dashed(new_id())})) == [(0,)]


def test_statements_of_one_call_are_one_transaction(
    engine: Engine, single: SingleTransactions
) -> None:
    queue_id = dashed(new_id())
    with pytest.raises(DBAPIError):
        single.run(("insert", {"id": queue_id}), ("insert", {"id": queue_id}))
    assert segments(engine, queue_id) == [0]
    run(single, "insert", id=queue_id)


def test_a_percent_sign_in_a_statement_stays_one(single: SingleTransactions) -> None:
    assert run(single, "percent", text="%s") == "5 %%s"


def test_a_connection_is_kept_until_it_fails(clean_postgres_url: str) -> None:
    """One whose statement is refused is good for the next one."""
    engine = connect(clean_postgres_url)
    single = SingleTransactions(engine, OwnQueries(engine))
    kept = run(single, "backend")
    assert run(single, "backend") == kept
    with engine.connect() as other:
        state = text("SELECT state FROM pg_stat_activity WHERE pid = :pid")
        until(lambda: other.execute(state, {"pid": kept}).scalar_one() == "idle")
        other.execute(text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": kept})
    with pytest.raises(DBAPIError) as caught:
        run(single, "backend")
    assert is_outage(caught.value)
    again = run(single, "backend")
    assert again != kept
    with pytest.raises(DBAPIError) as caught:
        run(single, "divide", zero=0)
    assert not is_outage(caught.value)
    assert run(single, "backend") == again
    with pytest.raises(DBAPIError):
        single.run(("divide", {"zero": 0}), ("backend", {}))
    assert run(single, "backend") == again
    engine.dispose()
    assert run(single, "backend") != again, "the engine has closed the one that was kept"
    engine.dispose()


def test_without_a_database_there_is_an_outage(tmp_path: Any) -> None:
    engine = connect(f"postgresql://nobody@/none?host={tmp_path}")
    single = SingleTransactions(engine, OwnQueries(engine))
    with pytest.raises(DBAPIError) as caught:
        run(single, "backend")
    assert is_outage(caught.value)
    engine.dispose()
