-- The outbox (relay/events/outbox.py). Times are microseconds; a transaction is the only writer from
-- its beginning, so nothing is locked.

-- name: is_due
-- Whether something is due for a subscription that is not disabled.
SELECT EXISTS (
    SELECT 1 FROM notifications
    WHERE subscription = :subscription AND due_at <= (SELECT now FROM clock))
    AND EXISTS (
        SELECT 1 FROM subscriptions WHERE name = :subscription AND disabled_at IS NULL) AS due;

-- name: claim
-- Looks at the first :scanned notifications that are due. Of each message the oldest can be claimed,
-- unless another one is being delivered (`replay` may have made an older one meanwhile), and at most
-- :free are. The others of the message are put off until the oldest is due again, so each is looked
-- at once while it waits.
WITH d AS MATERIALIZED (
    SELECT queue_id, sequence, due_at FROM notifications
    WHERE subscription = :subscription AND due_at <= (SELECT now FROM clock)
    ORDER BY due_at, sequence LIMIT :scanned
), h AS MATERIALIZED (
    SELECT d.queue_id, d.sequence, d.due_at,
        d.sequence = (
            SELECT min(n.sequence) FROM notifications n
            WHERE n.queue_id = d.queue_id AND n.subscription = :subscription)
            AND NOT EXISTS (
                SELECT 1 FROM notifications n
                WHERE n.queue_id = d.queue_id AND n.subscription = :subscription
                    AND n.claim IS NOT NULL AND n.due_at > (SELECT now FROM clock)) AS oldest,
        (SELECT n.due_at FROM notifications n
         WHERE n.queue_id = d.queue_id AND n.subscription = :subscription
         ORDER BY n.sequence LIMIT 1) AS oldest_due_at
    FROM d
), c AS MATERIALIZED (
    SELECT queue_id, sequence, oldest, oldest_due_at,
        oldest AND row_number() OVER (PARTITION BY oldest ORDER BY due_at, sequence) <= :free
            AS claimed
    FROM h
)
UPDATE notifications
SET due_at = CASE WHEN c.claimed
        THEN (SELECT now FROM clock) + CAST(:lease * 1000000 AS INTEGER)
        ELSE max(c.oldest_due_at, (SELECT now FROM clock) + CAST(:lease * 1000000 AS INTEGER)) END,
    claim = CASE WHEN c.claimed THEN :token END
FROM c
WHERE notifications.queue_id = c.queue_id AND notifications.subscription = :subscription
    AND notifications.sequence = c.sequence AND (c.claimed OR NOT c.oldest)
RETURNING notifications.sequence, notifications.tries, notifications.claim IS :token AS claimed;

-- name: finish
-- A claim that another one has followed matches no row. After an event that is done, the next one
-- of its message is due.
DELETE FROM notifications
WHERE subscription = :subscription AND (queue_id, sequence, claim) IN (
    SELECT value ->> '$.queue_id', value ->> '$.sequence', value ->> '$.claim'
    FROM json_each(:finished) WHERE value ->> '$.report' = 'done');
UPDATE notifications
SET claim = NULL, due_at = (SELECT now FROM clock) + CAST(x.delay * 1000000 AS INTEGER),
    tries = tries + (x.report = 'retry')
FROM (
    SELECT value ->> '$.queue_id' AS queue_id, value ->> '$.sequence' AS sequence,
        value ->> '$.claim' AS claim, value ->> '$.report' AS report, value ->> '$.delay' AS delay
    FROM json_each(:finished)
) AS x
WHERE notifications.queue_id = x.queue_id AND notifications.subscription = :subscription
    AND notifications.sequence = x.sequence AND notifications.claim = x.claim
    AND x.report <> 'done';
UPDATE notifications SET due_at = (SELECT now FROM clock)
WHERE subscription = :subscription AND claim IS NULL AND due_at > (SELECT now FROM clock)
    AND queue_id IN (
        SELECT value ->> '$.queue_id' FROM json_each(:finished)
        WHERE value ->> '$.report' = 'done')
    AND sequence = (
        SELECT min(o.sequence) FROM notifications o
        WHERE o.queue_id = notifications.queue_id AND o.subscription = :subscription);

-- name: wake
UPDATE notifications SET due_at = (SELECT now FROM clock)
WHERE subscription = :subscription AND (queue_id, sequence) IN (
    SELECT queue_id, sequence FROM notifications
    WHERE subscription = :subscription AND due_at > (SELECT now FROM clock) AND claim IS NULL
        AND tries > 0
    ORDER BY due_at LIMIT :most);

-- name: expire
DELETE FROM notifications
WHERE subscription = :subscription AND (queue_id, sequence) IN (
    SELECT queue_id, sequence FROM notifications
    WHERE subscription = :subscription AND claim IS NULL
        AND queued_at < (SELECT now FROM clock) - CAST(:seconds * 1000000 AS INTEGER)
    LIMIT :most);

