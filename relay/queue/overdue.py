"""The overdue poll: the order in which a route's overdue mail is claimed without hints.

Overdue means that a worker should have claimed it by now. The longest due comes first. But a
hundred thousand retries that are due at once must not take all the capacity from fresh mail, and a
backlog of fresh mail must not take it from a retry. So half of the capacity goes by `due_at`, the
other half to the kind (never claimed before, or claimed) that the first half had less of, and what
that kind leaves goes by `due_at` again. The rarer kind stands somewhere behind the other in the
index: a poll searches WINDOW rows from a cursor, and the next poll continues there.

What must stay true: all the capacity is used if there is that much mail; a cursor changes only the
order.
"""

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection

from relay.db.sql import Statements
from relay.queue.model import Claim

WINDOW = 1000  # rows; some 20 ms on SQLite, where no other process can write meanwhile
OVERDUE = "d.state = 'queued' AND d.due_at <= @now"
_KINDS = {True: "AND d.claim_count = 0", False: "AND d.claim_count > 0"}  # by whether it is fresh
_BOUND = f"""SELECT due_at FROM deliveries d WHERE {OVERDUE} AND route = :route {{}}
    ORDER BY due_at LIMIT 1 OFFSET :window"""


class OverduePoll:
    """The cursors of one worker's polls; used by one thread."""

    def __init__(self, sql: Statements) -> None:
        self._sql = sql
        self._odd: dict[
            str, bool
        ] = {}  # by route: whether the half by `due_at` is the larger one, if they differ
        self._rarer: dict[str, bool] = {}  # by route: whether that is the fresh mail
        self._cursors: dict[
            tuple[str, bool], Any
        ] = {}  # by route and kind: the `due_at` up to which the kind was searched

    def claim(
        self, connection: Connection, route: str, room: int, claim: "Callable[..., list[Claim]]"
    ) -> "list[Claim]":
        """Claim at most `room` overdue deliveries of a route. `claim` takes a condition, a limit and
        parameters."""
        self._odd[route] = odd = not self._odd.get(route, False)
        half = (room + odd) // 2
        claims = claim(OVERDUE, half) if half else []
        if len(claims) < half:
            return claims
        if claims:
            self._rarer[route] = 2 * sum(one.claim == 1 for one in claims) < len(claims)
        claims += self._search(connection, route, room - half, claim)
        return claims + (claim(OVERDUE, room - len(claims)) if len(claims) < room else [])

    def _search(
        self, connection: Connection, route: str, most: int, claim: "Callable[..., list[Claim]]"
    ) -> "list[Claim]":
        """Claim the rarer kind within the window; move its cursor on if the window has no more."""
        if not most:
            return []
        kind = self._rarer.get(route, True)
        parameters = (
            {"cursor": cursor} if (cursor := self._cursors.get((route, kind))) is not None else {}
        )
        behind = "AND d.due_at > :cursor" if parameters else ""
        bound = self._sql.run(
            connection, _BOUND.format(behind), route=route, window=WINDOW, **parameters
        ).scalar()
        window = OVERDUE
        if (
            bound is not None
        ):  # `:bound` replaces the time now: SQLite uses an index for one upper end only
            window, parameters = (
                "d.state = 'queued' AND d.due_at <= :bound",
                parameters | {"bound": bound},
            )
        claims = claim(f"{window} {behind} {_KINDS[kind]}", most, **parameters)
        if bound is not None and len(claims) < most:
            self._cursors[route, kind] = bound
        return claims
