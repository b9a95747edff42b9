"""Faster views, tables for what workers and operators do, and on PostgreSQL a role that only reads.

New tables: `rests` (servers that workers do not use for now) and `touched` (the deliveries that a
command changed). The views begin with `deliveries`, the table that most questions are about, so
SQLite too finds a page of them in order without sorting. `queue_summary` only counts finished
deliveries, in an index of their own.

A role belongs to the cluster and not to the database: the migration of another relay, or an
administrator, may have created it already, and it stays when this schema is dropped. If the user
that migrates may not create roles, the migration goes on without; the role can be created later
(docs/inspect.md has the statements).
"""

import importlib

import sqlalchemy
from alembic import op

from relay.log import first_line, get_logger

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

log = get_logger(__name__)
ROLE = "qmqp_relay_reader"
READABLE = """mail_queue, mail_history, queue_summary, server_health, actions, attempts, deliveries,
    messages, pauses, recipients, rests, spool, touched, workers, alembic_version"""
RESTS = """CREATE TABLE rests (
    worker {id} NOT NULL,
    server TEXT NOT NULL,
    why TEXT NOT NULL,
    CONSTRAINT rests_key PRIMARY KEY (worker, server)
)"""
TOUCHED = """CREATE TABLE touched (
    message_id {id} NOT NULL,
    delivery INTEGER NOT NULL,
    action {id} NOT NULL,
    CONSTRAINT touched_key PRIMARY KEY (message_id, delivery, action)
)"""
ADDED = (
    "deliveries ADD COLUMN wanted_why TEXT",
    "workers ADD COLUMN claim_seconds INTEGER",
    "workers ADD COLUMN routes TEXT",
    "deliveries ADD COLUMN warned_at {instant}",
)
POSTGRESQL = {
    "mail_queue": """SELECT replace(CAST(d.message_id AS text), '-', '') AS queue_id, d.message_id,
       r.position, d.number AS delivery, d.state, m.sender,
       r.address AS recipient, m.size, d.route, d.claims AS attempts, d.last_outcome,
           d.last_reply AS reason,
       d.last_server AS server, m.received_at AS received_at,
       CASE WHEN d.state IN ('queued', 'deferred') THEN d.due_at END AS next_at,
       d.expires_at AS expires_at, d.finished_at AS finished_at, d.worker, d.wanted,
       m.client_address, m.helo, m.protocol, m.header_message_id,
           replace(CAST(m.notice_of AS text), '-', '') AS notice_of
FROM deliveries d
JOIN recipients r ON r.message_id = d.message_id AND r.delivery = d.number
JOIN messages m ON m.id = d.message_id
WHERE d.state IN ('queued', 'sending', 'deferred', 'held')""",
    "mail_history": """SELECT replace(CAST(d.message_id AS text), '-', '') AS queue_id,
       d.message_id, r.position, d.number AS delivery, d.state, m.sender,
       r.address AS recipient, m.size, d.route, d.claims AS attempts, d.last_outcome,
           d.last_reply AS reason,
       d.last_server AS server, m.received_at AS received_at,
       CASE WHEN d.state IN ('queued', 'deferred') THEN d.due_at END AS next_at,
       d.expires_at AS expires_at, d.finished_at AS finished_at, d.worker, d.wanted,
       m.client_address, m.helo, m.protocol, m.header_message_id,
           replace(CAST(m.notice_of AS text), '-', '') AS notice_of
FROM deliveries d
JOIN recipients r ON r.message_id = d.message_id AND r.delivery = d.number
JOIN messages m ON m.id = d.message_id""",
    "queue_summary": """SELECT d.state, d.route, count(*) AS deliveries,
       CAST(sum(m.size) AS bigint) AS bytes,
       min(m.received_at) AS oldest_at, CAST(extract(epoch FROM now() - min(m.received_at)) AS
           float8) AS oldest_seconds,
       sum(CASE WHEN d.state <> 'held' AND d.due_at < now() THEN 1 ELSE 0 END) AS overdue
FROM deliveries d JOIN messages m ON m.id = d.message_id
WHERE d.state IN ('queued', 'sending', 'deferred', 'held') GROUP BY d.state, d.route
UNION ALL
SELECT state, route, count(*), NULL, NULL, NULL, 0 FROM deliveries
WHERE state NOT IN ('queued', 'sending', 'deferred', 'held') GROUP BY state, route""",
    "server_health": """SELECT server, count(outcome) AS attempts,
       sum(CASE WHEN outcome = 'accepted' THEN 1 ELSE 0 END) AS accepted,
       sum(CASE WHEN outcome = 'deferred' THEN 1 ELSE 0 END) AS deferred,
       sum(CASE WHEN outcome = 'rejected' THEN 1 ELSE 0 END) AS rejected,
       sum(CASE WHEN outcome = 'unreachable' THEN 1 ELSE 0 END) AS unreachable,
       sum(CASE WHEN outcome IN ('uncertain', 'malformed') THEN 1 ELSE 0 END) AS uncertain,
       sum(CASE WHEN outcome = 'interrupted' THEN 1 ELSE 0 END) AS interrupted,
       coalesce(sum(bytes_sent), 0) AS bytes_sent, max(finished_at) AS last_at,
       count(why) AS left_alone_by, max(why) AS left_alone_why, max(since) AS paused_at
FROM (SELECT server, outcome, bytes_sent, finished_at, CASE WHEN 1 = 0 THEN reply END AS why,
             CASE WHEN 1 = 0 THEN finished_at END AS since
      FROM attempts WHERE finished_at > (now() - (3600) * interval '1 second') AND server IS NOT
          NULL
      UNION ALL SELECT r.server, NULL, NULL, NULL, r.why, NULL
      FROM rests r JOIN workers w ON w.id = r.worker WHERE w.ended_at IS NULL
      UNION ALL SELECT substr(subject, 8), NULL, NULL, NULL, NULL, since
      FROM pauses WHERE substr(subject, 1, 7) = 'server:') s
GROUP BY server""",
}
SQLITE = {
    "mail_queue": """SELECT replace(d.message_id, '-', '') AS queue_id, d.message_id, r.position,
       d.number AS delivery, d.state, m.sender,
       r.address AS recipient, m.size, d.route, d.claims AS attempts, d.last_outcome,
           d.last_reply AS reason,
       d.last_server AS server, datetime((m.received_at) / 1000000, 'unixepoch') || '.' ||
           substr((m.received_at) / 1000, -3) AS received_at,
       datetime((CASE WHEN d.state IN ('queued', 'deferred') THEN d.due_at END) / 1000000,
           'unixepoch') || '.' || substr((CASE WHEN d.state IN ('queued', 'deferred') THEN d.due_at
           END) / 1000, -3) AS next_at,
       datetime((d.expires_at) / 1000000, 'unixepoch') || '.' || substr((d.expires_at) / 1000, -3)
           AS expires_at, datetime((d.finished_at) / 1000000, 'unixepoch') || '.' ||
           substr((d.finished_at) / 1000, -3) AS finished_at, d.worker, d.wanted,
       m.client_address, m.helo, m.protocol, m.header_message_id,
           replace(m.notice_of, '-', '') AS notice_of
FROM deliveries d
JOIN recipients r ON r.message_id = d.message_id AND r.delivery = d.number
JOIN messages m ON m.id = d.message_id
WHERE d.state IN ('queued', 'sending', 'deferred', 'held')""",
    "mail_history": """SELECT replace(d.message_id, '-', '') AS queue_id, d.message_id, r.position,
       d.number AS delivery, d.state, m.sender,
       r.address AS recipient, m.size, d.route, d.claims AS attempts, d.last_outcome,
           d.last_reply AS reason,
       d.last_server AS server, datetime((m.received_at) / 1000000, 'unixepoch') || '.' ||
           substr((m.received_at) / 1000, -3) AS received_at,
       datetime((CASE WHEN d.state IN ('queued', 'deferred') THEN d.due_at END) / 1000000,
           'unixepoch') || '.' || substr((CASE WHEN d.state IN ('queued', 'deferred') THEN d.due_at
           END) / 1000, -3) AS next_at,
       datetime((d.expires_at) / 1000000, 'unixepoch') || '.' || substr((d.expires_at) / 1000, -3)
           AS expires_at, datetime((d.finished_at) / 1000000, 'unixepoch') || '.' ||
           substr((d.finished_at) / 1000, -3) AS finished_at, d.worker, d.wanted,
       m.client_address, m.helo, m.protocol, m.header_message_id,
           replace(m.notice_of, '-', '') AS notice_of
FROM deliveries d
JOIN recipients r ON r.message_id = d.message_id AND r.delivery = d.number
JOIN messages m ON m.id = d.message_id""",
    "queue_summary": """SELECT d.state, d.route, count(*) AS deliveries,
       CAST(sum(m.size) AS bigint) AS bytes,
       datetime((min(m.received_at)) / 1000000, 'unixepoch') || '.' || substr((min(m.received_at)) /
           1000, -3) AS oldest_at, (((CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS
           INTEGER) * 1000) - (min(m.received_at))) / 1000000.0) AS oldest_seconds,
       sum(CASE WHEN d.state <> 'held' AND d.due_at < (CAST(round((julianday('now') - 2440587.5) *
           86400000.0) AS INTEGER) * 1000) THEN 1 ELSE 0 END) AS overdue
FROM deliveries d JOIN messages m ON m.id = d.message_id
WHERE d.state IN ('queued', 'sending', 'deferred', 'held') GROUP BY d.state, d.route
UNION ALL
SELECT state, route, count(*), NULL, NULL, NULL, 0 FROM deliveries
WHERE state NOT IN ('queued', 'sending', 'deferred', 'held') GROUP BY state, route""",
    "server_health": """SELECT server, count(outcome) AS attempts,
       sum(CASE WHEN outcome = 'accepted' THEN 1 ELSE 0 END) AS accepted,
       sum(CASE WHEN outcome = 'deferred' THEN 1 ELSE 0 END) AS deferred,
       sum(CASE WHEN outcome = 'rejected' THEN 1 ELSE 0 END) AS rejected,
       sum(CASE WHEN outcome = 'unreachable' THEN 1 ELSE 0 END) AS unreachable,
       sum(CASE WHEN outcome IN ('uncertain', 'malformed') THEN 1 ELSE 0 END) AS uncertain,
       sum(CASE WHEN outcome = 'interrupted' THEN 1 ELSE 0 END) AS interrupted,
       coalesce(sum(bytes_sent), 0) AS bytes_sent,
           datetime((max(finished_at)) / 1000000, 'unixepoch') || '.' || substr((max(finished_at)) /
           1000, -3) AS last_at,
       count(why) AS left_alone_by, max(why) AS left_alone_why,
           datetime((max(since)) / 1000000, 'unixepoch') || '.' || substr((max(since)) / 1000, -3)
           AS paused_at
FROM (SELECT server, outcome, bytes_sent, finished_at, CASE WHEN 1 = 0 THEN reply END AS why,
             CASE WHEN 1 = 0 THEN finished_at END AS since
      FROM attempts WHERE finished_at > ((CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS
          INTEGER) * 1000) - CAST((3600) * 1000000 AS INTEGER)) AND server IS NOT NULL
      UNION ALL SELECT r.server, NULL, NULL, NULL, r.why, NULL
      FROM rests r JOIN workers w ON w.id = r.worker WHERE w.ended_at IS NULL
      UNION ALL SELECT substr(subject, 8), NULL, NULL, NULL, NULL, since
      FROM pauses WHERE substr(subject, 1, 7) = 'server:') s
GROUP BY server""",
}


