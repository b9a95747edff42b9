-- Which bodies may be deleted, on PostgreSQL.

-- name: deletable_bodies
-- Those of the messages in `:ids` of which the whole rule is true.
SELECT replace(CAST(x.queue_id AS text), '-', '') AS queue_id
FROM (SELECT CAST(value AS uuid) AS queue_id
    FROM json_array_elements_text(CAST(:ids AS json))) AS x
WHERE EXISTS (SELECT 1 FROM deliveries d WHERE d.queue_id = x.queue_id)
    AND NOT EXISTS (
        SELECT 1 FROM deliveries d WHERE d.queue_id = x.queue_id
        AND (d.state IN ('queued', 'sending', 'deferred', 'held') OR d.due_at IS NOT NULL))
    AND NOT EXISTS (
        SELECT 1 FROM recipients r
        LEFT JOIN deliveries d ON d.queue_id = r.queue_id AND d.number = r.delivery
        WHERE r.queue_id = x.queue_id AND d.number IS NULL)
ORDER BY 1;
