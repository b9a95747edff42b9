"""What people look at: quicker views, which servers rest (`rests`), which deliveries an operator's action touched
(`touched`), what workers know; on PostgreSQL comments and a role that only reads.

The views begin with `deliveries`, the table that most questions are about, so that SQLite too finds a page of them in
order without sorting; `queue_summary` only counts what is finished, in an index of its own.

Roles belong to the cluster and not to the database: another relay's migration, or an administrator, may have made ours
already, and it stays when this schema goes. Who migrates may not be allowed to make roles. Then nothing fails: the role
can be made by hand later (docs/inspect.md has the statements).
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
READABLE = """mail_queue, mail_history, queue_summary, server_health, actions, attempts, deliveries, messages, pauses,
    recipients, rests, spool, touched, workers, alembic_version"""
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
ADDED = ("deliveries ADD COLUMN wanted_why TEXT", "workers ADD COLUMN claim_seconds INTEGER",
         "workers ADD COLUMN routes TEXT", "deliveries ADD COLUMN warned_at {instant}")  # fmt: skip
POSTGRESQL = {
    "mail_queue": """SELECT replace(CAST(d.message_id AS text), '-', '') AS queue_id, d.message_id, r.position, d.number AS delivery, d.state, m.sender,
       r.address AS recipient, m.size, d.route, d.claims AS attempts, d.last_outcome, d.last_reply AS reason,
       d.last_server AS server, m.received_at AS received_at,
       CASE WHEN d.state IN ('queued', 'deferred') THEN d.due_at END AS next_at,
       d.expires_at AS expires_at, d.finished_at AS finished_at, d.worker, d.wanted,
       m.client_address, m.helo, m.protocol, m.header_message_id, replace(CAST(m.notice_of AS text), '-', '') AS notice_of
FROM deliveries d
JOIN recipients r ON r.message_id = d.message_id AND r.delivery = d.number
JOIN messages m ON m.id = d.message_id
WHERE d.state IN ('queued', 'sending', 'deferred', 'held')""",
    "mail_history": """SELECT replace(CAST(d.message_id AS text), '-', '') AS queue_id, d.message_id, r.position, d.number AS delivery, d.state, m.sender,
       r.address AS recipient, m.size, d.route, d.claims AS attempts, d.last_outcome, d.last_reply AS reason,
       d.last_server AS server, m.received_at AS received_at,
       CASE WHEN d.state IN ('queued', 'deferred') THEN d.due_at END AS next_at,
       d.expires_at AS expires_at, d.finished_at AS finished_at, d.worker, d.wanted,
       m.client_address, m.helo, m.protocol, m.header_message_id, replace(CAST(m.notice_of AS text), '-', '') AS notice_of
FROM deliveries d
JOIN recipients r ON r.message_id = d.message_id AND r.delivery = d.number
JOIN messages m ON m.id = d.message_id""",
    "queue_summary": """SELECT d.state, d.route, count(*) AS deliveries, CAST(sum(m.size) AS bigint) AS bytes,
       min(m.received_at) AS oldest_at, CAST(extract(epoch FROM now() - min(m.received_at)) AS float8) AS oldest_seconds,
       sum(CASE WHEN d.state <> 'held' AND d.due_at < now() THEN 1 ELSE 0 END) AS overdue
FROM deliveries d JOIN messages m ON m.id = d.message_id
WHERE d.state IN ('queued', 'sending', 'deferred', 'held') GROUP BY d.state, d.route
UNION ALL
SELECT state, route, count(*), NULL, NULL, NULL, 0 FROM deliveries
WHERE state NOT IN ('queued', 'sending', 'deferred', 'held') GROUP BY state, route""",
    "server_health": """SELECT server, count(outcome) AS attempts, sum(CASE WHEN outcome = 'accepted' THEN 1 ELSE 0 END) AS accepted,
       sum(CASE WHEN outcome = 'deferred' THEN 1 ELSE 0 END) AS deferred,
       sum(CASE WHEN outcome = 'rejected' THEN 1 ELSE 0 END) AS rejected,
       sum(CASE WHEN outcome = 'unreachable' THEN 1 ELSE 0 END) AS unreachable,
       sum(CASE WHEN outcome IN ('uncertain', 'malformed') THEN 1 ELSE 0 END) AS uncertain,
       sum(CASE WHEN outcome = 'interrupted' THEN 1 ELSE 0 END) AS interrupted,
       coalesce(sum(bytes_sent), 0) AS bytes_sent, max(finished_at) AS last_at,
       count(why) AS left_alone_by, max(why) AS left_alone_why, max(since) AS paused_at
