"""Bisection: find the recipient that makes a server reject a message.

QMQP has one reply for all recipients. A D accepted nothing, so sending the halves again is safe:
the delivery becomes `split`, and two children on the same body get half of its recipients each,
until the bad recipient is alone and bounces. This is done only if the D is about an address
(RFC 3463 x.1.y): if both first halves are rejected with the same text, or a message has LARGEST
parts, everything bounces. After x.5.3 (too many recipients) the delivery is split until the server
accepts the parts. `split_unsendable` separates recipients that no QMQP request can carry; `divide`
follows changed routes.

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
    """The place of a delivery among the deliveries of its message; `first_child`: the number of its
    first child."""

    parent: int | None
    grandparent: int | None
    parts: int
    first_child: int


def can_carry(address: str) -> bool:
    """Whether a QMQP request can carry this address, as `Request` decides. An address outside
    latin-1 cannot be carried."""
    try:
        return is_sendable(address.encode("latin-1"))
    except UnicodeEncodeError:
        return False


class Splitter:
    """Splits deliveries, in the transaction of the caller, which has locked them.

    `key` is always the dashed id of the message. `sends_dsns`: BOUNCES is not off.
    """

    def __init__(self, engine: Engine, *, sends_dsns: bool) -> None:
        self._queries = Queries(engine, __name__, sends_dsns=sends_dsns)

    def split_in_half(self, connection: Connection, key: str, number: int, reply: str) -> bool:
        """Give the recipients of a delivery to two children (or see that it was done); False if it
        must bounce whole. The caller sets the state of the delivery."""
        positions = list(self.recipients(connection, key, number))
        if not positions:
            return True
        family = self._family(connection, key, number)
        if not TOO_MANY_RECIPIENTS.search(reply):
            first_half = family.parent is not None and family.grandparent is None
            if first_half and self._both_rejected(connection, key, number, reply):
                return False
            if family.parts + 2 > LARGEST:
                return False
        if len(positions) == 1:
            return False
        middle = (len(positions) + 1) // 2
        halves = positions[:middle], positions[middle:]
        self._insert_children(connection, key, number, family, halves)
        return True

    def split_unsendable(self, connection: Connection, key: str, number: int) -> None:
        """Give the recipients that can be sent to one child, the others to a second one (or see
        that it was done). No limit on parts applies: neither child is split in this way again."""
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
        `routes`. The children get the state and the due time that the delivery has now."""
        names = list(routes)
        if len(names) == 1:
            self._queries.run(connection, "set_route", id=key, number=number, route=names[0])
            return
        first = self._family(connection, key, number).first_child
        middle = (len(names) + 1) // 2
        for child, part in ((first, names[:middle]), (first + 1, names[middle:])):
            positions = [position for name in part for position in routes[name]]
            self._queries.run(
                connection,
                "insert_divided_child",
                id=key,
                number=number,
                child=child,
                route=part[0],
                positions=json.dumps(positions),
            )
            if len(part) > 1:
                self.divide(connection, key, child, {name: routes[name] for name in part})
        self._queries.run(connection, "mark_divided", id=key, number=number)

    def mark_parts_delivered(self, connection: Connection, key: str, number: int) -> None:
        """A late K for a delivery: the parts that it was split into are delivered with it."""
        self._queries.run(connection, "deliver_descendants", id=key, number=number)

    def recipients(self, connection: Connection, key: str, number: int) -> dict[int, str]:
        """The recipients of a delivery: the address by position, in order."""
        return dict(self._queries.run(connection, "recipients", id=key, number=number).all())

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
        for child, part in enumerate(parts, family.first_child):
            parameters = {"id": key, "number": number, "positions": json.dumps(part)}
            self._queries.run(connection, "insert_child", child=child, **parameters)

    def _both_rejected(self, connection: Connection, key: str, number: int, reply: str) -> bool:
        """Whether the other first half was rejected with the same text; then its remaining
        parts bounce as well."""
        parameters = {"id": key, "number": number, "reply": reply}
        sibling = self._queries.run(connection, "sibling_rejected_alike", **parameters).scalar()
        if sibling is not None:
            self._queries.run(connection, "bounce_descendants", **parameters | {"number": sibling})
        return sibling is not None
