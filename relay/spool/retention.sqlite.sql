-- Which bodies may be deleted, on SQLite.

-- name: deletable_bodies
-- Those of the messages in `:ids` of which the whole rule is true.
SELECT replace(x.queue_id, '-', '') AS queue_id
FROM (SELECT value AS queue_id FROM json_each(:ids)) AS x
WHERE EXISTS (SELECT 1 FROM deliveries d WHERE d.queue_id = x.queue_id)
    AND NOT EXISTS (
        SELECT 1 FROM deliveries d WHERE d.queue_id = x.queue_id
        AND (d.state IN ('queued', 'sending', 'deferred', 'held') OR d.due_at IS NOT NULL))
    AND NOT EXISTS (
        SELECT 1 FROM recipients r
        LEFT JOIN deliveries d ON d.queue_id = r.queue_id AND d.number = r.delivery
        WHERE r.queue_id = x.queue_id AND d.number IS NULL)
ORDER BY 1;