def upgrade() -> None:
    """Create tables, columns, views, indexes and the role."""
    connection = op.get_bind()
    postgresql = connection.dialect.name == "postgresql"
    for table in (RESTS, TOUCHED):
        connection.exec_driver_sql(table.format(id="UUID" if postgresql else "TEXT"))
    for change in ADDED:
        connection.exec_driver_sql(
            f"ALTER TABLE {change.format(instant='TIMESTAMPTZ' if postgresql else 'BIGINT')}"
        )
    create_views(connection)
    connection.exec_driver_sql(
        "CREATE INDEX deliveries_held ON deliveries (message_id) WHERE state = 'held'"
    )
    finished = "state NOT IN ('queued', 'sending', 'deferred', 'held')"
    connection.exec_driver_sql(
        f"CREATE INDEX deliveries_finished ON deliveries (state, route) WHERE {finished}"
    )
    if postgresql:
        _replace_indexes(connection, " text_pattern_ops")
    if postgresql and _role_is_there(connection):
        connection.exec_driver_sql(f"GRANT SELECT ON {READABLE} TO {ROLE}")


def downgrade() -> None:
    """Undo the upgrade. The role stays, because other databases may use it."""
    connection = op.get_bind()
    postgresql = connection.dialect.name == "postgresql"
    if postgresql and _role_exists(connection):
        connection.exec_driver_sql(f"REVOKE ALL ON {READABLE} FROM {ROLE}")
    for index in ("deliveries_finished", "deliveries_held"):
        connection.exec_driver_sql(f"DROP INDEX {index}")
    if postgresql:
        _replace_indexes(connection, "")
    first = importlib.import_module("migrations.versions.0001_first")
    made = [
        statement.split(maxsplit=4)
        for statement in (first.POSTGRESQL if postgresql else first.SQLITE)
    ]
    _replace_views(connection, {words[2]: words[4] for words in made if words[1] == "VIEW"})
    for change in reversed(ADDED):
        connection.exec_driver_sql(
            "ALTER TABLE " + change.replace("ADD", "DROP").rpartition(" ")[0]
        )
    for table in ("touched", "rests"):
        connection.exec_driver_sql(f"DROP TABLE {table}")


