-- What `fsck --rebuild` asks and changes (commands/ops/rebuild.py), on SQLite.

-- name: mark
SELECT mark FROM spool;

-- name: raise_mark
UPDATE spool SET mark = :mark WHERE mark < :mark;

-- name: messages_with_rows
-- Of these messages those that have a row, and the place of each body (empty: a file).
SELECT replace(m.id, '-', '') AS id, replace(m.segment, '-', '') AS segment, m.position
FROM json_each(:ids) AS x
JOIN messages m ON m.id = x.value
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
LIMIT :most;

-- name: hold_unfinished
UPDATE deliveries
SET
    -- event: fsck
    state = 'held', due_at = NULL, warn_at = NULL, last_reply = :reply,
    reason_source = 'operator'
WHERE (queue_id, number) IN (
    SELECT d.queue_id, d.number
    FROM deliveries d
    WHERE d.state IN ('queued', 'deferred')
    ORDER BY d.queue_id, d.number
    LIMIT :most
)
RETURNING queue_id, number;

-- name: hold_pending
-- The DSN may have been sent since the backup. The reason of the failure stays in the text.
UPDATE deliveries
SET
    -- event: fsck with a pending DSN
    state = 'held', due_at = NULL, finished_at = NULL,
    last_reply = :reply || coalesce(last_reply, ''), reason_source = 'operator'
WHERE (queue_id, number) IN (
    SELECT d.queue_id, d.number
    FROM deliveries d
    WHERE d.state IN ('bounced', 'expired') AND d.due_at IS NOT NULL
    ORDER BY d.queue_id, d.number
    LIMIT :most
)
RETURNING queue_id, number;

-- name: advance_segment
-- All messages up to the end have rows, so no spooler makes them again.
INSERT INTO segments (id, committed_to) VALUES (:segment, :end)
ON CONFLICT (id) DO UPDATE SET committed_to = excluded.committed_to
WHERE segments.sealed_at IS NULL AND segments.committed_to < excluded.committed_to;

-- name: insert_sealed
-- A copy, which is never replayed.
INSERT INTO segments (id, committed_to, sealed_at)
VALUES (:segment, :end, (SELECT now FROM clock))
ON CONFLICT DO NOTHING;
