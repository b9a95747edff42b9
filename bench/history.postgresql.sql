-- Mail as it would be in the database after days; the same as history.sqlite.sql.

-- name: fill
SET LOCAL statement_timeout = 0;
CREATE TEMPORARY TABLE numbers (
    n bigint, id uuid, arrival timestamptz, state text, outcome text, reply text, server text
);
INSERT INTO numbers
    SELECT n,
        CAST(substr(h, 1, 8) || '-' || substr(h, 9, 4) || '-7abc-8def-' || lpad(to_hex(n), 12, '0')
            AS uuid),
        to_timestamp(ms / 1000.0), state,
        CASE state WHEN 'delivered' THEN 'delivered' WHEN 'bounced' THEN 'rejected'
            ELSE 'deferred' END,
        CASE state WHEN 'delivered' THEN 'ok ' || n
            ELSE '451 4.7.1 recipient' || n || '@example.org is greylisted, come back later' END,
        '192.0.2.' || n % 4 || ':628'
    FROM (
        SELECT n, ms, lpad(to_hex(ms), 12, '0') AS h,
            CASE WHEN n % 100 < CAST(:finished AS bigint) AND n % 50 = 0 THEN 'bounced'
                WHEN n % 100 < CAST(:finished AS bigint) THEN 'delivered'
                WHEN n % 1000 = 999 THEN 'held'
                ELSE 'deferred' END AS state
        FROM generate_series(1, CAST(:rows AS bigint)) AS n,
            LATERAL (SELECT CAST(:first AS bigint) + n * CAST(:step AS bigint) AS ms) AS arrivals
    ) AS messages;
INSERT INTO messages (id, sender, size, received_at, client_address, helo, protocol,
    header_message_id)
    SELECT id, 'sender' || n % 1000 || '@example.com', 4096, arrival, '192.0.2.1',
        'client.example.com', 'ESMTP',
        '<' || n || '@client.example.com>'
    FROM numbers;
INSERT INTO recipients (queue_id, position, address, delivery)
    SELECT id, 1, 'recipient' || n || '@d' || n % 97 || '.example.org', 1 FROM numbers;
INSERT INTO deliveries (queue_id, number, route, state, due_at, expires_at, claim_count,
    last_outcome, last_reply,
        reason_source, last_server, finished_at)
    SELECT id, 1, 'default', state, CASE WHEN state = 'deferred' THEN now() + interval '1 hour' END,
        now() + interval '1 hour', 1, outcome, reply, 'server', server,
        CASE WHEN state IN ('delivered', 'bounced') THEN arrival END
    FROM numbers;
INSERT INTO attempts (queue_id, delivery, claim, attempt_index, worker, server, started_at,
    finished_at, outcome,
        reply, bytes_sent)
    SELECT id, 1, 1, 1, CAST(:worker AS uuid), server, arrival, arrival, outcome, reply, 4200
    FROM numbers;
DROP TABLE numbers;

-- name: make_overdue
-- Half of the deferred deliveries wait for a server that is down. Their senders will be warned.
SET LOCAL statement_timeout = 0;
UPDATE deliveries SET state = 'queued', route = 'dead', warn_at = now() + interval '3 hours',
        due_at = now() - (1 + random()) * interval '1 hour'
    WHERE state = 'deferred' AND queue_id IN (SELECT id FROM messages WHERE sender < 'sender5');

-- name: analyze
-- The statistics of the planner, as autovacuum makes them in time.
SET statement_timeout = 0;
VACUUM ANALYZE;
