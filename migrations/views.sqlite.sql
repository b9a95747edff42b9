-- The views, which are the public face of the database for SQL: their names and columns are stable
-- (docs/inspect.md). migrations/views.py runs these statements.

-- name: drop_views
DROP VIEW IF EXISTS mail_queue;
DROP VIEW IF EXISTS mail_history;
DROP VIEW IF EXISTS queue_summary;
DROP VIEW IF EXISTS server_health;
DROP VIEW IF EXISTS clock;

-- name: create_views
-- SQLite has no type for times, and no function for the time in microseconds: statements read it
-- from this view. Within a statement the time does not change. `now` is a whole number of
-- milliseconds inside of a Julian day; rounding gets it back exactly.
CREATE VIEW clock AS
SELECT CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) * 1000 AS now;
CREATE VIEW mail_queue AS
SELECT replace(d.queue_id, '-', '') AS queue_id, d.queue_id AS queue_uuid,
    r.position, d.number AS delivery, d.state, m.sender, r.address AS recipient, m.size, d.route,
    d.claim_count AS attempts, d.last_outcome, d.last_reply AS reason, d.last_server AS server,
    datetime(m.received_at / 1000000, 'unixepoch') || '.' || substr(m.received_at / 1000, -3)
        || '+00:00' AS received_at,
    CASE WHEN d.state IN ('queued', 'deferred')
        THEN datetime(d.due_at / 1000000, 'unixepoch') || '.' || substr(d.due_at / 1000, -3)
        || '+00:00' END AS next_at,
    datetime(d.expires_at / 1000000, 'unixepoch') || '.' || substr(d.expires_at / 1000, -3)
        || '+00:00' AS expires_at,
    datetime(d.finished_at / 1000000, 'unixepoch') || '.' || substr(d.finished_at / 1000, -3)
        || '+00:00' AS finished_at,
    d.worker, d.pending_operation, m.client_address, m.helo, m.protocol, m.header_message_id,
    replace(m.dsn_of, '-', '') AS dsn_of
FROM deliveries d
JOIN recipients r ON r.queue_id = d.queue_id AND r.delivery = d.number
JOIN messages m ON m.id = d.queue_id
WHERE d.state IN ('queued', 'sending', 'deferred', 'held');
CREATE VIEW mail_history AS
SELECT replace(d.queue_id, '-', '') AS queue_id, d.queue_id AS queue_uuid,
    r.position, d.number AS delivery, d.state, m.sender, r.address AS recipient, m.size, d.route,
    d.claim_count AS attempts, d.last_outcome, d.last_reply AS reason, d.last_server AS server,
    datetime(m.received_at / 1000000, 'unixepoch') || '.' || substr(m.received_at / 1000, -3)
        || '+00:00' AS received_at,
    CASE WHEN d.state IN ('queued', 'deferred')
        THEN datetime(d.due_at / 1000000, 'unixepoch') || '.' || substr(d.due_at / 1000, -3)
        || '+00:00' END AS next_at,
    datetime(d.expires_at / 1000000, 'unixepoch') || '.' || substr(d.expires_at / 1000, -3)
        || '+00:00' AS expires_at,
    datetime(d.finished_at / 1000000, 'unixepoch') || '.' || substr(d.finished_at / 1000, -3)
        || '+00:00' AS finished_at,
    d.worker, d.pending_operation, m.client_address, m.helo, m.protocol, m.header_message_id,
    replace(m.dsn_of, '-', '') AS dsn_of
FROM deliveries d
JOIN recipients r ON r.queue_id = d.queue_id AND r.delivery = d.number
JOIN messages m ON m.id = d.queue_id;
-- Two halves: finished mail is only counted, or a long history would be looked up message by
-- message.
CREATE VIEW queue_summary AS
SELECT d.state, d.route, count(*) AS deliveries, CAST(sum(m.size) AS bigint) AS bytes,
    datetime(min(m.received_at) / 1000000, 'unixepoch') || '.'
        || substr(min(m.received_at) / 1000, -3)
        || '+00:00' AS oldest_at,
    ((SELECT now FROM clock) - min(m.received_at)) / 1000000.0 AS oldest_seconds,
    sum(CASE WHEN d.state <> 'held' AND d.due_at < (SELECT now FROM clock) THEN 1 ELSE 0 END)
        AS overdue
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
    datetime(max(finished_at) / 1000000, 'unixepoch') || '.' || substr(max(finished_at) / 1000, -3)
        || '+00:00' AS last_at,
    count(why) AS circuit_open_workers, max(why) AS circuit_open_reason,
    datetime(max(since) / 1000000, 'unixepoch') || '.' || substr(max(since) / 1000, -3)
        || '+00:00' AS paused_at
FROM (
    SELECT server, outcome, bytes_sent, finished_at, CASE WHEN 1 = 0 THEN reply END AS why,
        CASE WHEN 1 = 0 THEN finished_at END AS since
    FROM attempts
    WHERE finished_at > (SELECT now FROM clock) - 3600 * 1000000 AND server IS NOT NULL
    UNION ALL
    SELECT c.server, NULL, NULL, NULL, c.why, NULL
    FROM open_circuits c JOIN workers w ON w.id = c.worker
    WHERE w.ended_at IS NULL
    UNION ALL
    SELECT substr(subject, 8), NULL, NULL, NULL, NULL, since
    FROM pauses WHERE substr(subject, 1, 7) = 'server:'
) s
GROUP BY server;
