-- A sweeper's statements (relay/queue/rescue.py). A transaction is the only writer from its
-- beginning, so nothing is locked. SQLite has no statistics: INDEXED BY names the index where it
-- would choose another.

-- name: expired_leases
-- No lease is longer than half of the time that its worker has for a claim. A lease that ends later
-- was written before the clock was set back.
SELECT replace(id, '-', '') AS worker, CAST(lease_expires_at AS text) AS until
FROM workers
WHERE ended_at IS NULL
    AND (lease_expires_at < (SELECT now FROM clock)
        OR lease_expires_at > (SELECT now FROM clock) + claim_seconds / 2 * 1000000);

-- name: expire_worker
-- Fails if the worker has renewed its lease since it was seen.
UPDATE workers SET ended_at = (SELECT now FROM clock), end_reason = 'expired'
WHERE id = :worker AND ended_at IS NULL AND CAST(lease_expires_at AS text) = :until;

-- name: sending_by_worker
SELECT queue_id, number FROM deliveries INDEXED BY deliveries_sending
WHERE state = 'sending' AND worker = :worker
ORDER BY queue_id, number;

-- name: sending_too_long
SELECT queue_id, number FROM deliveries INDEXED BY deliveries_sending
WHERE state = 'sending' AND due_at <= (SELECT now FROM clock)
ORDER BY queue_id, number;

-- name: sending_unowned
-- Deliveries that are being sent by a worker that has ended.
SELECT queue_id, number FROM deliveries AS d INDEXED BY deliveries_sending
WHERE state = 'sending'
    AND EXISTS (SELECT 1 FROM workers w WHERE w.id = d.worker AND w.ended_at IS NOT NULL)
ORDER BY queue_id, number;

-- name: mark_uncertain
-- Makes deliveries in flight `uncertain`, each with an attempt that says so. A pending operation
-- takes effect. Retries are spread by jitter.
INSERT INTO attempts (queue_id, delivery, claim, attempt_index, worker, server, started_at,
    finished_at, outcome, reply, bytes_sent)
SELECT d.queue_id, d.number, d.claim_count, 0, d.worker, NULL, (SELECT now FROM clock),
    (SELECT now FROM clock), 'uncertain', :why, 0
FROM json_each(:keys)
    JOIN deliveries d ON d.queue_id = value ->> '$.queue_id' AND d.number = value ->> '$.number'
WHERE d.state = 'sending'
ON CONFLICT DO NOTHING;
UPDATE deliveries
-- event: worker lost, pending operation
SET state = x.final,
    due_at = CASE
        WHEN x.final = 'deferred' THEN (SELECT now FROM clock)
            + CAST(:delay * (1000000 + :jitter * abs(random() % 1000000)) AS INTEGER)
        WHEN x.final = 'queued' THEN (SELECT now FROM clock) + CAST(:grace * 1000000 AS INTEGER)
        WHEN x.final IN ('bounced', 'expired') AND :sends_dsns AND (
            SELECT m.sender NOT IN ('', '#@[]') OR m.dsn_content IS NOT NULL
            FROM messages m WHERE m.id = deliveries.queue_id) THEN (SELECT now FROM clock) END,
    finished_at = CASE WHEN x.final IN ('bounced', 'expired', 'dropped')
        THEN (SELECT now FROM clock) END,
    worker = NULL, pending_operation = NULL, pending_reason = NULL,
    crash_count = crash_count + 1, last_outcome = 'uncertain',
    last_reply = CASE WHEN pending_operation IN ('hold', 'drop', 'bounce')
        THEN coalesce(pending_reason, x.final || ' by an operator') ELSE :why END,
    reason_source = CASE WHEN pending_operation IN ('hold', 'drop', 'bounce')
        THEN 'operator' ELSE 'relay' END
FROM (
    SELECT d.queue_id, d.number,
        -- event: worker lost, pending operation
        CASE WHEN d.pending_operation = 'hold' THEN 'held'
             WHEN d.pending_operation = 'drop' THEN 'dropped'
             WHEN d.pending_operation = 'bounce' THEN 'bounced'
             WHEN d.pending_operation IS NOT NULL THEN 'queued'
             WHEN d.crash_count + 1 >= :poison OR :hold THEN 'held'
             WHEN d.expires_at <= (SELECT now FROM clock) THEN 'expired'
             ELSE 'deferred' END AS final
    FROM json_each(:keys) JOIN deliveries d
        ON d.queue_id = value ->> '$.queue_id' AND d.number = value ->> '$.number'
    WHERE d.state = 'sending'
) AS x
WHERE deliveries.queue_id = x.queue_id AND deliveries.number = x.number;

