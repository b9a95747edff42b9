-- DSNs and delay warnings on PostgreSQL.

-- name: pending
-- Deliveries with a pending DSN, longest pending first. Each waits `:gather` seconds for others of
-- its message that may fail soon. A `due_at` far ahead was set before the database's clock was set
-- back.
SELECT replace(CAST(d.queue_id AS text), '-', '') AS queue_id FROM deliveries d
WHERE d.state IN ('bounced', 'expired') AND d.due_at IS NOT NULL
    AND (d.due_at <= now() OR d.due_at > now() + :gather * interval '1 second')
    AND (d.due_at <= now() - :gather * interval '1 second' OR NOT EXISTS (
        SELECT 1 FROM deliveries o
        WHERE o.queue_id = d.queue_id AND o.state IN ('queued', 'sending')))
    AND d.queue_id NOT IN (
        SELECT CAST(value AS uuid) FROM json_array_elements_text(CAST(:put_off AS json)))
ORDER BY d.due_at LIMIT :most;

-- name: late
-- Messages whose sender is to be warned now, the most overdue warning first.
SELECT replace(CAST(l.queue_id AS text), '-', '') AS queue_id
FROM (SELECT DISTINCT d.warn_at, d.queue_id FROM deliveries d
    WHERE d.warn_at IS NOT NULL AND d.state IN ('queued', 'sending', 'deferred')
        AND d.warn_at <= now()
        AND d.queue_id NOT IN (
            SELECT CAST(value AS uuid) FROM json_array_elements_text(CAST(:put_off AS json)))
    ORDER BY d.warn_at, d.queue_id LIMIT :most) AS l
ORDER BY l.warn_at, l.queue_id;

-- name: lock_pending
-- The deliveries of a message with a pending DSN, unless another transaction has locked them.
-- The message is locked too: two sweepers may each hold some of its deliveries.
SELECT d.number FROM deliveries d JOIN messages m ON m.id = d.queue_id
WHERE d.queue_id = :id AND d.state IN ('bounced', 'expired') AND d.due_at IS NOT NULL
ORDER BY d.number FOR UPDATE SKIP LOCKED;

-- name: lock_unfinished
-- The deliveries of a message that may be late, unless another transaction has locked them.
-- The message is locked too: two sweepers may each hold some of its deliveries.
SELECT d.number FROM deliveries d JOIN messages m ON m.id = d.queue_id
WHERE d.queue_id = :id AND d.state IN ('queued', 'sending', 'deferred')
ORDER BY d.number FOR UPDATE SKIP LOCKED;

-- name: original
-- The message that a DSN is about. Times are microseconds since 1970.
SELECT replace(CAST(m.id AS text), '-', '') AS id, m.sender,
    CAST(extract(epoch FROM m.received_at) * 1000000 AS bigint) AS received_at,
    m.header_message_id, m.envid, m.size, m.ret, m.client_trusted, m.dsn_content,
    replace(CAST(m.dsn_of AS text), '-', '') AS dsn_of,
    replace(CAST(m.segment AS text), '-', '') AS segment, m.position, m.prefix
FROM messages m WHERE m.id = :id;

-- name: recipients
-- Every recipient of a message with its delivery. `kind`: what a DSN would report now. A server may
-- have accepted a delivery if it was uncertain, or one of which it is a part; after a malformed
-- reply `bytes_sent` shows whether the whole request had been sent.
WITH RECURSIVE uncertain(number) AS (
    SELECT d.number FROM deliveries d JOIN messages m ON m.id = d.queue_id
    WHERE d.queue_id = :id AND (d.last_outcome = 'uncertain' OR EXISTS (
        SELECT 1 FROM attempts a WHERE a.queue_id = d.queue_id AND a.delivery = d.number
        AND (a.outcome = 'uncertain' OR (a.outcome = 'malformed' AND a.bytes_sent >= m.size))))
    UNION
    SELECT c.number FROM deliveries c JOIN uncertain u ON c.parent = u.number
    WHERE c.queue_id = :id)
SELECT r.address, r.orcpt, r.notify, d.number,
    CASE WHEN d.state IN ('bounced', 'expired') THEN d.state
        WHEN d.state IN ('queued', 'sending', 'deferred') THEN 'delayed' END AS kind,
    coalesce(d.last_reply, '') AS reply, d.last_server AS server,
    (SELECT CAST(extract(epoch FROM max(a.finished_at)) * 1000000 AS bigint) FROM attempts a
        WHERE a.queue_id = d.queue_id AND a.delivery = d.number AND a.server IS NOT NULL)
        AS attempted_at,
    CAST(extract(epoch FROM d.expires_at) * 1000000 AS bigint) AS expires_at,
    d.last_outcome AS outcome, d.reason_source,
    d.number IN (SELECT number FROM uncertain) AS possibly_delivered,
    d.warned_at IS NOT NULL AS warned
FROM deliveries d JOIN recipients r ON r.queue_id = d.queue_id AND r.delivery = d.number
WHERE d.queue_id = :id ORDER BY r.position;

-- name: clear_pending
UPDATE deliveries SET due_at = NULL
WHERE queue_id = :id AND number IN (
    SELECT CAST(value AS int) FROM json_array_elements_text(CAST(:numbers AS json)));

-- name: clear_warning
-- `:warned`: the sender gets a warning.
UPDATE deliveries
SET warn_at = NULL, warned_at = CASE WHEN :warned THEN now() ELSE warned_at END
WHERE queue_id = :id AND number IN (
    SELECT CAST(value AS int) FROM json_array_elements_text(CAST(:numbers AS json)));

-- name: withhold
UPDATE deliveries SET dsn_withheld = :withheld
WHERE queue_id = :id AND number IN (
    SELECT CAST(value AS int) FROM json_array_elements_text(CAST(:numbers AS json)));

-- name: reclassify
-- event: reclassified
UPDATE deliveries
SET state = 'deferred', finished_at = NULL, due_at = now() + :gather * interval '1 second'
WHERE queue_id = :id AND number IN (
    SELECT CAST(value AS int) FROM json_array_elements_text(CAST(:numbers AS json)));

-- name: take_turn
-- Takes the sender's turn if the last one is `:limit` seconds ago; a time ahead comes from a clock
-- that was set back. The row is locked until the DSN is committed, so that two workers do not both
-- take it.
INSERT INTO dsn_limits (sender, last_at) VALUES (:sender, now())
ON CONFLICT (sender) DO UPDATE SET last_at = excluded.last_at
WHERE dsn_limits.last_at <= now() - :limit * interval '1 second'
    OR dsn_limits.last_at > now() + :limit * interval '1 second';
