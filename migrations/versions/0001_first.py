"""The first schema.

Frozen: the statements are spelled out for both databases and do not follow `relay.db.schema`; a test holds the two against
each other.
"""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

POSTGRESQL = [
    """CREATE TABLE actions (
    id UUID NOT NULL,
    at TIMESTAMP WITH TIME ZONE NOT NULL,
    actor TEXT NOT NULL,
    verb TEXT NOT NULL,
    reason TEXT NOT NULL,
    filter TEXT NOT NULL,
    matched INTEGER NOT NULL,
    CONSTRAINT actions_key PRIMARY KEY (id)
)""",
    "COMMENT ON TABLE actions IS 'what operators did'",
    """CREATE TABLE attempts (
    message_id UUID NOT NULL,
    delivery INTEGER NOT NULL,
    claim INTEGER NOT NULL,
    hop INTEGER NOT NULL,
    worker UUID NOT NULL,
    server TEXT,
    started_at TIMESTAMP WITH TIME ZONE NOT NULL,
    finished_at TIMESTAMP WITH TIME ZONE NOT NULL,
    outcome TEXT NOT NULL,
    reply TEXT NOT NULL,
    bytes_sent BIGINT NOT NULL,
    CONSTRAINT attempts_key PRIMARY KEY (message_id, delivery, claim, hop),
    CONSTRAINT attempts_outcome CHECK (outcome IN ('accepted', 'deferred', 'rejected', 'unreachable', 'interrupted', 'uncertain', 'malformed', 'unsendable'))
)""",
    "CREATE INDEX attempts_finished_at ON attempts USING brin (finished_at)",
    "COMMENT ON TABLE attempts IS 'tries, each at one server'",
    "COMMENT ON COLUMN attempts.claim IS 'which claim of the delivery, from 1'",
    "COMMENT ON COLUMN attempts.hop IS 'which server within the claim, from 1; 0: the worker was lost'",
    "COMMENT ON COLUMN attempts.reply IS 'the server''s words, or ours; bytes outside ASCII as \\xNN'",
    """CREATE TABLE deliveries (
    message_id UUID NOT NULL,
    number INTEGER NOT NULL,
    parent INTEGER,
    route TEXT NOT NULL,
    state TEXT NOT NULL,
    due_at TIMESTAMP WITH TIME ZONE,
    expires_at TIMESTAMP WITH TIME ZONE NOT NULL,
    worker UUID,
    claims INTEGER DEFAULT '0' NOT NULL,
    backoff_step INTEGER DEFAULT '0' NOT NULL,
    vanished INTEGER DEFAULT '0' NOT NULL,
    wanted TEXT,
    last_outcome TEXT,
    last_reply TEXT,
    last_server TEXT,
    finished_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT deliveries_key PRIMARY KEY (message_id, number),
    CONSTRAINT deliveries_state CHECK (state IN ('queued', 'sending', 'deferred', 'held', 'split', 'delivered', 'bounced', 'expired', 'dropped')),
    CONSTRAINT deliveries_due_where_the_state_needs_it CHECK (due_at IS NOT NULL OR state NOT IN ('queued', 'sending', 'deferred')),
    CONSTRAINT deliveries_worker_while_sending CHECK ((worker IS NOT NULL) = (state = 'sending'))
)
 WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02)""",
    "CREATE INDEX deliveries_due_at ON deliveries (due_at) WHERE due_at IS NOT NULL",
    "COMMENT ON TABLE deliveries IS 'QMQP requests to get across: the queue'",
    "COMMENT ON COLUMN deliveries.number IS 'from 1 within the message'",
    "COMMENT ON COLUMN deliveries.parent IS 'the delivery that was split into this one'",
    "COMMENT ON COLUMN deliveries.route IS 'name of the route; its servers are looked up at each attempt'",
    "COMMENT ON COLUMN deliveries.due_at IS 'when it needs attention; empty if it needs none'",
    "COMMENT ON COLUMN deliveries.expires_at IS 'a try that fails after this is the last'",
    "COMMENT ON COLUMN deliveries.worker IS 'who is sending it'",
    "COMMENT ON COLUMN deliveries.claims IS 'times it was claimed; numbers the tries'",
    "COMMENT ON COLUMN deliveries.backoff_step IS 'deferrals in a row'",
    "COMMENT ON COLUMN deliveries.vanished IS 'workers lost over it in a row'",
    "COMMENT ON COLUMN deliveries.wanted IS 'what an operator asked for while it was being sent'",
    "COMMENT ON COLUMN deliveries.last_outcome IS 'outcome of the last try'",
    "COMMENT ON COLUMN deliveries.last_reply IS 'the server''s words, or ours, at the last try'",
    "COMMENT ON COLUMN deliveries.last_server IS 'server of the last try'",
    "COMMENT ON COLUMN deliveries.finished_at IS 'when it became final'",
    """CREATE TABLE messages (
    id UUID NOT NULL,
    sender TEXT NOT NULL,
    size BIGINT NOT NULL,
    received_at TIMESTAMP WITH TIME ZONE NOT NULL,
    client_address TEXT NOT NULL,
    helo TEXT NOT NULL,
    protocol TEXT NOT NULL,
    auth_user TEXT,
    header_message_id TEXT,
    body_type TEXT,
    ret TEXT,
    envid TEXT,
    notice_of UUID,
    CONSTRAINT messages_key PRIMARY KEY (id)
)""",
    "CREATE INDEX messages_header_message_id ON messages (header_message_id)",
    "CREATE INDEX messages_sender ON messages (sender)",
    "COMMENT ON TABLE messages IS 'accepted messages; rows are never changed'",
    "COMMENT ON COLUMN messages.id IS 'the queue id, UUIDv7'",
    "COMMENT ON COLUMN messages.sender IS 'envelope sender; empty = the null sender'",
    "COMMENT ON COLUMN messages.size IS 'bytes of the stored body, LF form, trace header included'",
    "COMMENT ON COLUMN messages.received_at IS 'when the 250 was earned'",
    "COMMENT ON COLUMN messages.client_address IS 'address of the SMTP client'",
    "COMMENT ON COLUMN messages.helo IS 'what the client called itself'",
    "COMMENT ON COLUMN messages.protocol IS 'RFC 3848 keyword'",
    "COMMENT ON COLUMN messages.auth_user IS 'authenticated user'",
    "COMMENT ON COLUMN messages.header_message_id IS 'Message-ID of the header'",
    "COMMENT ON COLUMN messages.body_type IS 'BODY= of MAIL (RFC 6152)'",
    "COMMENT ON COLUMN messages.ret IS 'RET= of MAIL (RFC 3461)'",
    "COMMENT ON COLUMN messages.envid IS 'ENVID= of MAIL (RFC 3461), xtext'",
    "COMMENT ON COLUMN messages.notice_of IS 'the message that this notice is about'",
    """CREATE TABLE pauses (
    subject TEXT NOT NULL,
    since TIMESTAMP WITH TIME ZONE NOT NULL,
    actor TEXT NOT NULL,
    reason TEXT NOT NULL,
    CONSTRAINT pauses_key PRIMARY KEY (subject)
)""",
    "COMMENT ON TABLE pauses IS 'routes and servers that nothing is sent to for now'",
    "COMMENT ON COLUMN pauses.subject IS 'route:NAME or server:NAME'",
    """CREATE TABLE recipients (
    message_id UUID NOT NULL,
    position INTEGER NOT NULL,
    address TEXT NOT NULL,
    delivery INTEGER NOT NULL,
    notify TEXT,
    orcpt TEXT,
    CONSTRAINT recipients_key PRIMARY KEY (message_id, position)
)""",
    "CREATE INDEX recipients_address ON recipients (address)",
    "COMMENT ON TABLE recipients IS 'envelope recipients'",
    "COMMENT ON COLUMN recipients.position IS 'order of RCPT, from 1'",
    "COMMENT ON COLUMN recipients.address IS 'envelope recipient, local part without SMTP quoting'",
    "COMMENT ON COLUMN recipients.delivery IS 'number of the delivery that carries it'",
    "COMMENT ON COLUMN recipients.notify IS 'NOTIFY= of RCPT (RFC 3461)'",
    "COMMENT ON COLUMN recipients.orcpt IS 'ORCPT= of RCPT (RFC 3461), xtext'",
    """CREATE TABLE spool (
    id UUID NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    CONSTRAINT spool_key PRIMARY KEY (id)
)""",
    "COMMENT ON TABLE spool IS 'the one spool directory that this database knows'",
    "COMMENT ON COLUMN spool.id IS 'also written in the spool directory, as spool-id'",
    """CREATE TABLE workers (
    id UUID NOT NULL,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    started_at TIMESTAMP WITH TIME ZONE NOT NULL,
    until TIMESTAMP WITH TIME ZONE NOT NULL,
    ended_at TIMESTAMP WITH TIME ZONE,
    ending TEXT,
    CONSTRAINT workers_key PRIMARY KEY (id)
)""",
    "COMMENT ON TABLE workers IS 'worker processes and their leases'",
    "COMMENT ON COLUMN workers.until IS 'the lease: renewed while the worker lives'",
    "COMMENT ON COLUMN workers.ended_at IS 'when it stopped or was declared dead'",
    "COMMENT ON COLUMN workers.ending IS 'stopped or vanished'",
    """CREATE VIEW mail_queue AS SELECT replace(CAST(m.id AS text), '-', '') AS queue_id, m.id AS message_id, r.position, d.number AS delivery, d.state, m.sender,
       r.address AS recipient, m.size, d.route, d.claims AS attempts, d.last_outcome, d.last_reply AS reason,
       d.last_server AS server, m.received_at AS received_at,
       CASE WHEN d.state IN ('queued', 'deferred') THEN d.due_at END AS next_at,
       d.expires_at AS expires_at, d.finished_at AS finished_at, d.worker, d.wanted,
       m.client_address, m.helo, m.protocol, m.header_message_id, replace(CAST(m.notice_of AS text), '-', '') AS notice_of
FROM messages m
JOIN recipients r ON r.message_id = m.id
JOIN deliveries d ON d.message_id = r.message_id AND d.number = r.delivery
WHERE d.state IN ('queued', 'sending', 'deferred', 'held')""",
    """CREATE VIEW mail_history AS SELECT replace(CAST(m.id AS text), '-', '') AS queue_id, m.id AS message_id, r.position, d.number AS delivery, d.state, m.sender,
       r.address AS recipient, m.size, d.route, d.claims AS attempts, d.last_outcome, d.last_reply AS reason,
       d.last_server AS server, m.received_at AS received_at,
       CASE WHEN d.state IN ('queued', 'deferred') THEN d.due_at END AS next_at,
       d.expires_at AS expires_at, d.finished_at AS finished_at, d.worker, d.wanted,
       m.client_address, m.helo, m.protocol, m.header_message_id, replace(CAST(m.notice_of AS text), '-', '') AS notice_of
FROM messages m
JOIN recipients r ON r.message_id = m.id
JOIN deliveries d ON d.message_id = r.message_id AND d.number = r.delivery""",
    """CREATE VIEW queue_summary AS SELECT d.state, d.route, count(*) AS deliveries, CAST(coalesce(sum(m.size), 0) AS bigint) AS bytes,
       min(m.received_at) AS oldest_at, CAST(extract(epoch FROM now() - min(m.received_at)) AS float8) AS oldest_seconds,
       sum(CASE WHEN d.state IN ('queued', 'sending', 'deferred') AND d.due_at < now() THEN 1 ELSE 0 END) AS overdue
FROM deliveries d JOIN messages m ON m.id = d.message_id
GROUP BY d.state, d.route""",
    """CREATE VIEW server_health AS SELECT server, count(*) AS attempts, sum(CASE WHEN outcome = 'accepted' THEN 1 ELSE 0 END) AS accepted,
       sum(CASE WHEN outcome = 'deferred' THEN 1 ELSE 0 END) AS deferred,
       sum(CASE WHEN outcome = 'rejected' THEN 1 ELSE 0 END) AS rejected,
       sum(CASE WHEN outcome = 'unreachable' THEN 1 ELSE 0 END) AS unreachable,
       sum(CASE WHEN outcome IN ('uncertain', 'malformed') THEN 1 ELSE 0 END) AS uncertain,
       sum(CASE WHEN outcome = 'interrupted' THEN 1 ELSE 0 END) AS interrupted,
       sum(bytes_sent) AS bytes_sent, max(finished_at) AS last_at
FROM attempts
WHERE finished_at > (now() - (3600) * interval '1 second') AND server IS NOT NULL
GROUP BY server""",
]
SQLITE = [
    """CREATE TABLE actions (
    id TEXT NOT NULL,
    at BIGINT NOT NULL,
    actor TEXT NOT NULL,
    verb TEXT NOT NULL,
    reason TEXT NOT NULL,
    filter TEXT NOT NULL,
    matched INTEGER NOT NULL,
    CONSTRAINT actions_key PRIMARY KEY (id)
)""",
    """CREATE TABLE attempts (
    message_id TEXT NOT NULL,
    delivery INTEGER NOT NULL,
    claim INTEGER NOT NULL,
    hop INTEGER NOT NULL,
    worker TEXT NOT NULL,
    server TEXT,
    started_at BIGINT NOT NULL,
    finished_at BIGINT NOT NULL,
    outcome TEXT NOT NULL,
    reply TEXT NOT NULL,
    bytes_sent BIGINT NOT NULL,
    CONSTRAINT attempts_key PRIMARY KEY (message_id, delivery, claim, hop),
    CONSTRAINT attempts_outcome CHECK (outcome IN ('accepted', 'deferred', 'rejected', 'unreachable', 'interrupted', 'uncertain', 'malformed', 'unsendable'))
)""",
    "CREATE INDEX attempts_finished_at ON attempts (finished_at)",
    """CREATE TABLE deliveries (
    message_id TEXT NOT NULL,
    number INTEGER NOT NULL,
    parent INTEGER,
    route TEXT NOT NULL,
    state TEXT NOT NULL,
    due_at BIGINT,
    expires_at BIGINT NOT NULL,
    worker TEXT,
    claims INTEGER DEFAULT '0' NOT NULL,
    backoff_step INTEGER DEFAULT '0' NOT NULL,
    vanished INTEGER DEFAULT '0' NOT NULL,
    wanted TEXT,
    last_outcome TEXT,
    last_reply TEXT,
    last_server TEXT,
    finished_at BIGINT,
    CONSTRAINT deliveries_key PRIMARY KEY (message_id, number),
    CONSTRAINT deliveries_state CHECK (state IN ('queued', 'sending', 'deferred', 'held', 'split', 'delivered', 'bounced', 'expired', 'dropped')),
    CONSTRAINT deliveries_due_where_the_state_needs_it CHECK (due_at IS NOT NULL OR state NOT IN ('queued', 'sending', 'deferred')),
    CONSTRAINT deliveries_worker_while_sending CHECK ((worker IS NOT NULL) = (state = 'sending'))
)""",
    "CREATE INDEX deliveries_due_at ON deliveries (due_at) WHERE due_at IS NOT NULL",
    """CREATE TABLE messages (
    id TEXT NOT NULL,
    sender TEXT NOT NULL,
    size BIGINT NOT NULL,
    received_at BIGINT NOT NULL,
    client_address TEXT NOT NULL,
    helo TEXT NOT NULL,
    protocol TEXT NOT NULL,
    auth_user TEXT,
    header_message_id TEXT,
    body_type TEXT,
    ret TEXT,
    envid TEXT,
    notice_of TEXT,
    CONSTRAINT messages_key PRIMARY KEY (id)
)""",
    "CREATE INDEX messages_header_message_id ON messages (header_message_id)",
    "CREATE INDEX messages_sender ON messages (sender)",
    """CREATE TABLE pauses (
    subject TEXT NOT NULL,
    since BIGINT NOT NULL,
    actor TEXT NOT NULL,
    reason TEXT NOT NULL,
    CONSTRAINT pauses_key PRIMARY KEY (subject)
)""",
    """CREATE TABLE recipients (
    message_id TEXT NOT NULL,
    position INTEGER NOT NULL,
    address TEXT NOT NULL,
    delivery INTEGER NOT NULL,
    notify TEXT,
    orcpt TEXT,
    CONSTRAINT recipients_key PRIMARY KEY (message_id, position)
)""",
    "CREATE INDEX recipients_address ON recipients (address)",
    """CREATE TABLE spool (
    id TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    CONSTRAINT spool_key PRIMARY KEY (id)
)""",
    """CREATE TABLE workers (
    id TEXT NOT NULL,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    started_at BIGINT NOT NULL,
    until BIGINT NOT NULL,
    ended_at BIGINT,
    ending TEXT,
    CONSTRAINT workers_key PRIMARY KEY (id)
)""",
    """CREATE VIEW mail_queue AS SELECT replace(m.id, '-', '') AS queue_id, m.id AS message_id, r.position, d.number AS delivery, d.state, m.sender,
       r.address AS recipient, m.size, d.route, d.claims AS attempts, d.last_outcome, d.last_reply AS reason,
       d.last_server AS server, strftime('%Y-%m-%d %H:%M:%f', (m.received_at) / 1000000.0, 'unixepoch') AS received_at,
       strftime('%Y-%m-%d %H:%M:%f', (CASE WHEN d.state IN ('queued', 'deferred') THEN d.due_at END) / 1000000.0, 'unixepoch') AS next_at,
       strftime('%Y-%m-%d %H:%M:%f', (d.expires_at) / 1000000.0, 'unixepoch') AS expires_at, strftime('%Y-%m-%d %H:%M:%f', (d.finished_at) / 1000000.0, 'unixepoch') AS finished_at, d.worker, d.wanted,
       m.client_address, m.helo, m.protocol, m.header_message_id, replace(m.notice_of, '-', '') AS notice_of
FROM messages m
JOIN recipients r ON r.message_id = m.id
JOIN deliveries d ON d.message_id = r.message_id AND d.number = r.delivery
WHERE d.state IN ('queued', 'sending', 'deferred', 'held')""",
    """CREATE VIEW mail_history AS SELECT replace(m.id, '-', '') AS queue_id, m.id AS message_id, r.position, d.number AS delivery, d.state, m.sender,
       r.address AS recipient, m.size, d.route, d.claims AS attempts, d.last_outcome, d.last_reply AS reason,
       d.last_server AS server, strftime('%Y-%m-%d %H:%M:%f', (m.received_at) / 1000000.0, 'unixepoch') AS received_at,
       strftime('%Y-%m-%d %H:%M:%f', (CASE WHEN d.state IN ('queued', 'deferred') THEN d.due_at END) / 1000000.0, 'unixepoch') AS next_at,
       strftime('%Y-%m-%d %H:%M:%f', (d.expires_at) / 1000000.0, 'unixepoch') AS expires_at, strftime('%Y-%m-%d %H:%M:%f', (d.finished_at) / 1000000.0, 'unixepoch') AS finished_at, d.worker, d.wanted,
       m.client_address, m.helo, m.protocol, m.header_message_id, replace(m.notice_of, '-', '') AS notice_of
FROM messages m
JOIN recipients r ON r.message_id = m.id
JOIN deliveries d ON d.message_id = r.message_id AND d.number = r.delivery""",
    """CREATE VIEW queue_summary AS SELECT d.state, d.route, count(*) AS deliveries, CAST(coalesce(sum(m.size), 0) AS bigint) AS bytes,
       strftime('%Y-%m-%d %H:%M:%f', (min(m.received_at)) / 1000000.0, 'unixepoch') AS oldest_at, (((CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) * 1000) - (min(m.received_at))) / 1000000.0) AS oldest_seconds,
       sum(CASE WHEN d.state IN ('queued', 'sending', 'deferred') AND d.due_at < (CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) * 1000) THEN 1 ELSE 0 END) AS overdue
FROM deliveries d JOIN messages m ON m.id = d.message_id
GROUP BY d.state, d.route""",
    """CREATE VIEW server_health AS SELECT server, count(*) AS attempts, sum(CASE WHEN outcome = 'accepted' THEN 1 ELSE 0 END) AS accepted,
       sum(CASE WHEN outcome = 'deferred' THEN 1 ELSE 0 END) AS deferred,
       sum(CASE WHEN outcome = 'rejected' THEN 1 ELSE 0 END) AS rejected,
       sum(CASE WHEN outcome = 'unreachable' THEN 1 ELSE 0 END) AS unreachable,
       sum(CASE WHEN outcome IN ('uncertain', 'malformed') THEN 1 ELSE 0 END) AS uncertain,
       sum(CASE WHEN outcome = 'interrupted' THEN 1 ELSE 0 END) AS interrupted,
       sum(bytes_sent) AS bytes_sent, strftime('%Y-%m-%d %H:%M:%f', (max(finished_at)) / 1000000.0, 'unixepoch') AS last_at
FROM attempts
WHERE finished_at > ((CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) * 1000) - CAST((3600) * 1000000 AS INTEGER)) AND server IS NOT NULL
GROUP BY server""",
]
VIEWS = ("mail_queue", "mail_history", "queue_summary", "server_health")
TABLES = (
    "actions",
    "attempts",
    "deliveries",
    "messages",
    "pauses",
    "recipients",
    "spool",
    "workers",
)


def upgrade() -> None:
    """Make everything."""
    connection = op.get_bind()
    for statement in POSTGRESQL if connection.dialect.name == "postgresql" else SQLITE:
        connection.exec_driver_sql(statement)


def downgrade() -> None:
    """Drop everything."""
    for view in VIEWS:
        op.execute(f"DROP VIEW {view}")
    for table in TABLES:
        op.drop_table(table)
