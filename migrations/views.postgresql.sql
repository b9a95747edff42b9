-- The views, which are the public face of the database for SQL: their names and columns are stable
-- (docs/inspect.md). migrations/views.py runs these statements. `paused_routes` and
-- `route_overview` are not public: other views and statements read them.

-- name: drop_views
DROP VIEW IF EXISTS mail_flow;
DROP VIEW IF EXISTS reason_summary;
DROP VIEW IF EXISTS domain_summary;
DROP VIEW IF EXISTS worker_health;
DROP VIEW IF EXISTS mail_actions;
DROP VIEW IF EXISTS operator_actions;
DROP VIEW IF EXISTS mail_attempts;
DROP VIEW IF EXISTS mail_queue;
DROP VIEW IF EXISTS mail_history;
DROP VIEW IF EXISTS queue_summary;
DROP VIEW IF EXISTS server_health;
DROP VIEW IF EXISTS paused;
DROP VIEW IF EXISTS waiting_routes;
DROP VIEW IF EXISTS route_overview;
DROP VIEW IF EXISTS paused_routes;
DROP VIEW IF EXISTS route_servers;

-- name: create_views
-- As the workers that are alive know the routes; if none is alive, as the last worker knew them.
CREATE VIEW route_servers AS
SELECT r.key AS route, CAST(min(s.place) AS int) AS position, s.name AS server
FROM workers w
CROSS JOIN LATERAL json_each(CAST(w.routes AS json)) AS r
CROSS JOIN LATERAL json_array_elements_text(r.value) WITH ORDINALITY AS s(name, place)
WHERE w.routes IS NOT NULL AND CASE
    WHEN EXISTS (
        SELECT 1 FROM workers l
        WHERE l.routes IS NOT NULL
            AND l.ended_at IS NULL AND l.lease_expires_at > now())
    THEN w.ended_at IS NULL AND w.lease_expires_at > now()
    ELSE w.id = (
        SELECT l.id FROM workers l WHERE l.routes IS NOT NULL
        ORDER BY l.started_at DESC, l.id DESC LIMIT 1) END
GROUP BY r.key, s.name;
-- A route is paused by itself, or because each of its servers is: then by the last of these pauses.
CREATE VIEW paused_routes AS
SELECT substr(subject, 7) AS route, since, actor, reason
FROM pauses WHERE substr(subject, 1, 6) = 'route:'
UNION ALL
SELECT x.route, x.since, x.actor, x.reason
FROM (
    SELECT s.route, p.since, p.actor, p.reason,
        count(*) OVER (PARTITION BY s.route) AS servers,
        count(p.subject) OVER (PARTITION BY s.route) AS paused,
        row_number() OVER (PARTITION BY s.route ORDER BY p.since DESC, s.position, s.server)
            AS place
    FROM route_servers s LEFT JOIN pauses p ON p.subject = 'server:' || s.server
) x
WHERE x.servers = x.paused AND x.place = 1
    AND NOT EXISTS (SELECT 1 FROM pauses q WHERE q.subject = 'route:' || x.route);
-- A row for each route that a worker knows or that is paused.
CREATE VIEW route_overview AS
SELECT n.route,
    (SELECT string_agg(s.server, ', ' ORDER BY s.position, s.server)
     FROM route_servers s WHERE s.route = n.route) AS servers,
    p.since,
    'paused by ' || p.actor || CASE WHEN p.reason <> '' THEN ': ' || p.reason ELSE '' END
        AS paused_reason
