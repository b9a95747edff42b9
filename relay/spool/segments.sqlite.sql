-- Segments that may be removed or compacted (relay/spool/segments.py), on SQLite.

-- name: due_segments
-- Sealed segments to look at: those that were not looked at yet, then the most overdue ones. A
-- segment is due soon after it was sealed, and the older it is the more seldom, but every :longest
-- seconds. What counts is how many of its own intervals have passed, so the many that wait for long
-- do not hold up those that are new.
SELECT replace(id, '-', '') AS id, messages, replace(least_id, '-', '') AS least,
    replace(greatest_id, '-', '') AS greatest,
    ((SELECT now FROM clock) - sparse_since) / 1000000.0 AS sparse
FROM (
    SELECT *, ((SELECT now FROM clock) - checked_at) / 1000000.0
        / max(1.0, min(:longest, ((SELECT now FROM clock) - sealed_at) / 8000000.0)) AS intervals
    FROM segments WHERE sealed_at IS NOT NULL) AS sealed
WHERE checked_at IS NULL OR intervals >= 1
ORDER BY intervals DESC NULLS FIRST, sealed_at LIMIT :most;

-- name: unfinished_between
-- How many messages of a segment have rows, and whether any delivery between the least and the
-- greatest id of it is unfinished. Deliveries of other segments may be among them.
SELECT
    (SELECT count(*) FROM messages
     WHERE id BETWEEN :least AND :greatest AND segment = :segment) AS messages,
    EXISTS (SELECT 1 FROM deliveries WHERE queue_id BETWEEN :least AND :greatest
        AND (state IN ('queued', 'sending', 'deferred', 'held') OR due_at IS NOT NULL))
    OR EXISTS (SELECT 1 FROM recipients r
        LEFT JOIN deliveries d ON d.queue_id = r.queue_id AND d.number = r.delivery
        WHERE r.queue_id BETWEEN :least AND :greatest AND d.number IS NULL) AS unfinished;

-- name: needs
-- Of the records in `:records` those that a delivery needs, and those without a row that are
-- younger than :oldest, whose rows may have been lost.
SELECT replace(x.value ->> '$.id', '-', '') AS id, x.value ->> '$.position' AS position,
    m.id IS NOT NULL AS has_row
FROM json_each(:records) AS x
LEFT JOIN messages m ON m.id = x.value ->> '$.id'
WHERE CASE WHEN m.id IS NULL THEN x.value ->> '$.id' > :oldest
    ELSE m.segment = :segment AND m.position = x.value ->> '$.position'
        AND (NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.queue_id = m.id)
            OR EXISTS (SELECT 1 FROM deliveries d WHERE d.queue_id = m.id
                AND (d.state IN ('queued', 'sending', 'deferred', 'held')
                    OR d.due_at IS NOT NULL))
            OR EXISTS (SELECT 1 FROM recipients r
                LEFT JOIN deliveries d ON d.queue_id = r.queue_id AND d.number = r.delivery
                WHERE r.queue_id = m.id AND d.number IS NULL))
    END;

-- name: needed_in
-- Whether a delivery needs a body of a segment, by the rows between its least and greatest id.
SELECT EXISTS (
    SELECT 1 FROM messages m
    WHERE m.id BETWEEN :least AND :greatest AND m.segment = :segment
        AND (NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.queue_id = m.id)
            OR EXISTS (SELECT 1 FROM deliveries d WHERE d.queue_id = m.id
                AND (d.state IN ('queued', 'sending', 'deferred', 'held')
                    OR d.due_at IS NOT NULL))
            OR EXISTS (SELECT 1 FROM recipients r
                LEFT JOIN deliveries d ON d.queue_id = r.queue_id AND d.number = r.delivery
                WHERE r.queue_id = m.id AND d.number IS NULL))) AS needed;

-- name: now
-- Seconds since 1970.
SELECT now / 1000000.0 AS seconds FROM clock;

-- name: looked_at
UPDATE segments SET checked_at = (SELECT now FROM clock), live_bytes = :live,
    sparse_since = CASE WHEN :sparse THEN coalesce(sparse_since, (SELECT now FROM clock)) END
WHERE id = :segment;

-- name: postpone
-- Segments that could not be looked at: others come first.
UPDATE segments SET checked_at = (SELECT now FROM clock)
WHERE id IN (SELECT value FROM json_each(:ids));

-- name: look_again
-- Segments for which a turn had no time: they come in the next turn, behind all others that are due.
UPDATE segments
SET checked_at = (SELECT now FROM clock) - min(CAST(:longest * 1000000 AS INTEGER),
    ((SELECT now FROM clock) - sealed_at) / 8)
WHERE id IN (SELECT value FROM json_each(:ids));

-- name: delete_segment
DELETE FROM segments WHERE id = :segment;

-- name: insert_copy
INSERT INTO segments (id, committed_to, sealed_at, messages, live_bytes, checked_at)
VALUES (:segment, :end, (SELECT now FROM clock), :count, :live, (SELECT now FROM clock));

-- name: move_bodies
-- Bodies that were copied; one that is not at its old place any more stays where it is.
UPDATE messages SET segment = :segment, position = x.value ->> '$.position'
FROM json_each(:moves) AS x
WHERE messages.id = x.value ->> '$.id' AND messages.segment = x.value ->> '$.old_segment'
    AND messages.position = x.value ->> '$.old_position';

-- name: recheck
UPDATE segments SET checked_at = NULL WHERE id IN (SELECT value FROM json_each(:ids));

-- name: known_segments
SELECT replace(id, '-', '') AS id FROM segments;

-- name: total_live
-- Bytes that deliveries need, as last seen, in sealed segments.
SELECT count(*) AS segments, coalesce(sum(live_bytes), 0) AS live FROM segments
WHERE sealed_at IS NOT NULL;
