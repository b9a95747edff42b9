-- The statements of fsck. Each `find_...` reads rows that no statement of the relay creates, and
-- its `repair_...` repairs at most :most of them; both return the keys of deliveries.
-- A repair locks in key order, so that it never deadlocks with the workers.

-- name: find_no_due_time
SELECT d.queue_id, d.number
FROM deliveries d
WHERE d.due_at IS NULL AND d.state IN ('queued', 'deferred')
ORDER BY d.queue_id, d.number
LIMIT :most;

-- name: repair_no_due_time
WITH p AS MATERIALIZED (
    SELECT d.queue_id, d.number
    FROM deliveries d
    WHERE d.due_at IS NULL AND d.state IN ('queued', 'deferred')
    ORDER BY d.queue_id, d.number
    LIMIT :most
    FOR UPDATE OF d
)
UPDATE deliveries d
SET due_at = now()
FROM p
WHERE d.queue_id = p.queue_id AND d.number = p.number
RETURNING d.queue_id, d.number;

-- name: find_useless_due_time
SELECT d.queue_id, d.number
FROM deliveries d
WHERE d.due_at IS NOT NULL AND d.state IN ('held', 'split', 'delivered', 'dropped')
ORDER BY d.queue_id, d.number
LIMIT :most;

-- name: repair_useless_due_time
WITH p AS MATERIALIZED (
    SELECT d.queue_id, d.number
    FROM deliveries d
    WHERE d.due_at IS NOT NULL AND d.state IN ('held', 'split', 'delivered', 'dropped')
    ORDER BY d.queue_id, d.number
    LIMIT :most
    FOR UPDATE OF d
)
UPDATE deliveries d
SET due_at = NULL
FROM p
WHERE d.queue_id = p.queue_id AND d.number = p.number
RETURNING d.queue_id, d.number;

-- name: find_no_finish_time
SELECT d.queue_id, d.number
FROM deliveries d
WHERE d.finished_at IS NULL AND d.state IN ('delivered', 'bounced', 'expired', 'dropped')
ORDER BY d.queue_id, d.number
LIMIT :most;

-- name: repair_no_finish_time
-- The row is kept no longer than others.
WITH p AS MATERIALIZED (
    SELECT d.queue_id, d.number
    FROM deliveries d
    WHERE d.finished_at IS NULL AND d.state IN ('delivered', 'bounced', 'expired', 'dropped')
    ORDER BY d.queue_id, d.number
    LIMIT :most
    FOR UPDATE OF d
)
UPDATE deliveries d
SET finished_at = now()
FROM p
WHERE d.queue_id = p.queue_id AND d.number = p.number
RETURNING d.queue_id, d.number;

-- name: find_held_without_recipient
SELECT d.queue_id, d.number
FROM deliveries d
WHERE d.state = 'held' AND NOT EXISTS (
    SELECT 1 FROM recipients r WHERE r.queue_id = d.queue_id AND r.delivery = d.number
)
ORDER BY d.queue_id, d.number
LIMIT :most;

-- name: find_without_recipient
SELECT d.queue_id, d.number
FROM deliveries d
WHERE d.state IN ('queued', 'deferred') AND NOT EXISTS (
    SELECT 1 FROM recipients r WHERE r.queue_id = d.queue_id AND r.delivery = d.number
)
ORDER BY d.queue_id, d.number
LIMIT :most;

-- name: repair_without_recipient
WITH p AS MATERIALIZED (
    SELECT d.queue_id, d.number
    FROM deliveries d
    WHERE d.state IN ('queued', 'deferred') AND NOT EXISTS (
        SELECT 1 FROM recipients r WHERE r.queue_id = d.queue_id AND r.delivery = d.number
    )
    ORDER BY d.queue_id, d.number
    LIMIT :most
    FOR UPDATE OF d
)
UPDATE deliveries d
SET
    -- event: fsck
    state = 'held', due_at = NULL, last_reply = 'held by fsck: it has no recipient',
    reason_source = 'operator'
FROM p
WHERE d.queue_id = p.queue_id AND d.number = p.number
RETURNING d.queue_id, d.number;

-- name: find_without_message
-- Such a delivery needs the body of its message.
SELECT d.queue_id, d.number
FROM deliveries d
WHERE (d.state IN ('queued', 'sending', 'deferred', 'held') OR d.due_at IS NOT NULL)
  AND NOT EXISTS (SELECT 1 FROM messages m WHERE m.id = d.queue_id)
ORDER BY d.queue_id, d.number
LIMIT :most;

-- name: find_sent_by_ended_worker
SELECT d.queue_id, d.number
FROM deliveries d
WHERE d.state = 'sending'
  AND EXISTS (
      SELECT 1
      FROM workers w
      WHERE w.id = d.worker
        AND w.ended_at < now() - :late * interval '1 second'
  )
ORDER BY d.queue_id, d.number
LIMIT :most;

