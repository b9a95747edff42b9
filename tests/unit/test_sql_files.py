"""The loader of SQL files: names, several statements of a name, strings and comments."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from relay.db.sql import Queries

PACKAGES = itertools.count()  # the loader remembers what it has read, so a name is used once
SQL = """-- name: insert_two
-- Comments may hold a :colon; and end in a semicolon;
INSERT INTO t (a) VALUES (:first);
INSERT INTO t (a) VALUES (:second) RETURNING a;

-- name: strings
SELECT 'it''s 12:30 :not_a_parameter; -- and no comment' AS said, :shared AS shared;
"""


@pytest.fixture
def queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Queries]:
    package = tmp_path / f"package_of_statements_{next(PACKAGES)}"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)

    def write(sql: str) -> Queries:
        subject = f"subject{len(list(package.iterdir()))}"
        (package / f"{subject}.sqlite.sql").write_text(sql)
        engine = create_engine("sqlite://")
        return Queries(engine, f"{package.name}.{subject}", shared=7)

    return write


def test_all_statements_of_a_name_run_and_the_last_gives_the_result(
    queries: Callable[[str], Queries],
) -> None:
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (a)")
        rows = queries(SQL).run(connection, "insert_two", first=1, second=2).all()
        assert rows == [(2,)]
        assert connection.exec_driver_sql("SELECT a FROM t ORDER BY a").all() == [(1,), (2,)]
    engine.dispose()


def test_a_string_holds_no_parameter_and_no_comment(queries: Callable[[str], Queries]) -> None:
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        row = queries(SQL).run(connection, "strings").one()
    assert row == ("it's 12:30 :not_a_parameter; -- and no comment", 7)
    engine.dispose()


@pytest.mark.parametrize(
    "sql",
    [
        "-- name: twice\nSELECT 1;\n-- name: twice\nSELECT 2;\n",
        "-- name: empty\n-- only a comment;\n",
        "-- name: open\nSELECT 1\n",
        "-- name: rest\nSELECT 1;\nSELECT 2\n",
    ],
)
def test_a_file_that_is_not_whole_is_refused(queries: Callable[[str], Queries], sql: str) -> None:
    with pytest.raises(
        ValueError, match=r"subject1\.sqlite\.sql: \w+ stands twice or is not whole"
    ):
        queries(sql)
