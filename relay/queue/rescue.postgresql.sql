-- A sweeper's statements (relay/queue/rescue.py). Sweepers work side by side, so each skips the
-- rows that another transaction has locked, or waits for them in key order.

-- name: expired_leases
-- No lease is longer than half of the time that its worker has for a claim. A lease that ends later
-- was written before the clock was set back.
SELECT replace(CAST(id AS text), '-', '') AS worker, CAST(lease_expires_at AS text) AS until
FROM workers
WHERE ended_at IS NULL
    AND (lease_expires_at < now()
        OR lease_expires_at > now() + claim_seconds / 2 * interval '1 second');

-- name: expire_worker
-- Fails if the worker has renewed its lease since it was seen.
UPDATE workers SET ended_at = now(), end_reason = 'expired'
WHERE id = :worker AND ended_at IS NULL AND CAST(lease_expires_at AS text) = :until;

-- name: sending_by_worker
SELECT queue_id, number FROM deliveries
WHERE state = 'sending' AND worker = :worker
ORDER BY queue_id, number
FOR UPDATE;

-- name: sending_too_long
SELECT queue_id, number FROM deliveries
WHERE state = 'sending' AND due_at <= now()
ORDER BY queue_id, number
FOR UPDATE;

-- name: sending_unowned
-- Deliveries that are being sent by a worker that has ended.
SELECT queue_id, number FROM deliveries d
WHERE state = 'sending'
    AND EXISTS (SELECT 1 FROM workers w WHERE w.id = d.worker AND w.ended_at IS NOT NULL)
ORDER BY queue_id, number
FOR UPDATE OF d;

-- name: mark_uncertain
-- Makes locked deliveries in flight `uncertain`, each with an attempt that says so. A pending
-- operation takes effect. Retries are spread by jitter.
WITH x AS MATERIALIZED (
    SELECT d.queue_id, d.number, d.claim_count, d.worker,
        -- event: worker lost, pending operation
        CASE WHEN d.pending_operation = 'hold' THEN 'held'
             WHEN d.pending_operation = 'drop' THEN 'dropped'
             WHEN d.pending_operation = 'bounce' THEN 'bounced'
             WHEN d.pending_operation IS NOT NULL THEN 'queued'
             WHEN d.crash_count + 1 >= :poison OR :hold THEN 'held'
             WHEN d.expires_at <= now() THEN 'expired'
             ELSE 'deferred' END AS final
    FROM json_to_recordset(CAST(:keys AS json)) AS k(queue_id uuid, number int)
        JOIN deliveries d ON d.queue_id = k.queue_id AND d.number = k.number
    WHERE d.state = 'sending'
), a AS (
    INSERT INTO attempts (queue_id, delivery, claim, attempt_index, worker, server, started_at,
        finished_at, outcome, reply, bytes_sent)
    SELECT queue_id, number, claim_count, 0, worker, NULL, now(), now(), 'uncertain', :why, 0
    FROM x
    ON CONFLICT DO NOTHING
)
UPDATE deliveries d
-- event: worker lost, pending operation
SET state = x.final,
    due_at = CASE
        WHEN x.final = 'deferred'
            THEN now() + :delay * (1 + :jitter * random()) * interval '1 second'
        WHEN x.final = 'queued' THEN now() + :grace * interval '1 second'
        WHEN x.final IN ('bounced', 'expired') AND :sends_dsns AND (
            SELECT m.sender NOT IN ('', '#@[]') OR m.dsn_content IS NOT NULL
            FROM messages m WHERE m.id = d.queue_id) THEN now() END,
    finished_at = CASE WHEN x.final IN ('bounced', 'expired', 'dropped') THEN now() END,
    worker = NULL, pending_operation = NULL, pending_reason = NULL,
    crash_count = d.crash_count + 1, last_outcome = 'uncertain',
    last_reply = CASE WHEN d.pending_operation IN ('hold', 'drop', 'bounce')
        THEN coalesce(d.pending_reason, x.final || ' by an operator') ELSE :why END,
    reason_source = CASE WHEN d.pending_operation IN ('hold', 'drop', 'bounce')
        THEN 'operator' ELSE 'relay' END
FROM x WHERE d.queue_id = x.queue_id AND d.number = x.number;

