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
SELECT count(*) AS count FROM deliveries
WHERE state IN ('queued', 'sending', 'deferred');

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
    state = 'held', due_at = NULL, last_reply = :reply,
    reason_source = 'operator'
WHERE (queue_id, number) IN (
    SELECT d.queue_id, d.number
    FROM deliveries d
    WHERE d.state IN ('queued', 'deferred')
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

-- name: move_bodies
-- Bodies whose segment is gone and that compaction has copied.
UPDATE messages SET segment = :segment, position = x.value ->> '$.position'
FROM json_each(:moves) AS x
WHERE messages.id = x.value ->> '$.id' AND messages.segment = x.value ->> '$.old_segment'
    AND messages.position = x.value ->> '$.old_position';