FROM (SELECT server, outcome, bytes_sent, finished_at, CASE WHEN 1 = 0 THEN reply END AS why,
             CASE WHEN 1 = 0 THEN finished_at END AS since
      FROM attempts WHERE finished_at > (now() - (3600) * interval '1 second') AND server IS NOT NULL
      UNION ALL SELECT r.server, NULL, NULL, NULL, r.why, NULL
      FROM rests r JOIN workers w ON w.id = r.worker WHERE w.ended_at IS NULL
      UNION ALL SELECT substr(subject, 8), NULL, NULL, NULL, NULL, since
      FROM pauses WHERE substr(subject, 1, 7) = 'server:') s
GROUP BY server""",
}
SQLITE = {
    "mail_queue": """SELECT replace(d.message_id, '-', '') AS queue_id, d.message_id, r.position, d.number AS delivery, d.state, m.sender,
       r.address AS recipient, m.size, d.route, d.claims AS attempts, d.last_outcome, d.last_reply AS reason,
       d.last_server AS server, datetime((m.received_at) / 1000000, 'unixepoch') || '.' || substr((m.received_at) / 1000, -3) AS received_at,
       datetime((CASE WHEN d.state IN ('queued', 'deferred') THEN d.due_at END) / 1000000, 'unixepoch') || '.' || substr((CASE WHEN d.state IN ('queued', 'deferred') THEN d.due_at END) / 1000, -3) AS next_at,
       datetime((d.expires_at) / 1000000, 'unixepoch') || '.' || substr((d.expires_at) / 1000, -3) AS expires_at, datetime((d.finished_at) / 1000000, 'unixepoch') || '.' || substr((d.finished_at) / 1000, -3) AS finished_at, d.worker, d.wanted,
       m.client_address, m.helo, m.protocol, m.header_message_id, replace(m.notice_of, '-', '') AS notice_of
FROM deliveries d
JOIN recipients r ON r.message_id = d.message_id AND r.delivery = d.number
JOIN messages m ON m.id = d.message_id
WHERE d.state IN ('queued', 'sending', 'deferred', 'held')""",
    "mail_history": """SELECT replace(d.message_id, '-', '') AS queue_id, d.message_id, r.position, d.number AS delivery, d.state, m.sender,
       r.address AS recipient, m.size, d.route, d.claims AS attempts, d.last_outcome, d.last_reply AS reason,
       d.last_server AS server, datetime((m.received_at) / 1000000, 'unixepoch') || '.' || substr((m.received_at) / 1000, -3) AS received_at,
       datetime((CASE WHEN d.state IN ('queued', 'deferred') THEN d.due_at END) / 1000000, 'unixepoch') || '.' || substr((CASE WHEN d.state IN ('queued', 'deferred') THEN d.due_at END) / 1000, -3) AS next_at,
       datetime((d.expires_at) / 1000000, 'unixepoch') || '.' || substr((d.expires_at) / 1000, -3) AS expires_at, datetime((d.finished_at) / 1000000, 'unixepoch') || '.' || substr((d.finished_at) / 1000, -3) AS finished_at, d.worker, d.wanted,
       m.client_address, m.helo, m.protocol, m.header_message_id, replace(m.notice_of, '-', '') AS notice_of
FROM deliveries d
JOIN recipients r ON r.message_id = d.message_id AND r.delivery = d.number
JOIN messages m ON m.id = d.message_id""",
    "queue_summary": """SELECT d.state, d.route, count(*) AS deliveries, CAST(sum(m.size) AS bigint) AS bytes,
       datetime((min(m.received_at)) / 1000000, 'unixepoch') || '.' || substr((min(m.received_at)) / 1000, -3) AS oldest_at, (((CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) * 1000) - (min(m.received_at))) / 1000000.0) AS oldest_seconds,
       sum(CASE WHEN d.state <> 'held' AND d.due_at < (CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) * 1000) THEN 1 ELSE 0 END) AS overdue