FROM (SELECT route FROM route_servers UNION SELECT route FROM paused_routes) n
LEFT JOIN paused_routes p ON p.route = n.route;
-- The deliveries that wait, by route. An arm for each index.
CREATE VIEW waiting_routes AS
SELECT route, CAST(sum(waiting) AS bigint) AS waiting
FROM (
    SELECT route, count(*) AS waiting FROM deliveries WHERE state = 'queued' GROUP BY route
    UNION ALL
    SELECT route, count(*) FROM deliveries WHERE state = 'deferred' GROUP BY route
) x
GROUP BY route;
CREATE VIEW mail_queue AS
SELECT replace(CAST(d.queue_id AS text), '-', '') AS queue_id, d.queue_id AS queue_uuid,
    r.position, d.number AS delivery, d.state, m.sender, r.address AS recipient,
    lower(substring(r.address FROM '[^@]*$')) AS domain,
    m.size, d.route,
    CASE WHEN d.state IN ('queued', 'sending', 'deferred', 'held') THEN o.servers END AS servers,
    d.claim_count AS attempts, d.last_outcome,
    CASE WHEN d.state IN ('queued', 'deferred')
        THEN coalesce(o.paused_reason, d.last_reply) ELSE d.last_reply END AS reason,
    d.last_reply, d.last_server AS server,
    m.received_at AS received_at,
    CASE WHEN d.state IN ('queued', 'deferred')
        THEN d.due_at END AS next_at,
    d.expires_at AS expires_at,
    d.finished_at AS finished_at,
    CASE WHEN d.state IN ('queued', 'deferred')
        THEN o.since END AS paused_at,
    d.worker, d.pending_operation, m.client_address, m.auth_user, m.helo, m.protocol,
    m.header_message_id, replace(CAST(m.dsn_of AS text), '-', '') AS dsn_of, m.tls
FROM deliveries d
JOIN recipients r ON r.queue_id = d.queue_id AND r.delivery = d.number
JOIN messages m ON m.id = d.queue_id
LEFT JOIN route_overview o ON o.route = d.route
WHERE d.state IN ('queued', 'sending', 'deferred', 'held');
CREATE VIEW mail_history AS
SELECT replace(CAST(d.queue_id AS text), '-', '') AS queue_id, d.queue_id AS queue_uuid,
    r.position, d.number AS delivery, d.state, m.sender, r.address AS recipient,
    lower(substring(r.address FROM '[^@]*$')) AS domain,
    m.size, d.route,
    CASE WHEN d.state IN ('queued', 'sending', 'deferred', 'held') THEN o.servers END AS servers,
    d.claim_count AS attempts, d.last_outcome,
    CASE WHEN d.state IN ('queued', 'deferred')
        THEN coalesce(o.paused_reason, d.last_reply) ELSE d.last_reply END AS reason,
    d.last_reply, d.last_server AS server,
    m.received_at AS received_at,
    CASE WHEN d.state IN ('queued', 'deferred')
        THEN d.due_at END AS next_at,
    d.expires_at AS expires_at,
    d.finished_at AS finished_at,
    CASE WHEN d.state IN ('queued', 'deferred')
        THEN o.since END AS paused_at,
    d.worker, d.pending_operation, m.client_address, m.auth_user, m.helo, m.protocol,
    m.header_message_id, replace(CAST(m.dsn_of AS text), '-', '') AS dsn_of, m.tls
FROM deliveries d
JOIN recipients r ON r.queue_id = d.queue_id AND r.delivery = d.number
JOIN messages m ON m.id = d.queue_id
LEFT JOIN route_overview o ON o.route = d.route;
-- Two halves: finished mail is only counted, or a long history would be looked up message by
-- message. A pause is one of a route, so it is looked up for the groups and not for each delivery.
CREATE VIEW queue_summary AS
SELECT g.state, g.route, g.deliveries, g.bytes,
    g.oldest AS oldest_at,
    CAST(extract(epoch FROM now() - g.oldest) AS float8) AS oldest_seconds,
    CASE WHEN p.route IS NOT NULL AND g.state IN ('queued', 'deferred') THEN 0 ELSE g.late END
        AS overdue,
    CASE WHEN p.route IS NOT NULL AND g.state IN ('queued', 'deferred')
        THEN g.deliveries ELSE 0 END AS paused
