"""Looks: in which order a route's overdue mail is claimed, straight from the database.

The longest due comes first; but a hundred thousand retries that became due together, while no hints
come, must not have all the room before fresh mail has any, nor a backlog of fresh mail before a
retry has. So half of the room goes by `due_at`, and the other half to the kind (never claimed
before, or claimed) that the first half had less of. What that kind leaves goes by `due_at` again.

The rarer kind stands somewhere behind the other in the route's part of the index. It is searched
for WINDOW rows at a time, and where it was not the next look goes on: nothing is walked through
twice, and the present is reached in so many looks as the backlog has windows. What comes to stand
before that mark, because its COMMIT was slow or an operator released it, has its turn by `due_at`.

What must stay true: all the room is used if there is that much mail; a mark is only ever a matter
of order.
"""

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection

from relay.db.sql import Statements
from relay.queue.model import Claim

WINDOW = 1000  # rows; some 20 ms on SQLite, which lets nobody else write meanwhile
OVERDUE = "d.state = 'queued' AND d.due_at <= @now"
_KINDS = {True: "AND d.claim_count = 0", False: "AND d.claim_count > 0"}  # by whether it is fresh
_BOUND = f"""SELECT due_at FROM deliveries d WHERE {OVERDUE} AND route = :route {{}}
    ORDER BY due_at LIMIT 1 OFFSET :window"""


class OverduePoll:
    """What one worker remembers of its looks; used by one thread."""

    def __init__(self, sql: Statements) -> None:
        self._sql = sql
        self._odd: dict[
            str, bool
        ] = {}  # by route: whether the half by `due_at` is the larger one, if they differ
        self._rarer: dict[str, bool] = {}  # by route: whether that is the fresh mail
        self._marks: dict[
            tuple[str, bool], Any
        ] = {}  # by route and kind: up to which `due_at` there is none

    def claim(
        self, connection: Connection, route: str, room: int, claim: "Callable[..., list[Claim]]"
    ) -> "list[Claim]":
        """Claim overdue mail of a route; `claim` does it, given a condition, how many, and
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
        """Claim what a window holds of the rarer kind, and move its mark on if that was all."""
        if not most:
            return []
        kind = self._rarer.get(route, True)
        given = {"mark": mark} if (mark := self._marks.get((route, kind))) is not None else {}
        behind = "AND d.due_at > :mark" if given else ""
        bound = self._sql.run(
            connection, _BOUND.format(behind), route=route, window=WINDOW, **given
        ).scalar()
        window = OVERDUE
        if (
            bound is not None
        ):  # it takes the place of the time now: SQLite searches an index for one end only
            window, given = "d.state = 'queued' AND d.due_at <= :bound", given | {"bound": bound}
        found = claim(f"{window} {behind} {_KINDS[kind]}", most, **given)
        if bound is not None and len(found) < most:
            self._marks[route, kind] = bound
        return found