FROM deliveries d JOIN messages m ON m.id = d.message_id
WHERE d.state IN ('queued', 'sending', 'deferred', 'held') GROUP BY d.state, d.route
UNION ALL
SELECT state, route, count(*), NULL, NULL, NULL, 0 FROM deliveries
WHERE state NOT IN ('queued', 'sending', 'deferred', 'held') GROUP BY state, route""",
    "server_health": """SELECT server, count(outcome) AS attempts, sum(CASE WHEN outcome = 'accepted' THEN 1 ELSE 0 END) AS accepted,
       sum(CASE WHEN outcome = 'deferred' THEN 1 ELSE 0 END) AS deferred,
       sum(CASE WHEN outcome = 'rejected' THEN 1 ELSE 0 END) AS rejected,
       sum(CASE WHEN outcome = 'unreachable' THEN 1 ELSE 0 END) AS unreachable,
       sum(CASE WHEN outcome IN ('uncertain', 'malformed') THEN 1 ELSE 0 END) AS uncertain,
       sum(CASE WHEN outcome = 'interrupted' THEN 1 ELSE 0 END) AS interrupted,
       coalesce(sum(bytes_sent), 0) AS bytes_sent, datetime((max(finished_at)) / 1000000, 'unixepoch') || '.' || substr((max(finished_at)) / 1000, -3) AS last_at,
       count(why) AS left_alone_by, max(why) AS left_alone_why, datetime((max(since)) / 1000000, 'unixepoch') || '.' || substr((max(since)) / 1000, -3) AS paused_at
FROM (SELECT server, outcome, bytes_sent, finished_at, CASE WHEN 1 = 0 THEN reply END AS why,
             CASE WHEN 1 = 0 THEN finished_at END AS since
      FROM attempts WHERE finished_at > ((CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) * 1000) - CAST((3600) * 1000000 AS INTEGER)) AND server IS NOT NULL
      UNION ALL SELECT r.server, NULL, NULL, NULL, r.why, NULL
      FROM rests r JOIN workers w ON w.id = r.worker WHERE w.ended_at IS NULL
      UNION ALL SELECT substr(subject, 8), NULL, NULL, NULL, NULL, since
      FROM pauses WHERE substr(subject, 1, 7) = 'server:') s
