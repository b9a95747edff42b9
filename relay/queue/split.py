"""Bisection: finding the recipient because of which a server refused a whole message.

QMQP has one reply for all recipients. A D accepted nothing, so sending the halves again is safe: the
delivery becomes `split`, and two children on the same body get half of its recipients each, until
the bad recipient is alone and bounces. That is worth trying while the refusal is about an address
(RFC 3463 x.1.y): if both first halves are refused with the same text, or a message has LARGEST
pieces, everything bounces. x.5.3 (too many recipients) is cut until the server takes the pieces.
`part` separates recipients that no QMQP request can carry; `divide` follows changed routes.

What must stay true: parent, children and recipients change in the transaction that records the D or
has locked the parent; the children have the recipients of the parent, each once. Numbers of
children depend on the parent alone. It never waits for a lock: relatives that another transaction
has locked are skipped, or the whole batch runs again.
"""

import json
import re
from collections.abc import Mapping

from sqlalchemy import Connection

from qmqp.request import is_sendable
from relay.db.schema import DSN_PENDING
from relay.db.sql import Statements

LARGEST = 64
TOO_MANY_RECIPIENTS = re.compile(r"(?<![\w.])[45]\.5\.3(?!\.?\w)")  # RFC 3463 x.5.3

_FAMILY = """SELECT d.parent, (SELECT count(*) FROM deliveries o WHERE o.queue_id = d.queue_id) AS pieces,
        (SELECT count(*) FROM deliveries o WHERE o.queue_id = d.queue_id AND o.parent IS NULL) AS roots,
        (SELECT p.parent FROM deliveries p WHERE p.queue_id = d.queue_id AND p.number = d.parent) AS grandparent
    FROM deliveries d WHERE d.queue_id = @id(:id) AND d.number = :number"""
_SIBLING = """SELECT number FROM deliveries WHERE queue_id = @id(:id) AND parent = :parent AND number <> :number
    AND route = (SELECT o.route FROM deliveries o WHERE o.queue_id = @id(:id) AND o.number = :number)
    AND state IN ('split', 'bounced') AND last_outcome = 'rejected' AND reason_source = 'server' AND last_reply = :reply"""
_DESCENDANTS = """WITH RECURSIVE line(number) AS (
        SELECT number FROM deliveries WHERE queue_id = @id(:id) AND parent = :root
        UNION SELECT d.number FROM deliveries d JOIN line ON d.parent = line.number WHERE d.queue_id = @id(:id))
    SELECT number FROM line"""
_CHILDREN = """-- event: child inserted
    INSERT INTO deliveries (queue_id, number, parent, route, state, due_at, expires_at)
    SELECT queue_id, :child, number, route, 'queued', @now, expires_at FROM deliveries
    WHERE queue_id = @id(:id) AND number = :number"""
_ASSIGN = """UPDATE recipients SET delivery = :child WHERE queue_id = @id(:id) AND delivery = :number
    AND position <= :until"""
_ADDRESSES = """SELECT position, address FROM recipients WHERE queue_id = @id(:id) AND delivery = :number
    ORDER BY position"""
_DIVIDED_CHILD = """-- event: divided by route
    INSERT INTO deliveries (queue_id, number, parent, route, state, due_at, expires_at, crash_count,
        last_outcome, last_reply, reason_source, last_server)
    SELECT queue_id, :child, number, :route, state, due_at, expires_at, crash_count,
        last_outcome, last_reply, reason_source, last_server
    FROM deliveries WHERE queue_id = @id(:id) AND number = :number"""
_COPY_AUDIT = """INSERT INTO audit_deliveries (queue_id, delivery, action) SELECT queue_id, :child, action FROM audit_deliveries
    WHERE queue_id = @id(:id) AND delivery = :number ON CONFLICT DO NOTHING"""
_ASSIGN_POSITIONS = """UPDATE recipients SET delivery = :child WHERE queue_id = @id(:id)
    AND position IN (SELECT position FROM @rows(:positions; position int))"""
_SPLIT = """-- event: divided by route
    UPDATE deliveries SET state = 'split', due_at = NULL, claim_count = claim_count + 1
    WHERE queue_id = @id(:id) AND number = :number"""
_LATE_K = """-- event: late K
    UPDATE deliveries SET state = 'delivered', due_at = NULL, finished_at = @now, worker = NULL, pending_operation = NULL,
    pending_reason = NULL WHERE queue_id = @id(:id)"""
_REFUSED = f"""-- event: sibling refused
    UPDATE deliveries AS d SET state = 'bounced', finished_at = @now, last_outcome = 'rejected',
    last_reply = :reply, reason_source = 'server', due_at = {DSN_PENDING} WHERE queue_id = @id(:id)"""


def can_carry(address: str) -> bool:
    """Whether a QMQP request can carry this address, as `Request` judges it. What has no bytes in
    latin-1 has none."""
    try:
        return is_sendable(address.encode("latin-1"))
    except UnicodeEncodeError:
        return False


