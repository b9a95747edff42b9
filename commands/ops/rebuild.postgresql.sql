-- What `fsck --rebuild` asks and changes (commands/ops/rebuild.py).

-- name: mark
SELECT mark FROM spool;

-- name: raise_mark
UPDATE spool SET mark = :mark WHERE mark < :mark;

-- name: messages_with_rows
-- Of these messages those that have a row, and the place of each body (empty: a file).
SELECT replace(CAST(m.id AS text), '-', '') AS id,
    replace(CAST(m.segment AS text), '-', '') AS segment, m.position
FROM json_array_elements_text(CAST(:ids AS json)) AS x(id)
JOIN messages m ON m.id = CAST(x.id AS uuid)
ORDER BY m.id;

-- name: unfinished
-- Also those that failed and whose DSN is pending.
SELECT count(*) AS count FROM deliveries
WHERE state IN ('queued', 'sending', 'deferred')
    OR (state IN ('bounced', 'expired') AND due_at IS NOT NULL);

-- name: lock_sending
-- Their workers ended before the database was restored.
SELECT queue_id, number FROM deliveries
WHERE state = 'sending'
ORDER BY queue_id, number
LIMIT :most
FOR UPDATE;

-- name: hold_unfinished
WITH p AS MATERIALIZED (
    SELECT d.queue_id, d.number
    FROM deliveries d
    WHERE d.state IN ('queued', 'deferred')
    ORDER BY d.queue_id, d.number
    LIMIT :most
    FOR UPDATE OF d
)
UPDATE deliveries d
SET
    -- event: fsck
    state = 'held', due_at = NULL, warn_at = NULL, last_reply = :reply,
    reason_source = 'operator'
FROM p
WHERE d.queue_id = p.queue_id AND d.number = p.number
RETURNING d.queue_id, d.number;

-- name: hold_pending
-- The DSN may have been sent since the backup. The reason of the failure stays in the text.
WITH p AS MATERIALIZED (
    SELECT d.queue_id, d.number
    FROM deliveries d
    WHERE d.state IN ('bounced', 'expired') AND d.due_at IS NOT NULL
    ORDER BY d.queue_id, d.number
    LIMIT :most
    FOR UPDATE OF d
)
UPDATE deliveries d
SET
    -- event: fsck with a pending DSN
    state = 'held', due_at = NULL, finished_at = NULL,
    last_reply = :reply || coalesce(last_reply, ''), reason_source = 'operator'
FROM p
WHERE d.queue_id = p.queue_id AND d.number = p.number
RETURNING d.queue_id, d.number;

-- name: advance_segment
-- All messages up to the end have rows, so no spooler makes them again.
INSERT INTO segments (id, committed_to) VALUES (:segment, :end)
ON CONFLICT (id) DO UPDATE SET committed_to = :end
WHERE segments.sealed_at IS NULL AND segments.committed_to < :end;

-- name: insert_sealed
-- A copy, which is never replayed.
INSERT INTO segments (id, committed_to, sealed_at) VALUES (:segment, :end, now())
ON CONFLICT DO NOTHING;
