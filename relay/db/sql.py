"""One SQL text for PostgreSQL and SQLite, with macros for what differs.

`Dialect` expands the macros (`@now`, `@later(x)`, `@rows(...)`) for one database; `Statements` runs
statements. The rows of a batch are one JSON parameter, so a batch is a few statements whatever its
size. What must stay true: a macro means the same on both databases; the clock is the database's in
every statement.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from sqlalchemy import Connection, Engine, TextClause, text


class Dialect:
    """Expands the macros of our SQL for one database.

    `@now`: the time; `@later(s)`, `@ago(s)`: s seconds after or before it; `@since(t)`: seconds
    since t; `@when(t)`: t as people read it; `@iso(w)`: a result of `@when` in the form of RFC 3339;
    `@micros(t)`: t as microseconds since 1970; `@hex(id)`: an id as 32 digits; `@id(:name)`: an id
    parameter; `@like`: LIKE that ignores case; `@at_least`, `@below`: >= and < by
    bytes; `@chance`: a number in [0, 1); `@skip_locked`, `@locked(table)`; `@rows(:name; column
    type, ...)`: the rows of a JSON array parameter, as x; `@by(index)`: the index that SQLite must
    use, because it has no statistics.
    """

    _MACRO = re.compile(r"@(\w+)(?:\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\))?")

    def __init__(self, name: str) -> None:
        self.postgresql = name == "postgresql"
        self.macros: dict[str, Callable[[str], str]] = (
            self._postgresql() if self.postgresql else self._sqlite()
        )

    def __call__(self, sql: str) -> str:
        return self._MACRO.sub(lambda match: self.macros[match[1]](self(match[2] or "")), sql)

    def _postgresql(self) -> dict[str, Callable[[str], str]]:
        def rows(arguments: str) -> str:
            name, columns = arguments.split(";")
            return f"json_to_recordset(CAST({name.strip()} AS json)) AS x({columns.strip()})"

        return {
            "now": lambda _: "now()",
            "later": lambda s: f"(now() + ({s}) * interval '1 second')",
            "ago": lambda s: f"(now() - ({s}) * interval '1 second')",
            "since": lambda t: f"CAST(extract(epoch FROM now() - {t}) AS float8)",
            "when": lambda t: t,
            "iso": lambda t: (
                rf"""to_char({t} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24\:MI\:SS.MS"+00\:00"')"""
            ),
            "micros": lambda t: f"CAST(extract(epoch FROM {t}) * 1000000 AS bigint)",
            "hex": lambda i: f"replace(CAST({i} AS text), '-', '')",
            "id": lambda i: f"CAST({i} AS uuid)",
            "like": lambda _: "ILIKE",
            "chance": lambda _: "random()",
            "at_least": lambda _: "~>=~",
            "below": lambda _: "~<~",
            "skip_locked": lambda _: "FOR UPDATE SKIP LOCKED",
            "locked": lambda table: f"FOR UPDATE OF {table}",
            "by": lambda _: "",
            "rows": rows,
        }

    def _sqlite(self) -> dict[str, Callable[[str], str]]:
        # SQLite's `now` is a whole number of milliseconds inside a Julian day: rounding gets it
        # back exactly.
        now = "(CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) * 1000)"

        def rows(arguments: str) -> str:
            name, columns = arguments.split(";")
            picked = ", ".join(
                f"value ->> '$.{c.split()[0]}' AS {c.split()[0]}" for c in columns.split(",")
            )
            return f"(SELECT {picked} FROM json_each({name.strip()})) AS x"

        return {
            "now": lambda _: now,
            "later": lambda s: f"({now} + CAST(({s}) * 1000000 AS INTEGER))",
            "ago": lambda s: f"({now} - CAST(({s}) * 1000000 AS INTEGER))",
            "since": lambda t: f"(({now} - ({t})) / 1000000.0)",
            "when": lambda t: (
                f"datetime(({t}) / 1000000, 'unixepoch') || '.' || substr(({t}) / 1000, -3)"
            ),
            "iso": lambda t: f"replace({t}, ' ', 'T') || '+00\\:00'",
            "micros": lambda t: t,
            "hex": lambda i: f"replace({i}, '-', '')",
            "id": lambda i: i,
            "like": lambda _: "LIKE",
            "chance": lambda _: "(abs(random() % 1000000) / 1000000.0)",
            "at_least": lambda _: ">=",
            "below": lambda _: "<",
            "skip_locked": lambda _: "",
            "locked": lambda _: "",
            "by": lambda index: f"INDEXED BY {index}",
            "rows": rows,
        }


