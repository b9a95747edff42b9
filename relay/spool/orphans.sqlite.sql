-- Files without a message or without a use, on SQLite.

-- name: file_states
-- For each id: whether any row has it, and whether the body may be deleted. A worker removes the
-- body of a message that it finished within `:grace` seconds.
SELECT replace(x.queue_id, '-', '') AS queue_id,
    EXISTS (SELECT 1 FROM messages m WHERE m.id = x.queue_id)
    OR EXISTS (SELECT 1 FROM deliveries d WHERE d.queue_id = x.queue_id)
    OR EXISTS (SELECT 1 FROM recipients r WHERE r.queue_id = x.queue_id) AS has_row,
    EXISTS (SELECT 1 FROM deliveries d WHERE d.queue_id = x.queue_id)
    AND NOT EXISTS (
        SELECT 1 FROM deliveries d WHERE d.queue_id = x.queue_id
        AND (d.state IN ('queued', 'sending', 'deferred', 'held') OR d.due_at IS NOT NULL
            OR d.finished_at > (SELECT now FROM clock) - CAST(:grace * 1000000 AS INTEGER)))
    AND NOT EXISTS (
        SELECT 1 FROM recipients r
        LEFT JOIN deliveries d ON d.queue_id = r.queue_id AND d.number = r.delivery
        WHERE r.queue_id = x.queue_id AND d.number IS NULL) AS deletable
FROM (SELECT value AS queue_id FROM json_each(:ids)) AS x;

-- name: clock
-- Seconds since 1970.
SELECT now / 1000000.0 AS seconds FROM clock;

-- name: newest_age
-- Seconds since the newest message was received.
SELECT ((SELECT now FROM clock) - received_at) / 1000000.0 AS seconds
FROM messages ORDER BY id DESC LIMIT 1;
