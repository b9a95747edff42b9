-- What the cleaner removes, on SQLite.

-- name: finished_messages
-- Messages of which nothing is needed any more, of which no event waits, and that were finished
-- `:retention` seconds ago.
-- Ids begin with their time, so `:bound` makes an index scan.
SELECT replace(m.id, '-', '') AS queue_id FROM messages m
WHERE m.id < :bound
    AND m.received_at < (SELECT now FROM clock) - CAST(:retention * 1000000 AS INTEGER)
    AND EXISTS (SELECT 1 FROM deliveries d WHERE d.queue_id = m.id)
    AND NOT EXISTS (
        SELECT 1 FROM deliveries d WHERE d.queue_id = m.id
        AND (d.state IN ('queued', 'sending', 'deferred', 'held') OR d.due_at IS NOT NULL
            OR d.finished_at >= (SELECT now FROM clock) - CAST(:retention * 1000000 AS INTEGER)))
    AND NOT EXISTS (SELECT 1 FROM notifications n WHERE n.queue_id = m.id)
    AND NOT EXISTS (
        SELECT 1 FROM recipients r
        LEFT JOIN deliveries d ON d.queue_id = r.queue_id AND d.number = r.delivery
        WHERE r.queue_id = m.id AND d.number IS NULL)
ORDER BY m.id LIMIT :most;

-- name: delete_messages
-- The row of the message is the last: it is how the others are found.
DELETE FROM attempts WHERE queue_id IN (SELECT value FROM json_each(:ids));
DELETE FROM events WHERE queue_id IN (SELECT value FROM json_each(:ids));
DELETE FROM audit_deliveries WHERE queue_id IN (SELECT value FROM json_each(:ids));
DELETE FROM recipients WHERE queue_id IN (SELECT value FROM json_each(:ids));
DELETE FROM deliveries WHERE queue_id IN (SELECT value FROM json_each(:ids));
DELETE FROM messages WHERE id IN (SELECT value FROM json_each(:ids));

-- name: delete_ended
-- What ended workers and limits of DSNs leave behind.
DELETE FROM open_circuits
WHERE worker IN (SELECT id FROM workers WHERE ended_at IS NOT NULL);
DELETE FROM dsn_limits
WHERE last_at < (SELECT now FROM clock) - CAST(:limits * 1000000 AS INTEGER);
DELETE FROM workers
WHERE ended_at < (SELECT now FROM clock) - CAST(:retention * 1000000 AS INTEGER);