def dialect_of(engine: Engine) -> Dialect:
    """The dialect of an engine's database."""
    return Dialect(engine.dialect.name)


class Statements:
    """Runs our SQL: expands a statement once, and adds the parameters that all statements share."""

    def __init__(self, engine: Engine, **common: Any) -> None:
        self._dialect, self._common = dialect_of(engine), common
        self._expanded: dict[str, TextClause] = {}
        self.postgresql = self._dialect.postgresql

    def run(self, connection: Connection, sql: str, **parameters: Any) -> Any:
        """Execute a statement with macros and `:name` parameters."""
        statement = self._expanded.get(sql)
        if statement is None:
            statement = self._expanded[sql] = text(self._dialect(sql))
        return connection.execute(statement, self._common | parameters)

    def copied(self, connection: Connection, sql: str, **parameters: Any) -> Iterator[Any]:
        """The only column of a query with macros, streamed by COPY (PostgreSQL).

        The server goes on while we work, where a cursor waits for each lot to be asked for.
        """
        query = f"COPY ({text(self._dialect(sql)).compile(dialect=connection.dialect)}) TO STDOUT"
        values = self._common | parameters
        cursor: Any = connection.connection.cursor()
        with (
            cursor,
            cursor.copy(query, values) if values else cursor.copy(query % ()) as copy,
        ):  # %% is % in either
            for (value,) in copy.rows():
                yield value


_NAME = re.compile(r"^-- name: (\w+)$", re.M)
_COMMENT_OR_STRING = re.compile(r"(--[^\n]*)|'(?:[^']|'')*'")


@cache
def named_statements(module: str, database: str) -> Mapping[str, tuple[TextClause, ...]]:
    """The statements of `<module>.<database>.sql`, by name.

    A name stands alone in a line `-- name: claim_hinted`. Its statements follow, each ended by a
    semicolon at the end of a line. Comments stay behind; a database shows each statement with its
    module and name. Raises ValueError for a name that stands twice or has no whole statement.
    """
    package, _, subject = module.rpartition(".")
    source = files(package).joinpath(f"{subject}.{database}.sql").read_text()
    named: dict[str, tuple[TextClause, ...]] = {}
    _, *parts = _NAME.split(source)
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        # A colon inside of a string is not the beginning of a parameter.
        plain = _COMMENT_OR_STRING.sub(lambda m: "" if m[1] else m[0].replace(":", r"\:"), body)
        *statements, rest = re.split(r";\s*$", plain, flags=re.M)
        if name in named or not statements or rest.strip():
            raise ValueError(f"{subject}.{database}.sql: {name} stands twice or is not whole")
        title = f"-- {module} {name}\n"
        named[name] = tuple(text(title + statement.strip()) for statement in statements)
    return named


class Queries:
    """The named statements of one module for an engine's database.

    `Queries(engine, __name__, grace=60.0)` reads the file beside the module. The keywords are
    parameters that its statements share.
    """

    def __init__(self, engine: Engine, module: str, **common: Any) -> None:
        self._statements = named_statements(module, engine.dialect.name)
        self._common = common

    def run(self, connection: Connection, name: str, **parameters: Any) -> Any:
        """Run the statements of a name, one after the other; the result of the last one."""
        *first, last = self._statements[name]
        values = self._common | parameters
        for statement in first:
            connection.execute(statement, values)
        return connection.execute(last, values)
