-- What is wrong with the queue as a whole (relay/report/problems.py). Times of
-- tables are microseconds.

-- name: down
-- Servers with an open circuit that no operator has paused.
SELECT server, circuit_open_reason AS reason, failed_at, circuit_open_workers AS workers, waiting
FROM server_health
WHERE circuit_open_workers > 0 AND paused_at IS NULL
ORDER BY waiting DESC, server;

-- name: late
-- Overdue mail that is not behind a pause, by state and route. `can_go`: a server of the route has
-- no open circuit in some worker, or no worker knows the route.
SELECT l.state, l.route, l.deliveries, l.due_at,
       NOT EXISTS (SELECT 1 FROM route_servers s WHERE s.route = l.route)
           OR EXISTS (
               SELECT 1 FROM route_servers s
               WHERE s.route = l.route
                 AND s.server NOT IN (
                     SELECT h.server FROM server_health h
                     WHERE h.circuit_open_workers > 0 OR h.paused_at IS NOT NULL)) AS can_go
FROM (
    SELECT 'queued' AS state, route, count(*) AS deliveries, min(due_at) AS due_at
    FROM deliveries
    WHERE state = 'queued' AND due_at < (SELECT now FROM clock) - CAST(:slack * 1000000 AS INTEGER)
    GROUP BY route
    UNION ALL
    SELECT 'deferred', route, count(*), min(due_at)
    FROM deliveries
    WHERE state = 'deferred'
        AND due_at < (SELECT now FROM clock) - CAST(:slack * 1000000 AS INTEGER)
    GROUP BY route
    UNION ALL
    SELECT 'sending', route, count(*), min(due_at)
    FROM deliveries
    WHERE state = 'sending' AND due_at < (SELECT now FROM clock) - CAST(:slack * 1000000 AS INTEGER)
    GROUP BY route
) l
WHERE l.state = 'sending' OR l.route NOT IN (SELECT p.route FROM paused_routes p)
ORDER BY l.state, l.route;

-- name: workers
-- Workers that are alive, since when none is, deliveries that are being sent, and those that wait.
SELECT (SELECT count(*) FROM workers
        WHERE ended_at IS NULL AND lease_expires_at > (SELECT now FROM clock)) AS alive,
       (SELECT max(min(coalesce(ended_at, lease_expires_at), lease_expires_at)) FROM workers)
           AS last_alive_at,
       (SELECT count(*) FROM deliveries WHERE state = 'sending') AS sending,
       (SELECT coalesce(sum(waiting), 0) FROM waiting_routes) AS waiting;

-- name: held
-- Deliveries that the relay itself has held in the last day: after an attempt, or when it accepted
-- them.
SELECT count(*) AS deliveries, min(x.held_at) AS held_at
FROM (
    SELECT coalesce((SELECT max(a.finished_at) FROM attempts a
                     WHERE a.queue_id = d.queue_id AND a.delivery = d.number),
                    m.received_at) AS held_at
    FROM deliveries d
    JOIN messages m ON m.id = d.queue_id
    WHERE d.state = 'held' AND coalesce(d.reason_source, 'relay') <> 'operator'
) x
WHERE x.held_at > (SELECT now FROM clock) - 86400000000;

-- name: uncertain
-- Deliveries that an attempt of the last day may have delivered.
SELECT count(DISTINCT queue_id || '.' || delivery) AS deliveries,
       min(finished_at) AS finished_at
FROM attempts
WHERE outcome IN ('uncertain', 'malformed') AND finished_at > (SELECT now FROM clock) - 86400000000;

-- name: expiring
-- Deliveries whose next failure in so many seconds is the last.
SELECT count(*) AS deliveries, min(expires_at) AS expires_at
FROM (
    SELECT expires_at FROM deliveries WHERE state = 'queued'
    UNION ALL
    SELECT expires_at FROM deliveries WHERE state = 'deferred'
) x
WHERE expires_at < (SELECT now FROM clock) + CAST(:soon * 1000000 AS INTEGER);

-- name: paused_long
SELECT subject, paused_at, actor, reason, deliveries
FROM paused
WHERE julianday(paused_at) < julianday('now') - 1
ORDER BY paused_at;

-- name: late_events
-- Subscriptions that are disabled, or whose oldest event has waited for :late seconds.
SELECT s.name, s.disabled_at, s.disabled_reason AS reason, s.last_error AS error,
       coalesce(n.pending, 0) AS pending, n.oldest_at
FROM subscriptions s
LEFT JOIN (
    SELECT subscription, count(*) AS pending, min(queued_at) AS oldest_at
    FROM notifications
    GROUP BY subscription
) n ON n.subscription = s.name
WHERE s.disabled_at IS NOT NULL OR n.oldest_at < (SELECT now FROM clock) - CAST(:late * 1000000 AS INTEGER)
ORDER BY s.name;

-- name: leaps
-- Routes, senders and domains with more failed deliveries in the last hour than twice as many as in
-- any other hour of the last week, and at least :least. Hour 0 is the last one.
WITH f AS MATERIALIZED (
    SELECT DISTINCT queue_id, delivery,
           ((SELECT now FROM clock) - finished_at) / 3600000000 AS hour
    FROM attempts
    WHERE finished_at > (SELECT now FROM clock) - 7 * 86400000000 AND outcome <> 'delivered'
), k AS (
    SELECT 'route' AS kind, d.route AS name, f.hour, count(*) AS failed
    FROM f JOIN deliveries d ON d.queue_id = f.queue_id AND d.number = f.delivery
    GROUP BY d.route, f.hour
    UNION ALL
    SELECT 'sender', m.sender, f.hour, count(*)
    FROM f JOIN messages m ON m.id = f.queue_id
    GROUP BY m.sender, f.hour
    UNION ALL
    SELECT 'domain', x.domain, x.hour, count(*)
    FROM (
        SELECT DISTINCT f.queue_id, f.delivery, f.hour,
               lower(substr(r.address,
                   length(rtrim(r.address, replace(r.address, '@', ''))) + 1)) AS domain
        FROM f JOIN recipients r ON r.queue_id = f.queue_id AND r.delivery = f.delivery
    ) x
    GROUP BY x.domain, x.hour
)
SELECT k.kind, k.name, k.failed, coalesce(b.most, 0) AS most
FROM k
LEFT JOIN (
    SELECT kind, name, max(failed) AS most FROM k WHERE hour > 0 GROUP BY kind, name
) b ON b.kind = k.kind AND b.name = k.name
WHERE k.hour = 0 AND k.failed >= :least AND k.failed > 2 * coalesce(b.most, 0)
ORDER BY k.failed DESC, k.kind, k.name
LIMIT 20;