FROM (
    SELECT d.state, d.route, count(*) AS deliveries, CAST(sum(m.size) AS bigint) AS bytes,
        min(m.received_at) AS oldest,
        sum(CASE WHEN d.state <> 'held' AND d.due_at < now()
            THEN 1 ELSE 0 END) AS late
    FROM deliveries d JOIN messages m ON m.id = d.queue_id
    WHERE d.state IN ('queued', 'sending', 'deferred', 'held')
    GROUP BY d.state, d.route
) g
LEFT JOIN paused_routes p ON p.route = g.route
UNION ALL
SELECT state, route, count(*), NULL, NULL, NULL, 0, 0
FROM deliveries WHERE state NOT IN ('queued', 'sending', 'deferred', 'held')
GROUP BY state, route;
CREATE VIEW server_health AS
SELECT server, count(outcome) AS attempts,
    sum(CASE WHEN outcome = 'delivered' THEN 1 ELSE 0 END) AS delivered,
    sum(CASE WHEN outcome = 'deferred' THEN 1 ELSE 0 END) AS deferred,
    sum(CASE WHEN outcome = 'rejected' THEN 1 ELSE 0 END) AS rejected,
    sum(CASE WHEN outcome = 'unreachable' THEN 1 ELSE 0 END) AS unreachable,
    sum(CASE WHEN outcome IN ('uncertain', 'malformed') THEN 1 ELSE 0 END) AS uncertain,
    sum(CASE WHEN outcome = 'interrupted' THEN 1 ELSE 0 END) AS interrupted,
    coalesce(sum(bytes_sent), 0) AS bytes_sent,
    max(finished_at) AS last_at,
    count(why) AS circuit_open_workers, max(why) AS circuit_open_reason,
    min(failing) AS failed_at,
    max(since) AS paused_at,
    CAST(sum(waiting) AS bigint) AS waiting
FROM (
    SELECT server, outcome, bytes_sent, finished_at, CASE WHEN 1 = 0 THEN reply END AS why,
        CASE WHEN 1 = 0 THEN finished_at END AS since, 0 AS waiting,
        CASE WHEN 1 = 0 THEN finished_at END AS failing
    FROM attempts
    WHERE finished_at > now() - interval '1 hour' AND server IS NOT NULL
    UNION ALL
    SELECT c.server, NULL, NULL, NULL, c.why, NULL, 0, c.since
    FROM open_circuits c JOIN workers w ON w.id = c.worker
    WHERE w.ended_at IS NULL
    UNION ALL
    SELECT substr(subject, 8), NULL, NULL, NULL, NULL, since, 0, NULL
    FROM pauses WHERE substr(subject, 1, 7) = 'server:'
    UNION ALL
    SELECT s.server, NULL, NULL, NULL, NULL, NULL, coalesce(w.waiting, 0), NULL
    FROM route_servers s LEFT JOIN waiting_routes w ON w.route = s.route
) s
GROUP BY server;
-- Mail waits behind the pause of a server if all servers of its route are paused.
CREATE VIEW paused AS
SELECT p.subject, p.since AS paused_at, p.actor, p.reason,
    coalesce((
        SELECT CAST(sum(w.waiting) AS bigint)
        FROM waiting_routes w JOIN paused_routes b ON b.route = w.route
        WHERE p.subject = 'route:' || w.route OR EXISTS (
            SELECT 1 FROM route_servers s
            WHERE s.route = w.route AND p.subject = 'server:' || s.server)
    ), 0) AS deliveries
FROM pauses p;
CREATE VIEW mail_attempts AS
SELECT replace(CAST(a.queue_id AS text), '-', '') AS queue_id, a.queue_id AS queue_uuid, a.delivery,
    d.route, a.claim, a.attempt_index, a.worker, a.server,
    a.started_at AS started_at,
    a.finished_at AS finished_at,
    CAST(extract(epoch FROM a.finished_at - a.started_at) AS float8) AS seconds,
    a.outcome, a.reply, a.bytes_sent
FROM attempts a
LEFT JOIN deliveries d ON d.queue_id = a.queue_id AND d.number = a.delivery;
CREATE VIEW operator_actions AS
SELECT a.id AS action_id,
    a.at AS acted_at,
    a.actor, a.operation, a.matched AS changed, a.filter, a.reason
