-- Segments that may be removed or compacted (relay/spool/segments.py), on PostgreSQL.

-- name: due_segments
-- Sealed segments to look at: those that were not looked at yet, then the most overdue ones. A
-- segment is due soon after it was sealed, and the older it is the more seldom, but every :longest
-- seconds. What counts is how many of its own intervals have passed, so the many that wait for long
-- do not hold up those that are new.
SELECT replace(CAST(id AS text), '-', '') AS id, messages,
    replace(CAST(least_id AS text), '-', '') AS least,
    replace(CAST(greatest_id AS text), '-', '') AS greatest,
    CAST(extract(epoch FROM now() - sparse_since) AS float8) AS sparse
FROM (
    SELECT *, extract(epoch FROM now() - checked_at)
        / greatest(1, least(:longest, extract(epoch FROM now() - sealed_at) / 8)) AS intervals
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
SELECT replace(CAST(x.id AS text), '-', '') AS id, x.position, m.id IS NOT NULL AS has_row
FROM json_to_recordset(CAST(:records AS json)) AS x(id uuid, position bigint)
LEFT JOIN messages m ON m.id = x.id
WHERE CASE WHEN m.id IS NULL THEN x.id > CAST(:oldest AS uuid)
    ELSE m.segment = CAST(:segment AS uuid) AND m.position = x.position
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
SELECT CAST(extract(epoch FROM now()) AS float8) AS seconds;

-- name: looked_at
UPDATE segments SET checked_at = now(), live_bytes = :live,
    sparse_since = CASE WHEN :sparse THEN coalesce(sparse_since, now()) END
WHERE id = :segment;

-- name: postpone
-- Segments that could not be looked at: others come first.
UPDATE segments SET checked_at = now()
WHERE id = ANY (ARRAY(
    SELECT CAST(value AS uuid) FROM json_array_elements_text(CAST(:ids AS json))));

-- name: look_again
-- Segments for which a turn had no time: they come in the next turn, behind all others that are due.
UPDATE segments
SET checked_at = now() - least(:longest, extract(epoch FROM now() - sealed_at) / 8)
    * interval '1 second'
WHERE id = ANY (ARRAY(
    SELECT CAST(value AS uuid) FROM json_array_elements_text(CAST(:ids AS json))));

-- name: delete_segment
DELETE FROM segments WHERE id = :segment;

-- name: insert_copy
INSERT INTO segments (id, committed_to, sealed_at, messages, live_bytes, checked_at)
VALUES (:segment, :end, now(), :count, :live, now());

-- name: move_bodies
-- Bodies that were copied; one that is not at its old place any more stays where it is.
UPDATE messages m SET segment = :segment, position = x.position
FROM json_to_recordset(CAST(:moves AS json)) AS x(
    id uuid, old_segment uuid, old_position bigint, position bigint)
WHERE m.id = x.id AND m.segment = x.old_segment AND m.position = x.old_position;

-- name: recheck
UPDATE segments SET checked_at = NULL
WHERE id = ANY (ARRAY(
    SELECT CAST(value AS uuid) FROM json_array_elements_text(CAST(:ids AS json))));

-- name: known_segments
SELECT replace(CAST(id AS text), '-', '') AS id FROM segments;

-- name: total_live
-- Bytes that deliveries need, as last seen, in sealed segments.
SELECT count(*) AS segments, CAST(coalesce(sum(live_bytes), 0) AS bigint) AS live FROM segments
WHERE sealed_at IS NOT NULL;
