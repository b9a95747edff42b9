-- What `fsck --discard` asks and changes (commands/ops/discard.py), on PostgreSQL.

-- name: needed_by
-- The first messages of a segment whose bodies a delivery needs. It reads the whole table.
SELECT replace(m.id::text, '-', '') AS id
FROM messages m
WHERE m.segment = :segment
    AND (EXISTS (SELECT 1 FROM deliveries d WHERE d.queue_id = m.id
            AND (d.state IN ('queued', 'sending', 'deferred', 'held')
                OR d.due_at IS NOT NULL))
        OR EXISTS (SELECT 1 FROM recipients r
            LEFT JOIN deliveries d ON d.queue_id = r.queue_id AND d.number = r.delivery
            WHERE r.queue_id = m.id AND d.number IS NULL)
        OR NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.queue_id = m.id))
ORDER BY m.id
LIMIT :most;

-- name: delete_segment
DELETE FROM segments WHERE id = :segment;