FROM audit a;
CREATE VIEW mail_actions AS
SELECT replace(CAST(t.queue_id AS text), '-', '') AS queue_id, t.queue_id AS queue_uuid, t.delivery,
    t.audit_id AS action_id,
    a.at AS acted_at,
    a.actor, a.operation, a.reason
FROM audit_deliveries t
JOIN audit a ON a.id = t.audit_id;
CREATE VIEW worker_health AS
SELECT w.id AS worker, w.host, w.pid, w.version,
    w.started_at AS started_at,
    w.lease_expires_at AS lease_expires_at,
    w.ended_at AS ended_at,
    w.end_reason, w.ended_at IS NULL AND w.lease_expires_at > now() AS alive,
    coalesce(d.sending, 0) AS sending
FROM workers w
LEFT JOIN (
    SELECT worker, count(*) AS sending FROM deliveries WHERE state = 'sending' GROUP BY worker
) d ON d.worker = w.id;
CREATE VIEW domain_summary AS
SELECT domain,
    count(DISTINCT CAST(queue_uuid AS text) || '.' || delivery) AS deliveries,
    count(*) AS recipients, min(received_at) AS oldest_at
FROM mail_queue
GROUP BY domain;
-- `relay.report.masking` masks in the same way: a word with an @ is an address, and a word with a
-- digit that is no status code is a number. The reason of a pause is shown as it is.
CREATE VIEW reason_summary AS
SELECT x.reason, CAST(sum(x.deliveries) AS bigint) AS deliveries,
    CAST(sum(x.recipients) AS bigint) AS recipients, min(x.oldest_at) AS oldest_at
FROM (
    SELECT CASE WHEN r.paused THEN r.reason ELSE regexp_replace(
            regexp_replace(r.reason, '[^ ]*@[^ ]*', '<address>', 'g'),
            '(?<![^ ])(?!([245][0-9][0-9]|[245]\.[0-9]+\.[0-9]+)(?![^ ]))[^ ]*[0-9][^ ]*',
            '#', 'g') END AS reason,
        r.deliveries, r.recipients, r.oldest_at
    FROM (
        SELECT coalesce(reason, '') AS reason, paused_at IS NOT NULL AS paused,
            count(DISTINCT CAST(queue_uuid AS text) || '.' || delivery) AS deliveries,
            count(*) AS recipients, min(received_at) AS oldest_at
        FROM mail_queue
        GROUP BY 1, 2
    ) r
) x
GROUP BY x.reason;
-- Deliveries that came and went in the last minutes, and how long the waiting ones take if nothing
-- changes. An id begins with the time of smtpd's clock, so the index is read from 70 minutes ago.
CREATE VIEW mail_flow AS
SELECT f.minutes, f.received, f.finished, w.waiting,
    CASE WHEN w.waiting = 0 THEN 0.0
         WHEN f.finished > f.received
         THEN CAST(w.waiting * f.minutes * 60.0 / (f.finished - f.received) AS float8)
         END AS drain_seconds
FROM (
    SELECT p.minutes,
        (SELECT count(*)
         FROM messages m JOIN deliveries d ON d.queue_id = m.id AND d.parent IS NULL
         WHERE m.id >= CAST(
                lpad(to_hex(CAST(extract(epoch FROM now()) * 1000 AS bigint) - 4200000), 12, '0')
                || repeat('0', 20) AS uuid)
            AND m.received_at > now() - p.minutes * interval '1 minute') AS received,
        (SELECT count(*) FROM attempts a
         WHERE a.outcome IN ('delivered', 'rejected')
            AND a.finished_at > now() - p.minutes * interval '1 minute') AS finished
    FROM (SELECT 1 AS minutes UNION ALL SELECT 10 UNION ALL SELECT 60) p
) f
CROSS JOIN (SELECT CAST(coalesce(sum(waiting), 0) AS bigint) AS waiting FROM waiting_routes) w;