-- name: by_sequence
-- The recipients of a delivery are those that it has, and those of the deliveries that it was split
-- into later.
SELECT e.sequence, e.id, e.at AS event_at, e.type, replace(e.queue_id, '-', '') AS queue_id,
    e.delivery, e.route, e.attempt, e.server, e.outcome, e.reply, e.reason_source, e.next_at,
    m.header_message_id AS message_id, m.sender, m.size, m.received_at, m.auth_user,
    m.client_address,
    (SELECT json_group_array(address) FROM (
        SELECT r.address FROM recipients r
        WHERE r.queue_id = e.queue_id AND r.delivery IN (
            WITH RECURSIVE line(number) AS (
                SELECT e.delivery
                UNION
                SELECT c.number FROM deliveries c JOIN line ON c.parent = line.number
                WHERE c.queue_id = e.queue_id)
            SELECT number FROM line)
        ORDER BY r.position)) AS recipients
FROM events e JOIN messages m ON m.id = e.queue_id
WHERE e.sequence IN (SELECT value FROM json_each(:sequences))
ORDER BY e.sequence;

-- name: newest
SELECT e.sequence, e.id, e.at AS event_at, e.type, replace(e.queue_id, '-', '') AS queue_id,
    e.delivery, e.route, e.attempt, e.server, e.outcome, e.reply, e.reason_source, e.next_at,
    m.header_message_id AS message_id, m.sender, m.size, m.received_at, m.auth_user,
    m.client_address,
    (SELECT json_group_array(address) FROM (
        SELECT r.address FROM recipients r
        WHERE r.queue_id = e.queue_id AND r.delivery IN (
            WITH RECURSIVE line(number) AS (
                SELECT e.delivery
                UNION
                SELECT c.number FROM deliveries c JOIN line ON c.parent = line.number
                WHERE c.queue_id = e.queue_id)
            SELECT number FROM line)
        ORDER BY r.position)) AS recipients
FROM events e JOIN messages m ON m.id = e.queue_id
WHERE e.at >= (SELECT now FROM clock) - CAST(:seconds * 1000000 AS INTEGER)
    AND (:queue_id IS NULL OR e.queue_id = :queue_id)
    AND e.type IN (SELECT value FROM json_each(:types))
ORDER BY e.sequence DESC LIMIT :most;

-- name: after
SELECT e.sequence, e.id, e.at AS event_at, e.type, replace(e.queue_id, '-', '') AS queue_id,
    e.delivery, e.route, e.attempt, e.server, e.outcome, e.reply, e.reason_source, e.next_at,
    m.header_message_id AS message_id, m.sender, m.size, m.received_at, m.auth_user,
    m.client_address,
    (SELECT json_group_array(address) FROM (
        SELECT r.address FROM recipients r
        WHERE r.queue_id = e.queue_id AND r.delivery IN (
            WITH RECURSIVE line(number) AS (
                SELECT e.delivery
                UNION
                SELECT c.number FROM deliveries c JOIN line ON c.parent = line.number
                WHERE c.queue_id = e.queue_id)
            SELECT number FROM line)
        ORDER BY r.position)) AS recipients
FROM events e JOIN messages m ON m.id = e.queue_id
WHERE e.sequence > :after AND e.at >= (SELECT now FROM clock) - CAST(:seconds * 1000000 AS INTEGER)
    AND (:queue_id IS NULL OR e.queue_id = :queue_id)
    AND e.type IN (SELECT value FROM json_each(:types))
ORDER BY e.sequence LIMIT :most;

-- name: sequences
SELECT e.sequence FROM events e
WHERE e.sequence > :after AND e.at >= (SELECT now FROM clock) - CAST(:seconds * 1000000 AS INTEGER)
    AND (:queue_id IS NULL OR e.queue_id = :queue_id)
    AND e.type IN (SELECT value FROM json_each(:types))
ORDER BY e.sequence LIMIT :most;

-- name: replay
-- A notification that waits is due now. One that is being delivered stays as it is.
INSERT INTO notifications (queue_id, subscription, sequence, queued_at, due_at)
SELECT e.queue_id, s.name, e.sequence, (SELECT now FROM clock), (SELECT now FROM clock)
FROM events e JOIN subscriptions s ON s.disabled_at IS NULL
    AND (:subscription IS NULL OR s.name = :subscription)
    AND (s.types IS NULL OR e.type IN (SELECT value FROM json_each(s.types)))
    AND (s.routes IS NULL OR e.route IN (SELECT value FROM json_each(s.routes)))
WHERE e.sequence IN (SELECT value FROM json_each(:sequences))
ON CONFLICT (queue_id, subscription, sequence)
    DO UPDATE SET due_at = excluded.due_at, queued_at = excluded.queued_at, tries = 0
    WHERE notifications.claim IS NULL;
