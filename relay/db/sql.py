"""Loads the SQL of a module: named statements from `<module>.postgresql.sql` and
`<module>.sqlite.sql`, the files beside it.

`Queries` runs the statements for an engine's database. The rows of a batch are one JSON parameter,
so a batch is a few statements whatever its size. What must stay true: a name means the same on both
databases (`tests/integration/test_statements.py` compares them); the clock is the database's in
every statement.
"""

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from sqlalchemy import Connection, Engine, TextClause, text

_NAME = re.compile(r"^-- name: (\w+)$", re.M)
_COMMENT_OR_STRING = re.compile(r"(--[^\n]*)|'(?:[^']|'')*'")
# The body of a function or a trigger, whose statements end in semicolons too.
_BODY = re.compile(r"\$\$.*?\$\$|^BEGIN$.*?^END(?=;$)", re.M | re.S)
_END = re.compile(r";\s*$", re.M)


@cache
def named_statements(module: str, database: str) -> Mapping[str, tuple[TextClause, ...]]:
    """The statements of `<module>.<database>.sql`, by name.

    A name stands alone in a line `-- name: claim_hinted`. Its statements follow, each ended by a
    semicolon at the end of a line; the body of a function stands between `$$`, that of a trigger
    between lines BEGIN and END. Comments stay behind; a database shows each statement with its
    module and name. Raises ValueError for a name that stands twice or has no whole statement.
    """
    package, _, subject = module.rpartition(".")
    source = files(package).joinpath(f"{subject}.{database}.sql").read_text()
    named: dict[str, tuple[TextClause, ...]] = {}
    _, *parts = _NAME.split(source)
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        # A colon inside of a string is not the beginning of a parameter.
        plain = _COMMENT_OR_STRING.sub(lambda m: "" if m[1] else m[0].replace(":", r"\:"), body)
        whole = _BODY.sub(lambda m: _END.sub(";\0", m[0]), plain)
        *statements, rest = (part.replace("\0", "\n") for part in _END.split(whole))
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
        self._dialect = engine.dialect
        self._common = common
        self._compiled: dict[str, str] = {}

    def run(self, connection: Connection, name: str, **parameters: Any) -> Any:
        """Run the statements of a name, one after the other; the result of the last one."""
        *first, last = self._statements[name]
        values = self._common | parameters
        for statement in first:
            connection.execute(statement, values)
        return connection.execute(last, values)

    def for_driver(self, name: str, parameters: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The one statement of a name, and all its parameters, as the driver takes them."""
        query = self._compiled.get(name)
        if query is None:
            (statement,) = self._statements[name]
            query = self._compiled[name] = str(statement.compile(dialect=self._dialect))
        return query, self._common | parameters