GROUP BY server""",
}
ABOUT = {
    "mail_queue": "what is unfinished: a row a recipient",
    "mail_history": "all mail, finished as well: a row a recipient",
    "queue_summary": "deliveries by state and route",
    "server_health": "tries of the last hour by server",
}
COLUMNS = {
    "deliveries.message_id": "the message that it carries",
    "deliveries.state": "where it is; docs/inspect.md lists the states",
    "attempts.message_id": "the message that was tried",
    "attempts.delivery": "number of the delivery",
    "attempts.worker": "who tried",
    "attempts.server": "where; empty when the worker was lost",
    "attempts.started_at": "when it began to connect",
    "attempts.finished_at": "when the reply was read, or the try given up",
    "attempts.outcome": "what became of it; docs/inspect.md lists the outcomes",
    "attempts.bytes_sent": "bytes of the request that left",
    "recipients.message_id": "the message that goes to it",
    "workers.id": "what deliveries and attempts call it, UUIDv7",
    "workers.host": "machine that it runs on",
    "workers.pid": "its process there",
    "workers.started_at": "when it began",
    "actions.id": "what touched calls it, UUIDv7",
    "actions.at": "when",
    "actions.actor": "user@host who asked",
    "actions.verb": "what was done",
    "actions.reason": "why, as the operator gave it",
    "actions.filter": "to which deliveries, as options of the command",
    "actions.matched": "how many deliveries it touched",
    "rests.worker": "the worker that sends it nothing",
    "rests.server": "which, as the settings name it",
    "rests.why": "the server''s words, or ours, when it failed last",
    "deliveries.wanted_why": "who asked for what is wanted, and why",
    "deliveries.warned_at": "when the sender was told that it is late",
    "workers.claim_seconds": "from a claim of its to the due_at of the delivery",
    "workers.routes": "the routes that it knows, JSON: a list of servers for each name",
    "touched.message_id": "the message of the delivery",
    "touched.delivery": "its number",
    "touched.action": "the row of actions that tells who did what and why",
    "pauses.since": "since when",
    "pauses.actor": "user@host who asked",
    "pauses.reason": "why",
    "spool.created_at": "when it was made",
}
RECIPIENT = {
    "queue_id": "32 hex digits, as in the 250 reply, in logs and file names",
    "message_id": "the same as the database keeps it, with dashes; sorts by arrival",
    "position": "order of the RCPT command, from 1",
    "delivery": "number of the QMQP request that carries this recipient; those of one message and route share it",
    "state": "where it is; docs/inspect.md lists the states",
    "sender": "envelope sender; empty is the null sender",
    "recipient": "envelope recipient, without SMTP quoting",
    "size": "bytes of the stored body, lines ending in LF, our Received field included",
    "route": "name of the route; its servers are looked up at each attempt",
    "attempts": "times that a worker took it",
    "last_outcome": "outcome of the last attempt; docs/inspect.md lists the outcomes",
    "reason": "the server''s words at the last attempt, or ours; bytes outside printable ASCII as \\xNN",
    "server": "server of the last attempt",
    "received_at": "when it was accepted",
    "next_at": "deferred: the next attempt; queued: when any worker takes it without a hint",
    "expires_at": "an attempt that fails after this is the last",
    "finished_at": "when it became final; empty while it is not",
    "worker": "the worker that is sending it",
    "wanted": "what an operator asked for while it is being sent",
    "client_address": "the SMTP client",
    "helo": "what it called itself",
    "protocol": "how it spoke (RFC 3848 keyword)",
    "header_message_id": "Message-ID of the header",
    "notice_of": "the queue id that this notice is about; empty for other mail",
}
VIEW_COLUMNS = {
    "mail_queue": RECIPIENT,
    "mail_history": RECIPIENT,
    "queue_summary": {
        "state": "what is counted: where the deliveries are",
        "route": "and which way they go",
        "deliveries": "how many",
        "bytes": "sum of the sizes of their messages; empty for finished ones, whose files are gone",
        "oldest_at": "when the oldest was received; empty for finished ones",
        "oldest_seconds": "how long ago that is",
        "overdue": "how many are past the time when somebody was to look at them",
    },
    "server_health": {
        "server": "host:port, [v6]:port or unix:/path",
        "attempts": "tries",
        "accepted": "those with that outcome",
        "deferred": "those with that outcome",
        "rejected": "those with that outcome",
        "unreachable": "those with that outcome",
        "uncertain": "those that ended uncertain or malformed",
        "interrupted": "those with that outcome",
        "bytes_sent": "bytes of requests",
        "last_at": "the end of the last one",
        "left_alone_by": "how many workers send nothing there for now, because it fails or does not want us",
        "left_alone_why": "what it said, or did, to one of them",
        "paused_at": "since when an operator wants nothing sent there",
    },
}


def upgrade() -> None:
    """Make them."""
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
        about = "servers that workers leave alone for now; who has ended does not count"
        connection.exec_driver_sql(f"COMMENT ON TABLE rests IS '{about}'")
        connection.exec_driver_sql(
            "COMMENT ON TABLE touched IS 'which deliveries an action touched'"
        )
    for column, words in COLUMNS.items() if postgresql else ():
        connection.exec_driver_sql(f"COMMENT ON COLUMN {column} IS '{words}'")
    if postgresql and _role_is_there(connection):
        connection.exec_driver_sql(f"GRANT SELECT ON {READABLE} TO {ROLE}")


def downgrade() -> None:
    """Go back; the role stays, because other databases may know it."""
    connection = op.get_bind()
    postgresql = connection.dialect.name == "postgresql"
    if postgresql and _role_exists(connection):
        connection.exec_driver_sql(f"REVOKE ALL ON {READABLE} FROM {ROLE}")
    for column in COLUMNS if postgresql else ():
        connection.exec_driver_sql(f"COMMENT ON COLUMN {column} IS NULL")
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
    """Make the views of this revision, whatever views there were."""
    postgresql = connection.dialect.name == "postgresql"
    _replace_views(connection, POSTGRESQL if postgresql else SQLITE)
    for view, words in ABOUT.items() if postgresql else ():
        connection.exec_driver_sql(
            f"COMMENT ON VIEW {view} IS '{words}; docs/inspect.md explains its columns'"
        )
    for view, columns in VIEW_COLUMNS.items() if postgresql else ():
        for column, words in columns.items():
            connection.exec_driver_sql(f"COMMENT ON COLUMN {view}.{column} IS '{words}'")
    if postgresql and _role_exists(connection):
        connection.exec_driver_sql(f"GRANT SELECT ON {', '.join(ABOUT)} TO {ROLE}")


def _replace_views(connection: sqlalchemy.Connection, views: dict[str, str]) -> None:
    for name, select in views.items():
        connection.exec_driver_sql(f"DROP VIEW IF EXISTS {name}")
        connection.exec_driver_sql(f"CREATE VIEW {name} AS {select}")


def _replace_indexes(connection: sqlalchemy.Connection, order: str) -> None:
    """By bytes, whatever the database's language: spellings of an address stand together, and equality needs no more."""
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
