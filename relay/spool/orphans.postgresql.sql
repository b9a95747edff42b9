-- Files without a message or without a use, on PostgreSQL.

-- name: file_states
-- For each id: whether any row has it, and whether the body may be deleted. A worker removes the
-- body of a message that it finished within `:grace` seconds.
SELECT replace(CAST(x.queue_id AS text), '-', '') AS queue_id,
    EXISTS (SELECT 1 FROM messages m WHERE m.id = x.queue_id)
    OR EXISTS (SELECT 1 FROM deliveries d WHERE d.queue_id = x.queue_id)
    OR EXISTS (SELECT 1 FROM recipients r WHERE r.queue_id = x.queue_id) AS has_row,
    EXISTS (SELECT 1 FROM deliveries d WHERE d.queue_id = x.queue_id)
    AND NOT EXISTS (
        SELECT 1 FROM deliveries d WHERE d.queue_id = x.queue_id
        AND (d.state IN ('queued', 'sending', 'deferred', 'held') OR d.due_at IS NOT NULL
            OR d.finished_at > now() - :grace * interval '1 second'))
    AND NOT EXISTS (
        SELECT 1 FROM recipients r
        LEFT JOIN deliveries d ON d.queue_id = r.queue_id AND d.number = r.delivery
        WHERE r.queue_id = x.queue_id AND d.number IS NULL) AS deletable
FROM (SELECT CAST(value AS uuid) AS queue_id
    FROM json_array_elements_text(CAST(:ids AS json))) AS x;

-- name: clock
-- Seconds since 1970.
SELECT CAST(extract(epoch FROM now()) AS float8) AS seconds;

-- name: newest_age
-- Seconds since the newest message was received.
SELECT CAST(extract(epoch FROM now() - received_at) AS float8) AS seconds
FROM messages ORDER BY id DESC LIMIT 1;
