"""The schema: constants of the tables, and the views.

`messages` and `recipients` are insert-only. `deliveries` is the queue: a row is one QMQP request,
hot and narrow. `attempts` are kept as long as their message. `due_at` is when a delivery must be
handled again, and changes together with the state. Each state that is searched has a partial index
of its own (`migrations/tables.py`), so that no search walks through the rows of another state.

What must stay true: no foreign keys on the hot tables, because they cost half as much again as the
writes themselves; `fsck` finds what they would refuse. Ids are UUIDv7 (`uuid` on PostgreSQL, dashed
text on SQLite). Times are `timestamptz`, on SQLite whole microseconds since 1970.
"""

from enum import StrEnum

from relay.queue.states import FINAL as FINAL
from relay.queue.states import UNFINISHED as UNFINISHED
from relay.queue.states import Outcome as Outcome
from relay.queue.states import State as State


def words(values: tuple[str, ...] | type[StrEnum]) -> str:
    """The values as an SQL list of literals."""
    return ", ".join(f"'{value}'" for value in values)


NEEDS_BODY = f"(state IN ({words(UNFINISHED)}) OR due_at IS NOT NULL)"
REVISION = "0003"  # the newest migration
# The `due_at` of a delivery (as d) that fails now: at once if a DSN is pending, or if it was a DSN,
# which may be generated again with less. `:notices`: BOUNCES is not off.
DSN_PENDING = """CASE WHEN :notices AND (SELECT m.sender NOT IN ('', '#@[]') OR m.dsn_content IS NOT NULL
    FROM messages m
    WHERE m.id = d.queue_id) THEN @now END"""
LONGEST_INDEXED = 1000
LONGEST_TEXT = 4000

_RECIPIENT_VIEW = """
SELECT @hex(d.queue_id) AS queue_id, d.queue_id AS queue_uuid, r.position, d.number AS delivery, d.state, m.sender,
       r.address AS recipient, m.size, d.route, d.claim_count AS attempts, d.last_outcome, d.last_reply AS reason,
       d.last_server AS server, @when(m.received_at) AS received_at,
       @when(CASE WHEN d.state IN ('queued', 'deferred') THEN d.due_at END) AS next_at,
       @when(d.expires_at) AS expires_at, @when(d.finished_at) AS finished_at, d.worker, d.pending_operation,
       m.client_address, m.helo, m.protocol, m.header_message_id, @hex(m.dsn_of) AS dsn_of
FROM deliveries d
JOIN recipients r ON r.queue_id = d.queue_id AND r.delivery = d.number
JOIN messages m ON m.id = d.queue_id
"""

# Views are the public face for people with an SQL prompt: names and columns are stable
# (docs/inspect.md).
VIEWS = {
    "mail_queue": f"{_RECIPIENT_VIEW}WHERE d.state IN ({words(UNFINISHED)})",
    "mail_history": _RECIPIENT_VIEW,
    # Two halves: what is finished is only counted, or a long history would be looked up message by
    # message.
    "queue_summary": f"""
SELECT d.state, d.route, count(*) AS deliveries, CAST(sum(m.size) AS bigint) AS bytes,
       @when(min(m.received_at)) AS oldest_at, @since(min(m.received_at)) AS oldest_seconds,
       sum(CASE WHEN d.state <> 'held' AND d.due_at < @now THEN 1 ELSE 0 END) AS overdue
FROM deliveries d JOIN messages m ON m.id = d.queue_id
WHERE d.state IN ({words(UNFINISHED)}) GROUP BY d.state, d.route
UNION ALL
SELECT state, route, count(*), NULL, NULL, NULL, 0 FROM deliveries
WHERE state NOT IN ({words(UNFINISHED)}) GROUP BY state, route
""",
    "server_health": """
SELECT server, count(outcome) AS attempts, sum(CASE WHEN outcome = 'delivered' THEN 1 ELSE 0 END) AS delivered,
       sum(CASE WHEN outcome = 'deferred' THEN 1 ELSE 0 END) AS deferred,
       sum(CASE WHEN outcome = 'rejected' THEN 1 ELSE 0 END) AS rejected,
       sum(CASE WHEN outcome = 'unreachable' THEN 1 ELSE 0 END) AS unreachable,
       sum(CASE WHEN outcome IN ('uncertain', 'malformed') THEN 1 ELSE 0 END) AS uncertain,
       sum(CASE WHEN outcome = 'interrupted' THEN 1 ELSE 0 END) AS interrupted,
       coalesce(sum(bytes_sent), 0) AS bytes_sent, @when(max(finished_at)) AS last_at,
       count(why) AS circuit_open_workers, max(why) AS circuit_open_reason, @when(max(since)) AS paused_at
FROM (SELECT server, outcome, bytes_sent, finished_at, CASE WHEN 1 = 0 THEN reply END AS why,
             CASE WHEN 1 = 0 THEN finished_at END AS since
      FROM attempts WHERE finished_at > @ago(3600) AND server IS NOT NULL
      UNION ALL SELECT r.server, NULL, NULL, NULL, r.why, NULL
      FROM open_circuits r JOIN workers w ON w.id = r.worker WHERE w.ended_at IS NULL
      UNION ALL SELECT substr(subject, 8), NULL, NULL, NULL, NULL, since
      FROM pauses WHERE substr(subject, 1, 7) = 'server:') s
GROUP BY server
""",
}