def create_views(connection: sqlalchemy.Connection) -> None:
    """Replace the views by those of this revision."""
    postgresql = connection.dialect.name == "postgresql"
    _replace_views(connection, POSTGRESQL if postgresql else SQLITE)
    if postgresql and _role_exists(connection):
        connection.exec_driver_sql(f"GRANT SELECT ON {', '.join(POSTGRESQL)} TO {ROLE}")


def _replace_views(connection: sqlalchemy.Connection, views: dict[str, str]) -> None:
    for name, select in views.items():
        connection.exec_driver_sql(f"DROP VIEW IF EXISTS {name}")
        connection.exec_driver_sql(f"CREATE VIEW {name} AS {select}")


def _replace_indexes(connection: sqlalchemy.Connection, order: str) -> None:
    """Indexes of addresses in this `order`. By bytes, in any language of the database, the
    spellings of an address are neighbours, and a search for an equal address needs no other
    order."""
    for table, column in (("messages", "sender"), ("recipients", "address")):
        connection.exec_driver_sql(f"DROP INDEX {table}_{column}")
        connection.exec_driver_sql(f"CREATE INDEX {table}_{column} ON {table} ({column}{order})")


def _role_exists(connection: sqlalchemy.Connection) -> bool:
    return (
        connection.exec_driver_sql(f"SELECT 1 FROM pg_roles WHERE rolname = '{ROLE}'").first()
        is not None
    )


def _role_is_there(connection: sqlalchemy.Connection) -> bool:
    """Make the role if that is allowed."""
    try:
        with connection.begin_nested():
            if not _role_exists(connection):
                connection.exec_driver_sql(f"CREATE ROLE {ROLE} NOLOGIN")
    except sqlalchemy.exc.DBAPIError as error:
        if not _role_exists(connection):  # else the migration of another database was quicker
            log.warning("no read-only role", role=ROLE, reason=first_line(error.orig))
            return False
    return True