-- name: repair_sent_by_ended_worker
-- Their attempts are then recorded as uncertain.
SELECT d.queue_id, d.number
FROM deliveries d
WHERE d.state = 'sending'
  AND EXISTS (
      SELECT 1
      FROM workers w
      WHERE w.id = d.worker
        AND w.ended_at < now() - :late * interval '1 second'
  )
ORDER BY d.queue_id, d.number
LIMIT :most
FOR UPDATE OF d;

-- name: find_sent_by_unknown_worker
SELECT d.queue_id, d.number
FROM deliveries d
WHERE d.state = 'sending' AND NOT EXISTS (SELECT 1 FROM workers w WHERE w.id = d.worker)
ORDER BY d.queue_id, d.number
LIMIT :most;

-- name: repair_sent_by_unknown_worker
-- Their attempts are then recorded as uncertain.
SELECT d.queue_id, d.number
FROM deliveries d
WHERE d.state = 'sending' AND NOT EXISTS (SELECT 1 FROM workers w WHERE w.id = d.worker)
ORDER BY d.queue_id, d.number
LIMIT :most
FOR UPDATE OF d;

-- name: find_recipient_without_delivery
SELECT r.queue_id, r.delivery
FROM recipients r
LEFT JOIN deliveries d ON d.queue_id = r.queue_id AND d.number = r.delivery
WHERE d.number IS NULL
LIMIT :most;

-- name: repair_recipient_without_delivery
INSERT INTO deliveries (queue_id, number, route, state, expires_at, last_reply, reason_source)
-- event: fsck
SELECT DISTINCT r.queue_id, r.delivery, 'default', 'held', now() + :lifetime * interval '1 second',
       'held by fsck: it had no delivery', 'operator'
FROM recipients r
LEFT JOIN deliveries d ON d.queue_id = r.queue_id AND d.number = r.delivery
WHERE d.number IS NULL
ORDER BY 1, 2
LIMIT :most
ON CONFLICT DO NOTHING
RETURNING queue_id, number;

-- name: find_message_without_recipients
SELECT m.id
FROM messages m
WHERE NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.queue_id = m.id)
  AND NOT EXISTS (SELECT 1 FROM recipients r WHERE r.queue_id = m.id)
ORDER BY m.id
LIMIT :most;

-- name: needed_bodies
-- The next messages that have unfinished deliveries, whether all of these are held, and the place
-- of the body in the journal (empty: a file).
SELECT m.id, m.size, min(d.state) = 'held' AND max(d.state) = 'held' AS held,
    replace(CAST(m.segment AS text), '-', '') AS segment, m.position
FROM deliveries d
JOIN messages m ON m.id = d.queue_id
WHERE d.state IN ('queued', 'sending', 'deferred', 'held') AND m.id > CAST(:after AS uuid)
GROUP BY m.id, m.size, m.segment, m.position
ORDER BY m.id
LIMIT :most;

-- name: body_needed
SELECT count(*) AS count
FROM deliveries
WHERE queue_id = CAST(:id AS uuid)
  AND (state IN ('queued', 'sending', 'deferred', 'held') OR due_at IS NOT NULL);

-- name: hold
-- Holds the deliveries of a message whose body cannot be sent.
UPDATE deliveries
SET
    -- event: fsck
    state = 'held', due_at = NULL, last_outcome = 'unsendable', last_reply = :reply,
    reason_source = 'operator'
WHERE queue_id = CAST(:id AS uuid) AND state IN ('queued', 'deferred')
RETURNING queue_id, number;

-- name: expired_workers
-- Workers whose lease expired long ago.
SELECT replace(CAST(w.id AS text), '-', '') AS worker, w.host, w.pid,
       CAST(w.lease_expires_at AS text) AS until,
       CAST(extract(epoch FROM now() - w.lease_expires_at) AS float8) AS age,
       (SELECT count(*) FROM deliveries d WHERE d.state = 'sending' AND d.worker = w.id) AS sending
FROM workers w
WHERE w.ended_at IS NULL AND w.lease_expires_at < now() - :long * interval '1 second';

-- name: workers_alive
SELECT count(*) AS count
FROM workers
WHERE ended_at IS NULL AND lease_expires_at > now();

-- name: overdue
-- Deliveries that a worker should have handled long ago. A queued one may wait for a free
-- connection while others are sent, and an operator may have paused its route.
SELECT state, count(*) AS deliveries,
       CAST(extract(epoch FROM now() - min(due_at)) AS float8) AS late
FROM deliveries
WHERE due_at < now() - :late * interval '1 second'
  AND NOT EXISTS (SELECT 1 FROM pauses p WHERE p.subject = 'route:' || route)
  AND (
      state <> 'queued'
      OR due_at < now() - :very_late * interval '1 second'
      OR NOT EXISTS (
          SELECT 1 FROM attempts WHERE finished_at > now() - :late * interval '1 second'
      )
  )
GROUP BY state
ORDER BY state;

-- name: segment_rows
SELECT replace(CAST(id AS text), '-', '') AS id, sealed_at IS NOT NULL AS sealed
FROM segments
ORDER BY id;
