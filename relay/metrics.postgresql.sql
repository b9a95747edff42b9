-- The queue for Prometheus.

-- name: counts
-- Deliveries by state: all, those overdue, those behind a pause, those that expire soon, and the
-- age of the oldest message in seconds. What is behind a pause is neither overdue nor old. Each
-- part has an index of its own, so no history is scanned. A failed delivery with a due time has a
-- DSN that is pending.
WITH g AS MATERIALIZED (
    SELECT state, route, count(*) AS deliveries,
           count(*) FILTER (WHERE due_at < now()) AS overdue,
           count(*) FILTER (
               WHERE expires_at < now() + interval '6 hours'
                 AND state IN ('queued', 'deferred')) AS expiring,
           min(CAST(queue_id AS text)) AS oldest
    FROM (
        SELECT state, route, queue_id, due_at, expires_at FROM deliveries WHERE state = 'queued'
        UNION ALL
        SELECT state, route, queue_id, due_at, expires_at FROM deliveries WHERE state = 'sending'
        UNION ALL
        SELECT state, route, queue_id, due_at, expires_at FROM deliveries WHERE state = 'deferred'
        UNION ALL
        SELECT state, route, queue_id, due_at, expires_at FROM deliveries WHERE state = 'held'
        UNION ALL
        SELECT state, route, queue_id, due_at, expires_at
        FROM deliveries
        WHERE state IN ('bounced', 'expired') AND due_at IS NOT NULL
    ) d
    GROUP BY state, route
), x AS (
    SELECT g.state, CAST(sum(g.deliveries) AS bigint) AS deliveries,
           CAST(sum(CASE WHEN p.route IS NULL THEN g.overdue ELSE 0 END) AS bigint) AS overdue,
           CAST(sum(CASE WHEN p.route IS NULL THEN 0 ELSE g.deliveries END) AS bigint) AS paused,
           CAST(sum(g.expiring) AS bigint) AS expiring,
           min(CASE WHEN p.route IS NULL THEN g.oldest END) AS oldest
    FROM g
    LEFT JOIN paused_routes p ON p.route = g.route AND g.state IN ('queued', 'deferred')
    GROUP BY g.state
)
SELECT x.state, x.deliveries, x.overdue, x.paused, x.expiring,
       coalesce(CAST(extract(epoch FROM now() - m.received_at) AS float8), 0) AS age
FROM x
LEFT JOIN messages m ON m.id = CAST(x.oldest AS uuid);

-- name: waiting
-- Deliveries that wait, under each server of their route.
SELECT s.server, coalesce(CAST(sum(w.waiting) AS bigint), 0) AS waiting
FROM route_servers s
LEFT JOIN waiting_routes w ON w.route = s.route
GROUP BY s.server;

-- name: totals
-- Workers that are alive, and attempts of the last hour whose end is unknown.
SELECT (SELECT count(*) FROM workers WHERE ended_at IS NULL AND lease_expires_at > now())
           AS workers,
       (SELECT count(*)
        FROM attempts
        WHERE finished_at > now() - interval '1 hour' AND outcome IN ('uncertain', 'malformed'))
           AS uncertain;

-- name: paused
-- What is paused, and for how many seconds.
SELECT subject, CAST(extract(epoch FROM now() - since) AS float8) AS seconds FROM pauses;

-- name: failing
-- For how many seconds servers have had an open circuit in a worker that has not ended.
SELECT c.server, CAST(extract(epoch FROM now() - min(c.since)) AS float8) AS seconds
FROM open_circuits c
JOIN workers w ON w.id = c.worker
WHERE w.ended_at IS NULL AND c.since IS NOT NULL
GROUP BY c.server;

-- name: journal
-- Sealed segments, the bytes in them that deliveries need as last seen, and the mark of the spool.
SELECT count(*) AS segments, CAST(coalesce(sum(live_bytes), 0) AS bigint) AS live,
    coalesce((SELECT max(mark) FROM spool), 0) AS mark
FROM segments
WHERE sealed_at IS NOT NULL;

-- name: notifications
-- By subscription: the events that wait, the age of the oldest, and whether it is disabled.
SELECT s.name, count(n.sequence) AS pending,
       coalesce(CAST(extract(epoch FROM now() - min(n.queued_at)) AS float8), 0.0) AS lag,
       CASE WHEN s.disabled_at IS NULL THEN 0 ELSE 1 END AS disabled
FROM subscriptions s LEFT JOIN notifications n ON n.subscription = s.name
GROUP BY s.name, s.disabled_at
ORDER BY s.name;
