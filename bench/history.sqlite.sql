-- Mail as it would be in the database after days; the same as history.postgresql.sql.

-- name: fill
CREATE TEMPORARY TABLE numbers (n, id, arrival, state, outcome, reply, server);
INSERT INTO numbers
    WITH RECURSIVE series(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM series WHERE n < :rows),
    messages AS (
        SELECT n, (:first + n * :step) * 1000 AS arrival, printf('%012x', :first + n * :step) AS h,
            CASE WHEN n % 100 < :finished AND n % 50 = 0 THEN 'bounced'
                WHEN n % 100 < :finished THEN 'delivered'
                WHEN n % 1000 = 999 THEN 'held'
                ELSE 'deferred' END AS state
        FROM series
    )
    SELECT n, substr(h, 1, 8) || '-' || substr(h, 9, 4) || '-7abc-8def-' || printf('%012x', n),
        arrival, state,
        CASE state WHEN 'delivered' THEN 'delivered' WHEN 'bounced' THEN 'rejected'
            ELSE 'deferred' END,
        CASE state WHEN 'delivered' THEN 'ok ' || n
            ELSE '451 4.7.1 recipient' || n || '@example.org is greylisted, come back later' END,
        '192.0.2.' || (n % 4) || ':628'
    FROM messages;
INSERT INTO messages (id, sender, size, received_at, client_address, helo, protocol,
    header_message_id)
    SELECT id, 'sender' || (n % 1000) || '@example.com', 4096, arrival, '192.0.2.1',
        'client.example.com', 'ESMTP',
        '<' || n || '@client.example.com>'
    FROM numbers;
INSERT INTO recipients (queue_id, position, address, delivery)
    SELECT id, 1, 'recipient' || n || '@d' || (n % 97) || '.example.org', 1 FROM numbers;
INSERT INTO deliveries (queue_id, number, route, state, due_at, expires_at, claim_count,
    last_outcome, last_reply,
        reason_source, last_server, finished_at)
    SELECT id, 1, 'default', state, CASE WHEN state = 'deferred' THEN :soon END, :soon, 1, outcome,
        reply, 'server',
        server, CASE WHEN state IN ('delivered', 'bounced') THEN arrival END
    FROM numbers;
INSERT INTO attempts (queue_id, delivery, claim, attempt_index, worker, server, started_at,
    finished_at, outcome,
        reply, bytes_sent)
    SELECT id, 1, 1, 1, :worker, server, arrival, arrival, outcome, reply, 4200 FROM numbers;
DROP TABLE numbers;

-- name: make_overdue
-- Half of the deferred deliveries wait for a server that is down. Their senders will be warned.
UPDATE deliveries SET state = 'queued', route = 'dead', warn_at = due_at + 7200000000,
        due_at = due_at - 7200000000 - abs(random() % 3600) * 1000000
    WHERE state = 'deferred' AND queue_id IN (SELECT id FROM messages WHERE sender < 'sender5');

-- name: analyze
ANALYZE;
