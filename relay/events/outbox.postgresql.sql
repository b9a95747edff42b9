-- The outbox (relay/events/outbox.py). Workers claim side by side, so each skips the rows that
-- another transaction has locked.

-- name: is_due
-- Whether something is due for a subscription that is not disabled.
SELECT EXISTS (
    SELECT 1 FROM notifications WHERE subscription = :subscription AND due_at <= now())
    AND EXISTS (
        SELECT 1 FROM subscriptions WHERE name = :subscription AND disabled_at IS NULL) AS due;

-- name: claim
-- Looks at the first :scanned notifications that are due. Of each message the oldest can be claimed,
-- unless another one is being delivered (`replay` may have made an older one meanwhile), and at most
-- :free are. The others of the message are put off until the oldest is due again, so each is looked
-- at once while it waits.
WITH d AS MATERIALIZED (
    SELECT queue_id, sequence, due_at FROM notifications
    WHERE subscription = :subscription AND due_at <= now()
    ORDER BY due_at, sequence LIMIT :scanned
    FOR UPDATE SKIP LOCKED
), h AS MATERIALIZED (
    SELECT d.queue_id, d.sequence, d.due_at, o.due_at AS oldest_due_at,
        o.sequence = d.sequence AND NOT EXISTS (
            SELECT 1 FROM notifications n
            WHERE n.queue_id = d.queue_id AND n.subscription = :subscription
                AND n.claim IS NOT NULL AND n.due_at > now()) AS oldest
    FROM d CROSS JOIN LATERAL (
        SELECT n.sequence, n.due_at FROM notifications n
        WHERE n.queue_id = d.queue_id AND n.subscription = :subscription
        ORDER BY n.sequence LIMIT 1) AS o
), c AS MATERIALIZED (
    SELECT queue_id, sequence, oldest, oldest_due_at,
        oldest AND row_number() OVER (PARTITION BY oldest ORDER BY due_at, sequence) <= :free
            AS claimed
    FROM h
)
UPDATE notifications n
SET due_at = CASE WHEN c.claimed THEN now() + :lease * interval '1 second'
        ELSE greatest(c.oldest_due_at, now() + :lease * interval '1 second') END,
    claim = CASE WHEN c.claimed THEN CAST(:token AS uuid) END
FROM c
WHERE n.queue_id = c.queue_id AND n.subscription = :subscription AND n.sequence = c.sequence
    AND (c.claimed OR NOT c.oldest)
RETURNING n.sequence, n.tries, c.claimed;

-- name: finish
-- A claim that another one has followed matches no row. After an event that is done, the next one
-- of its message is due.
DELETE FROM notifications n
USING json_to_recordset(CAST(:finished AS json)) AS x(
    queue_id uuid, sequence bigint, claim uuid, report text)
WHERE n.queue_id = x.queue_id AND n.subscription = :subscription AND n.sequence = x.sequence
    AND n.claim = x.claim AND x.report = 'done';
UPDATE notifications n
SET claim = NULL, due_at = now() + x.delay * interval '1 second',
    tries = n.tries + CAST(x.report = 'retry' AS integer)
FROM json_to_recordset(CAST(:finished AS json)) AS x(
    queue_id uuid, sequence bigint, claim uuid, report text, delay float8)
WHERE n.queue_id = x.queue_id AND n.subscription = :subscription AND n.sequence = x.sequence
    AND n.claim = x.claim AND x.report <> 'done';
UPDATE notifications n SET due_at = now()
FROM json_to_recordset(CAST(:finished AS json)) AS x(queue_id uuid, report text)
WHERE x.report = 'done' AND n.queue_id = x.queue_id AND n.subscription = :subscription
    AND n.claim IS NULL AND n.due_at > now()
    AND n.sequence = (
        SELECT min(o.sequence) FROM notifications o
        WHERE o.queue_id = x.queue_id AND o.subscription = :subscription);

-- name: wake
WITH x AS MATERIALIZED (
    SELECT queue_id, sequence FROM notifications
    WHERE subscription = :subscription AND due_at > now() AND claim IS NULL AND tries > 0
    ORDER BY due_at LIMIT :most
    FOR UPDATE SKIP LOCKED
)
UPDATE notifications n SET due_at = now()
FROM x
WHERE n.queue_id = x.queue_id AND n.subscription = :subscription AND n.sequence = x.sequence;

-- name: expire
WITH x AS MATERIALIZED (
    SELECT queue_id, sequence FROM notifications
    WHERE subscription = :subscription AND claim IS NULL
        AND queued_at < now() - :seconds * interval '1 second'
    LIMIT :most
    FOR UPDATE SKIP LOCKED
)
DELETE FROM notifications n
USING x
WHERE n.queue_id = x.queue_id AND n.subscription = :subscription AND n.sequence = x.sequence;

