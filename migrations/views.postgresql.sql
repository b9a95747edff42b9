-- The views, which are the public face of the database for SQL: their names and columns are stable
-- (docs/inspect.md). migrations/views.py runs these statements.

-- name: drop_views
DROP VIEW IF EXISTS mail_queue;
DROP VIEW IF EXISTS mail_history;
DROP VIEW IF EXISTS queue_summary;
DROP VIEW IF EXISTS server_health;

-- name: create_views
CREATE VIEW mail_queue AS
SELECT replace(CAST(d.queue_id AS text), '-', '') AS queue_id, d.queue_id AS queue_uuid,
    r.position, d.number AS delivery, d.state, m.sender, r.address AS recipient, m.size, d.route,
    d.claim_count AS attempts, d.last_outcome, d.last_reply AS reason, d.last_server AS server,
    m.received_at AS received_at,
    CASE WHEN d.state IN ('queued', 'deferred') THEN d.due_at END AS next_at,
    d.expires_at AS expires_at, d.finished_at AS finished_at, d.worker, d.pending_operation,
    m.client_address, m.helo, m.protocol, m.header_message_id,
    replace(CAST(m.dsn_of AS text), '-', '') AS dsn_of, m.tls, m.auth_user
FROM deliveries d
JOIN recipients r ON r.queue_id = d.queue_id AND r.delivery = d.number
JOIN messages m ON m.id = d.queue_id
WHERE d.state IN ('queued', 'sending', 'deferred', 'held');
CREATE VIEW mail_history AS
SELECT replace(CAST(d.queue_id AS text), '-', '') AS queue_id, d.queue_id AS queue_uuid,
    r.position, d.number AS delivery, d.state, m.sender, r.address AS recipient, m.size, d.route,
    d.claim_count AS attempts, d.last_outcome, d.last_reply AS reason, d.last_server AS server,
    m.received_at AS received_at,
    CASE WHEN d.state IN ('queued', 'deferred') THEN d.due_at END AS next_at,
    d.expires_at AS expires_at, d.finished_at AS finished_at, d.worker, d.pending_operation,
    m.client_address, m.helo, m.protocol, m.header_message_id,
    replace(CAST(m.dsn_of AS text), '-', '') AS dsn_of, m.tls, m.auth_user
FROM deliveries d
JOIN recipients r ON r.queue_id = d.queue_id AND r.delivery = d.number
JOIN messages m ON m.id = d.queue_id;
-- Two halves: finished mail is only counted, or a long history would be looked up message by
-- message.
CREATE VIEW queue_summary AS
SELECT d.state, d.route, count(*) AS deliveries, CAST(sum(m.size) AS bigint) AS bytes,
    min(m.received_at) AS oldest_at,
    CAST(extract(epoch FROM now() - min(m.received_at)) AS float8) AS oldest_seconds,
    sum(CASE WHEN d.state <> 'held' AND d.due_at < now() THEN 1 ELSE 0 END) AS overdue
FROM deliveries d JOIN messages m ON m.id = d.queue_id
WHERE d.state IN ('queued', 'sending', 'deferred', 'held')
GROUP BY d.state, d.route
UNION ALL
SELECT state, route, count(*), NULL, NULL, NULL, 0
FROM deliveries WHERE state NOT IN ('queued', 'sending', 'deferred', 'held')
GROUP BY state, route;
CREATE VIEW server_health AS
SELECT server, count(outcome) AS attempts,
    sum(CASE WHEN outcome = 'delivered' THEN 1 ELSE 0 END) AS delivered,
    sum(CASE WHEN outcome = 'deferred' THEN 1 ELSE 0 END) AS deferred,
    sum(CASE WHEN outcome = 'rejected' THEN 1 ELSE 0 END) AS rejected,
    sum(CASE WHEN outcome = 'unreachable' THEN 1 ELSE 0 END) AS unreachable,
    sum(CASE WHEN outcome IN ('uncertain', 'malformed') THEN 1 ELSE 0 END) AS uncertain,
    sum(CASE WHEN outcome = 'interrupted' THEN 1 ELSE 0 END) AS interrupted,
    coalesce(sum(bytes_sent), 0) AS bytes_sent,
    max(finished_at) AS last_at,
    count(why) AS circuit_open_workers, max(why) AS circuit_open_reason,
    max(since) AS paused_at
FROM (
    SELECT server, outcome, bytes_sent, finished_at, CASE WHEN 1 = 0 THEN reply END AS why,
        CASE WHEN 1 = 0 THEN finished_at END AS since
    FROM attempts
    WHERE finished_at > now() - interval '1 hour' AND server IS NOT NULL
    UNION ALL
    SELECT c.server, NULL, NULL, NULL, c.why, NULL
    FROM open_circuits c JOIN workers w ON w.id = c.worker
    WHERE w.ended_at IS NULL
    UNION ALL
    SELECT substr(subject, 8), NULL, NULL, NULL, NULL, since
    FROM pauses WHERE substr(subject, 1, 7) = 'server:'
) s
GROUP BY server;