class Splitter:
    """Cuts deliveries, in the transaction of the caller, which has locked them."""

    def __init__(self, sql: Statements) -> None:
        self._sql = sql

    def cut(self, connection: Connection, key: str, number: int, reply: str) -> bool:
        """Give the recipients of a delivery to two children (or see that it was done); False if it
        must bounce whole.

        `key` is the message's id as the database spells it. The caller has locked the delivery and
        sets its state.
        """
        positions = self._positions(connection, key, number)
        if not positions:
            return True
        parent, pieces, roots, grandparent = self._sql.run(
            connection, _FAMILY, id=key, number=number
        ).one()
        if not TOO_MANY_RECIPIENTS.search(reply):
            first_half = parent is not None and grandparent is None
            if first_half and self._both_refused(connection, key, number, parent, reply):
                return False
            if pieces + 2 > LARGEST:
                return False
        if len(positions) == 1:
            return False
        middle = positions[(len(positions) - 1) // 2]
        first = _first_child(roots, number)
        for child, until in ((first, middle), (first + 1, positions[-1])):
            self._sql.run(connection, _CHILDREN, id=key, number=number, child=child)
            self._sql.run(connection, _ASSIGN, id=key, number=number, child=child, until=until)
        return True

    def part(self, connection: Connection, key: str, number: int) -> None:
        """Give the recipients that can be sent to one child, the others to a second one (or see
        that it was done).

        No limit on pieces applies: neither child is ever parted again. The caller has locked the
        delivery.
        """
        parts: dict[bool, list[int]] = {True: [], False: []}
        for position, address in self._sql.run(connection, _ADDRESSES, id=key, number=number).all():
            parts[can_carry(address)].append(position)
        if not any(parts.values()):
            return
        first = _first_child(
            self._sql.run(connection, _FAMILY, id=key, number=number).one()[2], number
        )
        for child, positions in enumerate(parts.values(), first):
            self._sql.run(connection, _CHILDREN, id=key, number=number, child=child)
            listed = json.dumps([{"position": position} for position in positions])
            self._sql.run(connection, _ASSIGN_POSITIONS, id=key, child=child, positions=listed)

    def divide(
        self, connection: Connection, key: str, number: int, routes: Mapping[str, list[int]]
    ) -> None:
        """Give the recipients of a delivery that waits, by position, the routes that they have in
        `routes`.

        The caller has locked the delivery. What becomes of it is due when it was.
        """
        if len(routes) == 1:
            sql = "UPDATE deliveries SET route = :route WHERE queue_id = @id(:id) AND number = :number"
            self._sql.run(connection, sql, id=key, number=number, route=next(iter(routes)))
            return
        roots = self._sql.run(connection, _FAMILY, id=key, number=number).one()[2]
        route_names, middle, first = (
            list(routes),
            (len(routes) + 1) // 2,
            _first_child(roots, number),
        )
        for child, part in ((first, route_names[:middle]), (first + 1, route_names[middle:])):
            self._sql.run(
                connection, _DIVIDED_CHILD, id=key, number=number, child=child, route=part[0]
            )
            self._sql.run(connection, _COPY_AUDIT, id=key, number=number, child=child)
            if len(part) > 1:
                self.divide(connection, key, child, {name: routes[name] for name in part})
            else:
                positions = json.dumps([{"position": position} for position in routes[part[0]]])
                self._sql.run(
                    connection, _ASSIGN_POSITIONS, id=key, child=child, positions=positions
                )
        self._sql.run(connection, _SPLIT, id=key, number=number)

    def taken(self, connection: Connection, key: str, number: int) -> None:
        """A late K for a delivery: what it was cut into is delivered with it."""
        descendants = self._descendants(
            connection, key, number, "state NOT IN ('delivered', 'split')", "NOWAIT"
        )
        self._change(connection, _LATE_K, descendants, id=key)

    def _positions(self, connection: Connection, key: str, number: int) -> list[int]:
        sql = "SELECT position FROM recipients WHERE queue_id = @id(:id) AND delivery = :number ORDER BY position"
        return [row[0] for row in self._sql.run(connection, sql, id=key, number=number)]

    def _both_refused(
        self, connection: Connection, key: str, number: int, parent: int, reply: str
    ) -> bool:
        """Whether the other first half was refused with the same text; then what is left of it
        bounces as well."""
        sibling = self._sql.run(
            connection, _SIBLING, id=key, parent=parent, number=number, reply=reply
        ).scalar()
        if sibling is None:
            return False
        # A worker that has locked one of them sends it, or has sent it: that costs one send.
        descendants = self._descendants(
            connection, key, sibling, "state IN ('queued', 'deferred')", "SKIP LOCKED"
        )
        self._change(connection, _REFUSED, descendants, id=key, reply=reply)
        return True

    def _descendants(
        self, connection: Connection, key: str, root: int, which: str, if_locked: str
    ) -> list[int]:
        """Lock what a delivery was cut into; its numbers. `if_locked`: what PostgreSQL does
        when another transaction has locked one."""
        lock = f"FOR UPDATE {if_locked}" if self._sql.postgresql else ""
        sql = f"""SELECT number FROM deliveries WHERE queue_id = @id(:id) AND {which} AND number IN ({_DESCENDANTS})
            ORDER BY number {lock}"""
        return [row[0] for row in self._sql.run(connection, sql, id=key, root=root)]

    def _change(
        self, connection: Connection, sql: str, numbers: list[int], **parameters: str
    ) -> None:
        if numbers:
            listed = ", ".join(str(int(number)) for number in numbers)
            self._sql.run(connection, f"{sql} AND number IN ({listed})", **parameters)


def _first_child(roots: int, number: int) -> int:
    """As in a heap: no two deliveries of a message have a child of the same number."""
    return roots + 2 * number - 1