-- name: by_sequence
-- The recipients of a delivery are those that it has, and those of the deliveries that it was split
-- into later.
SELECT e.sequence, e.id, e.at AS event_at, e.type,
    replace(CAST(e.queue_id AS text), '-', '') AS queue_id, e.delivery, e.route, e.attempt,
    e.server, e.outcome, e.reply, e.reason_source, e.next_at, m.header_message_id AS message_id,
    m.sender, m.size, m.received_at, m.auth_user, m.client_address,
    (WITH RECURSIVE line(number) AS (
        SELECT e.delivery
        UNION
        SELECT c.number FROM deliveries c JOIN line ON c.parent = line.number
        WHERE c.queue_id = e.queue_id)
     SELECT array_agg(r.address ORDER BY r.position) FROM recipients r
     WHERE r.queue_id = e.queue_id AND r.delivery IN (SELECT number FROM line)) AS recipients
FROM events e JOIN messages m ON m.id = e.queue_id
WHERE e.sequence IN (
    SELECT CAST(value AS bigint) FROM json_array_elements_text(CAST(:sequences AS json)))
ORDER BY e.sequence;

-- name: newest
SELECT e.sequence, e.id, e.at AS event_at, e.type,
    replace(CAST(e.queue_id AS text), '-', '') AS queue_id, e.delivery, e.route, e.attempt,
    e.server, e.outcome, e.reply, e.reason_source, e.next_at, m.header_message_id AS message_id,
    m.sender, m.size, m.received_at, m.auth_user, m.client_address,
    (WITH RECURSIVE line(number) AS (
        SELECT e.delivery
        UNION
        SELECT c.number FROM deliveries c JOIN line ON c.parent = line.number
        WHERE c.queue_id = e.queue_id)
     SELECT array_agg(r.address ORDER BY r.position) FROM recipients r
     WHERE r.queue_id = e.queue_id AND r.delivery IN (SELECT number FROM line)) AS recipients
FROM events e JOIN messages m ON m.id = e.queue_id
WHERE e.at >= now() - :seconds * interval '1 second'
    AND (CAST(:queue_id AS uuid) IS NULL OR e.queue_id = CAST(:queue_id AS uuid))
    AND e.type IN (SELECT value FROM json_array_elements_text(CAST(:types AS json)))
ORDER BY e.sequence DESC LIMIT :most;

-- name: after
SELECT e.sequence, e.id, e.at AS event_at, e.type,
    replace(CAST(e.queue_id AS text), '-', '') AS queue_id, e.delivery, e.route, e.attempt,
    e.server, e.outcome, e.reply, e.reason_source, e.next_at, m.header_message_id AS message_id,
    m.sender, m.size, m.received_at, m.auth_user, m.client_address,
    (WITH RECURSIVE line(number) AS (
        SELECT e.delivery
        UNION
        SELECT c.number FROM deliveries c JOIN line ON c.parent = line.number
        WHERE c.queue_id = e.queue_id)
     SELECT array_agg(r.address ORDER BY r.position) FROM recipients r
     WHERE r.queue_id = e.queue_id AND r.delivery IN (SELECT number FROM line)) AS recipients
FROM events e JOIN messages m ON m.id = e.queue_id
WHERE e.sequence > :after AND e.at >= now() - :seconds * interval '1 second'
    AND (CAST(:queue_id AS uuid) IS NULL OR e.queue_id = CAST(:queue_id AS uuid))
    AND e.type IN (SELECT value FROM json_array_elements_text(CAST(:types AS json)))
ORDER BY e.sequence LIMIT :most;

-- name: sequences
SELECT e.sequence FROM events e
WHERE e.sequence > :after AND e.at >= now() - :seconds * interval '1 second'
    AND (CAST(:queue_id AS uuid) IS NULL OR e.queue_id = CAST(:queue_id AS uuid))
    AND e.type IN (SELECT value FROM json_array_elements_text(CAST(:types AS json)))
ORDER BY e.sequence LIMIT :most;

-- name: replay
-- A notification that waits is due now. One that is being delivered stays as it is.
INSERT INTO notifications (queue_id, subscription, sequence, queued_at, due_at)
SELECT e.queue_id, s.name, e.sequence, now(), now()
FROM events e JOIN subscriptions s ON s.disabled_at IS NULL
    AND (CAST(:subscription AS text) IS NULL OR s.name = :subscription)
    AND (s.types IS NULL OR CAST(s.types AS jsonb) ? e.type)
    AND (s.routes IS NULL OR CAST(s.routes AS jsonb) ? e.route)
WHERE e.sequence IN (
    SELECT CAST(value AS bigint) FROM json_array_elements_text(CAST(:sequences AS json)))
ON CONFLICT (queue_id, subscription, sequence)
    DO UPDATE SET due_at = excluded.due_at, queued_at = excluded.queued_at, tries = 0
    WHERE notifications.claim IS NULL;