-- name: publish_open_circuits
-- A circuit that stays open keeps the time when it opened.
DELETE FROM open_circuits
WHERE worker = CAST(:worker AS uuid)
    AND server NOT IN (SELECT key FROM json_each_text(CAST(:circuits AS json)));
INSERT INTO open_circuits (worker, server, why, since)
SELECT CAST(:worker AS uuid), key, value, now() FROM json_each_text(CAST(:circuits AS json))
ON CONFLICT (worker, server) DO UPDATE SET why = excluded.why;

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
WITH p AS MATERIALIZED (
    SELECT queue_id, number FROM deliveries
    WHERE state = 'queued' AND CAST(claim_count > 0 AS integer) IN (0, 1)
        AND route IN (SELECT value FROM json_array_elements_text(CAST(:routes AS json)))
        AND due_at > now() + (:grace + :slack) * interval '1 second'
    LIMIT :most
    FOR UPDATE SKIP LOCKED
)
UPDATE deliveries d SET due_at = now()
FROM p WHERE d.queue_id = p.queue_id AND d.number = p.number;

-- name: bring_near_deferred
WITH p AS MATERIALIZED (
    SELECT queue_id, number FROM deliveries
    WHERE state = 'deferred' AND due_at > now() + (:longest + :slack) * interval '1 second'
    LIMIT :most
    FOR UPDATE SKIP LOCKED
)
UPDATE deliveries d SET due_at = now()
FROM p WHERE d.queue_id = p.queue_id AND d.number = p.number;

-- name: bring_near_sending
-- A delivery that is being sent gets the time of a new claim, because its worker may live.
WITH p AS MATERIALIZED (
    SELECT queue_id, number FROM deliveries
    WHERE state = 'sending' AND due_at > now() + (:far + :slack) * interval '1 second'
    LIMIT :most
    FOR UPDATE SKIP LOCKED
)
UPDATE deliveries d SET due_at = now() + :far * interval '1 second'
FROM p WHERE d.queue_id = p.queue_id AND d.number = p.number;

-- name: waiting_routes
-- Those of the routes that deferred mail waits for. A scalar subquery looks into the index once for
-- each route; PostgreSQL would answer EXISTS with a hash of all that waits.
SELECT x.value FROM json_array_elements_text(CAST(:routes AS json)) AS x
WHERE (SELECT 1 FROM deliveries d
       WHERE d.state = 'deferred' AND d.waiting_for = 'route:' || x.value LIMIT 1) IS NOT NULL;

-- name: wake
-- Makes mail that waits for a route overdue, the longest due first, until :most of the route is
-- overdue. Their order stands in `due_at` afterwards.
WITH w AS MATERIALIZED (
    SELECT queue_id, number, due_at FROM deliveries
    WHERE state = 'deferred' AND waiting_for = 'route:' || CAST(:route AS text)
    ORDER BY due_at
    LIMIT (
        SELECT :most - count(*) FROM (
            SELECT 1 FROM deliveries
            WHERE state = 'queued' AND CAST(claim_count > 0 AS integer) = 0
                AND route = :route AND due_at <= now()
            UNION ALL
            SELECT 1 FROM deliveries
            WHERE state = 'queued' AND CAST(claim_count > 0 AS integer) = 1
                AND route = :route AND due_at <= now()
            LIMIT :most) AS overdue)
    FOR UPDATE SKIP LOCKED
), p AS MATERIALIZED (
    SELECT queue_id, number, row_number() OVER (ORDER BY due_at) AS rank FROM w
)
UPDATE deliveries d
-- event: route available
SET state = 'queued', due_at = now() - (:most - p.rank) / 1000.0 * interval '1 second'
FROM p WHERE d.queue_id = p.queue_id AND d.number = p.number
RETURNING replace(CAST(d.queue_id AS text), '-', '') AS queue_id;

-- name: requeue_due
-- Makes deferred deliveries whose time has come `queued`, the longest due first.
WITH p AS MATERIALIZED (
    SELECT queue_id, number FROM deliveries
    WHERE state = 'deferred' AND due_at <= now()
    ORDER BY due_at LIMIT :most
    FOR UPDATE SKIP LOCKED
)
UPDATE deliveries d
-- event: due
SET state = 'queued', due_at = now() + :grace * interval '1 second'
FROM p WHERE d.queue_id = p.queue_id AND d.number = p.number
RETURNING d.route, replace(CAST(d.queue_id AS text), '-', '') AS queue_id;
