-- Acceptance (relay/queue/accept.py).

-- name: accept
-- Inserts the messages, recipients and deliveries of a batch, and moves the segment's position over
-- them. Nothing is inserted unless the position was :start, so nothing comes twice; without :start
-- there is no such condition. The relay chooses every key. Returns a row if the position was moved.
INSERT INTO messages (id, received_at, sender, size, client_address, helo, protocol, auth_user,
    header_message_id, body_type, ret, envid, dsn_of, client_trusted, dsn_content, segment,
    position, tls, prefix)
SELECT value ->> '$.id', (SELECT now FROM clock) - CAST(:age * 1000000 AS INTEGER),
    value ->> '$.sender', value ->> '$.size',
    value ->> '$.client_address', value ->> '$.helo', value ->> '$.protocol',
    value ->> '$.auth_user', value ->> '$.header_message_id', value ->> '$.body_type',
    value ->> '$.ret', value ->> '$.envid', value ->> '$.dsn_of', value ->> '$.client_trusted',
    value ->> '$.dsn_content', CASE WHEN value ->> '$.position' IS NOT NULL THEN :segment END,
    value ->> '$.position', value ->> '$.tls', value ->> '$.prefix'
FROM json_each(:messages)
WHERE :start IS NULL
    OR EXISTS (SELECT 1 FROM segments WHERE id = :segment AND committed_to = :start)
ON CONFLICT DO NOTHING;
INSERT INTO recipients (queue_id, position, address, delivery, notify, orcpt)
SELECT value ->> '$.queue_id', value ->> '$.position', value ->> '$.address',
    value ->> '$.delivery', value ->> '$.notify', value ->> '$.orcpt'
FROM json_each(:recipients)
WHERE :start IS NULL
    OR EXISTS (SELECT 1 FROM segments WHERE id = :segment AND committed_to = :start)
ON CONFLICT DO NOTHING;
-- event: accepted
-- event: accepted on hold
INSERT INTO deliveries (queue_id, number, route, state, due_at, expires_at, warn_at, last_reply,
    reason_source)
SELECT value ->> '$.queue_id', value ->> '$.number', value ->> '$.route',
    CASE WHEN coalesce(:hold_reason, value ->> '$.hold_reason') IS NULL
        THEN 'queued' ELSE 'held' END,
    CASE WHEN coalesce(:hold_reason, value ->> '$.hold_reason') IS NULL
        THEN (SELECT now FROM clock) + CAST(:grace * 1000000 AS INTEGER) END,
    (SELECT now FROM clock) + CAST((:lifetime - :age) * 1000000 AS INTEGER),
    (SELECT now FROM clock) + CAST((value ->> '$.warn_after' - :age) * 1000000 AS INTEGER),
    coalesce(:hold_reason, value ->> '$.hold_reason'),
    CASE WHEN coalesce(:hold_reason, value ->> '$.hold_reason') IS NOT NULL THEN :hold_source END
FROM json_each(:deliveries)
WHERE :start IS NULL
    OR EXISTS (SELECT 1 FROM segments WHERE id = :segment AND committed_to = :start)
ON CONFLICT DO NOTHING;
UPDATE segments SET committed_to = :end
WHERE id = :segment AND committed_to = :start
RETURNING id;

-- name: open_segment
INSERT INTO segments (id, committed_to) VALUES (:segment, :start) ON CONFLICT DO NOTHING;

-- name: close_segment
-- Takes that row back: the file was removed meanwhile, and no message was inserted.
DELETE FROM segments WHERE id = :segment AND committed_to = :start AND sealed_at IS NULL;

-- name: seal_segment
-- A segment that is sealed is read and removed, and never written or replayed. It is sealed where
-- its position stands, so no message without rows is passed over.
UPDATE segments SET sealed_at = (SELECT now FROM clock), messages = :count,
    least_id = :least, greatest_id = :greatest
WHERE id = :segment AND sealed_at IS NULL AND committed_to = :end
RETURNING id;

-- name: committed_to
-- Up to where the messages of a segment have their rows, and whether it is sealed.
SELECT committed_to, sealed_at IS NOT NULL AS sealed FROM segments WHERE id = :segment;

-- name: sealed_segments
SELECT replace(id, '-', '') AS id FROM segments WHERE sealed_at IS NOT NULL;
