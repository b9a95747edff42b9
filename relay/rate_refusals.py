"""Who was refused by a rate, by hours: what `stats` and the page show of RELAY_RATE_LIMITS.

A row counts the refusals of one limit for one name in an hour; smtpd adds to it
(`reception/rate_recorder.py`). What must stay true: rows are kept for a day, and `add` removes the
older ones; two processes that add at the same time never wait for each other in a circle.
"""

import json
from collections.abc import Mapping

from sqlalchemy import Engine

from relay.db.engine import writing
from relay.db.sql import Queries

type RefusalKey = tuple[str, str, str]
"""Subject and what name the limit; the name is a client's network, a sender or a user. An empty
name stands for several others."""


class RateRefusals:
    """The table of refusals."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queries = Queries(engine, __name__)

    def add(self, refused: Mapping[RefusalKey, int]) -> None:
        """Add to the rows of this hour."""
        rows = [
            {"subject": subject, "what": what, "name": name, "refused": count}
            for (subject, what, name), count in refused.items()
        ]
        with writing(self._engine) as connection:
            self._queries.run(connection, "add", refusals=json.dumps(rows))