-- name: publish_open_circuits
-- A circuit that stays open keeps the time when it opened.
DELETE FROM open_circuits
WHERE worker = :worker AND server NOT IN (SELECT key FROM json_each(:circuits));
INSERT INTO open_circuits (worker, server, why, since)
SELECT :worker, key, value, (SELECT now FROM clock) FROM json_each(:circuits)
WHERE true ON CONFLICT (worker, server) DO UPDATE SET why = excluded.why;

-- name: publish_routes
UPDATE workers SET routes = :routes WHERE id = :worker;

-- name: pauses
SELECT subject FROM pauses;

-- name: routes_of_waiting_mail
-- One arm for each index.
SELECT route FROM deliveries WHERE state = 'queued'
UNION SELECT route FROM deliveries WHERE state = 'deferred';

-- name: routes_of_workers
SELECT routes FROM workers WHERE ended_at IS NULL AND routes IS NOT NULL;

-- name: bring_near_queued
-- The three `bring_near` statements: a `due_at` further ahead than any wait was written before the
-- clock was set back. This one names both kinds of queued mail, because the index has them between
-- the route and the time.
UPDATE deliveries SET due_at = (SELECT now FROM clock)
WHERE (queue_id, number) IN (
    SELECT queue_id, number FROM deliveries
    WHERE state = 'queued' AND CAST(claim_count > 0 AS integer) IN (0, 1)
        AND route IN (SELECT value FROM json_each(:routes))
        AND due_at > (SELECT now FROM clock) + CAST((:grace + :slack) * 1000000 AS INTEGER)
    LIMIT :most);

-- name: bring_near_deferred
UPDATE deliveries SET due_at = (SELECT now FROM clock)
WHERE (queue_id, number) IN (
    SELECT queue_id, number FROM deliveries
    WHERE state = 'deferred'
        AND due_at > (SELECT now FROM clock) + CAST((:longest + :slack) * 1000000 AS INTEGER)
    LIMIT :most);

-- name: bring_near_sending
-- A delivery that is being sent gets the time of a new claim, because its worker may live.
UPDATE deliveries SET due_at = (SELECT now FROM clock) + CAST(:far * 1000000 AS INTEGER)
WHERE (queue_id, number) IN (
    SELECT queue_id, number FROM deliveries
    WHERE state = 'sending'
        AND due_at > (SELECT now FROM clock) + CAST((:far + :slack) * 1000000 AS INTEGER)
    LIMIT :most);

-- name: waiting_routes
-- Those of the routes that deferred mail waits for.
SELECT x.value FROM json_each(:routes) AS x
WHERE (SELECT 1 FROM deliveries d
       WHERE d.state = 'deferred' AND d.waiting_for = 'route:' || x.value LIMIT 1) IS NOT NULL;

-- name: wake
-- Makes mail that waits for a route overdue, the longest due first, until :most of the route is
-- overdue. Their order stands in `due_at` afterwards.
WITH p AS MATERIALIZED (
    SELECT queue_id, number, row_number() OVER (ORDER BY due_at) AS rank FROM deliveries
    WHERE state = 'deferred' AND waiting_for = 'route:' || :route
    ORDER BY due_at
    LIMIT (
        SELECT :most - count(*) FROM (
            SELECT 1 FROM deliveries
            WHERE state = 'queued' AND CAST(claim_count > 0 AS integer) = 0 AND route = :route
                AND due_at <= (SELECT now FROM clock)
            UNION ALL
            SELECT 1 FROM deliveries
            WHERE state = 'queued' AND CAST(claim_count > 0 AS integer) = 1 AND route = :route
                AND due_at <= (SELECT now FROM clock)
            LIMIT :most) AS overdue)
)
UPDATE deliveries
-- event: route available
SET state = 'queued', due_at = (SELECT now FROM clock) - (:most - p.rank) * 1000
FROM p WHERE deliveries.queue_id = p.queue_id AND deliveries.number = p.number
RETURNING replace(deliveries.queue_id, '-', '') AS queue_id;

-- name: requeue_due
-- Makes deferred deliveries whose time has come `queued`, the longest due first.
UPDATE deliveries
-- event: due
SET state = 'queued', due_at = (SELECT now FROM clock) + CAST(:grace * 1000000 AS INTEGER)
WHERE (queue_id, number) IN (
    SELECT queue_id, number FROM deliveries
    WHERE state = 'deferred' AND due_at <= (SELECT now FROM clock)
    ORDER BY due_at LIMIT :most)
RETURNING route, replace(queue_id, '-', '') AS queue_id;
