"""Macros for the SQL that tests write, so that one text runs on both databases.

The program has whole statements for each database; tests have many small ones. `Dialect` expands
the macros for one database.
"""

import re
from collections.abc import Callable

from sqlalchemy import Engine


class Dialect:
    """Expands macros for one database.

    `@now`: the time; `@later(s)`, `@ago(s)`: s seconds after or before it; `@since(t)`: seconds
    since t; `@when(t)`: t as views show it; `@micros(t)`: t as microseconds since 1970;
    `@hex(id)`: an id as 32 digits; `@id(:name)`: an id parameter; `@chance`: a number in [0, 1);
    `@rows(:name; column type, ...)`: the rows of a JSON array parameter, as x.
    """

    _MACRO = re.compile(r"@(\w+)(?:\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\))?")

    def __init__(self, name: str) -> None:
        self.postgresql = name == "postgresql"
        self.macros = _POSTGRESQL if self.postgresql else _SQLITE

    def __call__(self, sql: str) -> str:
        return self._MACRO.sub(lambda match: self.macros[match[1]](self(match[2] or "")), sql)


def _postgresql_rows(arguments: str) -> str:
    name, columns = arguments.split(";")
    return f"json_to_recordset(CAST({name.strip()} AS json)) AS x({columns.strip()})"


def _sqlite_rows(arguments: str) -> str:
    name, columns = arguments.split(";")
    names = [column.split()[0] for column in columns.split(",")]
    picked = ", ".join(f"value ->> '$.{one}' AS {one}" for one in names)
    return f"(SELECT {picked} FROM json_each({name.strip()})) AS x"


_POSTGRESQL: dict[str, Callable[[str], str]] = {
    "now": lambda _: "now()",
    "later": lambda s: f"(now() + ({s}) * interval '1 second')",
    "ago": lambda s: f"(now() - ({s}) * interval '1 second')",
    "since": lambda t: f"CAST(extract(epoch FROM now() - {t}) AS float8)",
    "when": lambda t: t,
    "micros": lambda t: f"CAST(extract(epoch FROM {t}) * 1000000 AS bigint)",
    "hex": lambda i: f"replace(CAST({i} AS text), '-', '')",
    "id": lambda i: f"CAST({i} AS uuid)",
    "chance": lambda _: "random()",
    "rows": _postgresql_rows,
}
_NOW = "(SELECT now FROM clock)"
_SQLITE: dict[str, Callable[[str], str]] = {
    "now": lambda _: _NOW,
    "later": lambda s: f"({_NOW} + CAST(({s}) * 1000000 AS INTEGER))",
    "ago": lambda s: f"({_NOW} - CAST(({s}) * 1000000 AS INTEGER))",
    "since": lambda t: f"(({_NOW} - ({t})) / 1000000.0)",
    "when": lambda t: (
        f"datetime(({t}) / 1000000, 'unixepoch') || '.' || substr(({t}) / 1000, -3) || '+00:00'"
    ),
    "micros": lambda t: t,
    "hex": lambda i: f"replace({i}, '-', '')",
    "id": lambda i: i,
    "chance": lambda _: "(abs(random() % 1000000) / 1000000.0)",
    "rows": _sqlite_rows,
}


def dialect_of(engine: Engine) -> Dialect:
    """The dialect of an engine's database."""
    return Dialect(engine.dialect.name)
