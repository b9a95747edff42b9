"""Bisection: finding the recipient because of which a server refused a whole message.

QMQP has one reply for all recipients. A D accepted nothing, so sending the halves again is safe:
the delivery becomes `split`, and two children on the same body get half of its recipients each,
until the bad recipient is alone and bounces. That is worth trying while the refusal is about an
address (RFC 3463 x.1.y): if both first halves are refused with the same text, or a message has
LARGEST pieces, everything bounces. x.5.3 (too many recipients) is cut until the server takes the
pieces. `part` separates recipients that no QMQP request can carry; `divide` follows changed routes.

What must stay true: parent, children and recipients change in the transaction that records the D or
has locked the parent; the children have the recipients of the parent, each once. Numbers of
children depend on the parent alone. It never waits for a lock: relatives that another transaction
has locked are skipped, or the whole batch runs again.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from sqlalchemy import Connection, Engine

from qmqp.request import is_sendable
from relay.db.sql import Queries

LARGEST = 64
TOO_MANY_RECIPIENTS = re.compile(r"(?<![\w.])[45]\.5\.3(?!\.?\w)")  # RFC 3463 x.5.3


class Family(NamedTuple):
    """The place of a delivery among the deliveries of its message."""

    parent: int | None
    grandparent: int | None
    pieces: int
    roots: int

    def first_child(self, number: int) -> int:
        """As in a heap: no two deliveries of a message have a child of the same number."""
        return self.roots + 2 * number - 1


def can_carry(address: str) -> bool:
    """Whether a QMQP request can carry this address, as `Request` judges it. What has no bytes in
    latin-1 has none."""
    try:
        return is_sendable(address.encode("latin-1"))
    except UnicodeEncodeError:
        return False


class Splitter:
    """Cuts deliveries, in the transaction of the caller, which has locked them.

    `key` is always the dashed id of the message. `notices`: BOUNCES is not off.
    """

    def __init__(self, engine: Engine, *, notices: bool) -> None:
        self._queries = Queries(engine, __name__, notices=notices)

    def cut(self, connection: Connection, key: str, number: int, reply: str) -> bool:
        """Give the recipients of a delivery to two children (or see that it was done); False if it
        must bounce whole. The caller sets the state of the delivery."""
        positions = list(self.recipients(connection, key, number))
        if not positions:
            return True
        family = self._family(connection, key, number)
        if not TOO_MANY_RECIPIENTS.search(reply):
            first_half = family.parent is not None and family.grandparent is None
            if first_half and self._both_refused(connection, key, number, reply):
                return False
            if family.pieces + 2 > LARGEST:
                return False
        if len(positions) == 1:
            return False
        middle = (len(positions) + 1) // 2
        halves = positions[:middle], positions[middle:]
        self._insert_children(connection, key, number, family, halves)
        return True

    def part(self, connection: Connection, key: str, number: int) -> None:
        """Give the recipients that can be sent to one child, the others to a second one (or see
        that it was done). No limit on pieces applies: neither child is ever parted again."""
        parts: dict[bool, list[int]] = {True: [], False: []}
        for position, address in self.recipients(connection, key, number).items():
            parts[can_carry(address)].append(position)
        if any(parts.values()):
            family = self._family(connection, key, number)
            self._insert_children(connection, key, number, family, parts.values())

    def divide(
        self, connection: Connection, key: str, number: int, routes: Mapping[str, list[int]]
    ) -> None:
        """Give the recipients of a delivery that waits, by position, the routes that they have in
        `routes`. What becomes of it is due when it was."""
        names = list(routes)
        if len(names) == 1:
            self._queries.run(connection, "set_route", id=key, number=number, route=names[0])
            return
        first = self._family(connection, key, number).first_child(number)
        middle = (len(names) + 1) // 2
        for child, part in ((first, names[:middle]), (first + 1, names[middle:])):
            positions = [position for name in part for position in routes[name]]
            self._assign(connection, key, child, positions)
            parameters = {"id": key, "number": number, "child": child, "route": part[0]}
            self._queries.run(connection, "insert_divided_child", **parameters)
            if len(part) > 1:
                self.divide(connection, key, child, {name: routes[name] for name in part})
        self._queries.run(connection, "mark_divided", id=key, number=number)

    def taken(self, connection: Connection, key: str, number: int) -> None:
        """A late K for a delivery: what it was cut into is delivered with it."""
        self._queries.run(connection, "deliver_descendants", id=key, number=number)

    def recipients(self, connection: Connection, key: str, number: int) -> dict[int, str]:
        """The recipients of a delivery: the address by position, in order."""
        rows = self._queries.run(connection, "recipients", id=key, number=number)
        return dict(rows.all())

    def _family(self, connection: Connection, key: str, number: int) -> Family:
        return Family(*self._queries.run(connection, "family", id=key, number=number).one())

    def _insert_children(
        self,
        connection: Connection,
        key: str,
        number: int,
        family: Family,
        parts: Collection[list[int]],
    ) -> None:
        """Insert a child for the recipients of each part."""
        for child, positions in enumerate(parts, family.first_child(number)):
            self._assign(connection, key, child, positions)
            self._queries.run(connection, "insert_child", id=key, number=number, child=child)

    def _assign(self, connection: Connection, key: str, child: int, positions: list[int]) -> None:
        listed = json.dumps(positions)
        self._queries.run(connection, "assign", id=key, child=child, positions=listed)

    def _both_refused(self, connection: Connection, key: str, number: int, reply: str) -> bool:
        """Whether the other first half was refused with the same text; then what is left of it
        bounces as well."""
        parameters = {"id": key, "number": number, "reply": reply}
        sibling = self._queries.run(connection, "sibling_refused_alike", **parameters).scalar()
        if sibling is not None:
            refused = parameters | {"number": sibling}
            self._queries.run(connection, "bounce_descendants", **refused)
        return sibling is not None
