-- What operators read of the queue. Times have the type timestamptz; a queue id is shown as 32 hex
-- digits.

-- name: view_definition
-- The SELECT of a view, so that a listing can put conditions inside of it.
SELECT rtrim(pg_get_viewdef(CAST(:view AS regclass)), ';') AS definition;

-- name: listed_columns
-- Only the names of the columns are read.
SELECT * FROM mail_queue LIMIT 0;

-- name: queue_ids
-- The ids that end in some digits. For a whole id both bounds are that id, so the primary key finds
-- it.
SELECT replace(CAST(id AS text), '-', '') AS id
FROM messages
WHERE id BETWEEN CAST(:least AS uuid) AND CAST(:greatest AS uuid)
  AND replace(CAST(id AS text), '-', '') LIKE '%' || CAST(:digits AS text)
ORDER BY id
LIMIT 5;

-- name: message
SELECT replace(CAST(id AS text), '-', '') AS queue_id, sender, size, received_at, client_address,
       helo, protocol, auth_user, header_message_id, body_type, ret, envid,
       replace(CAST(dsn_of AS text), '-', '') AS dsn_of, dsn_content,
       replace(CAST(segment AS text), '-', '') AS segment, position, tls, prefix
FROM messages
WHERE id = CAST(:id AS uuid);

-- name: recipients
SELECT position, address, delivery, notify, orcpt
FROM recipients
WHERE queue_id = CAST(:id AS uuid)
ORDER BY position;

-- name: deliveries
SELECT number, parent, d.route,
       CASE WHEN state IN ('queued', 'sending', 'deferred', 'held') THEN o.servers END AS servers,
       state, due_at, expires_at, claim_count,
       replace(CAST(worker AS text), '-', '') AS worker, deferrals, crash_count,
       pending_operation, last_outcome, last_reply, reason_source, last_server, dsn_withheld,
       finished_at
FROM deliveries d
LEFT JOIN route_overview o ON o.route = d.route
WHERE queue_id = CAST(:id AS uuid)
ORDER BY number;

-- name: attempts
SELECT delivery, claim, attempt_index, replace(CAST(worker AS text), '-', '') AS worker, server,
       started_at, finished_at, outcome, reply, bytes_sent
FROM attempts
WHERE queue_id = CAST(:id AS uuid)
ORDER BY delivery, claim, attempt_index;

-- name: summary
-- Counts, bytes and oldest by state and route.
SELECT * FROM queue_summary ORDER BY state, route;

-- name: servers
-- Outcomes by server in the last hour. A sum of bigint is numeric, which becomes a Decimal in
-- Python.
SELECT server, attempts, delivered, deferred, rejected, unreachable, uncertain, interrupted,
       CAST(bytes_sent AS bigint) AS bytes_sent, last_at, circuit_open_workers,
       circuit_open_reason, failed_at, paused_at,
       waiting
FROM server_health
ORDER BY server;

-- name: last_words
-- The last reply of each server in the last hour.
WITH l AS MATERIALIZED (
    SELECT server, max(finished_at) AS at
    FROM attempts
    WHERE finished_at > now() - interval '1 hour' AND attempt_index > 0
    GROUP BY server
)
SELECT DISTINCT ON (a.server) a.server, a.finished_at, a.outcome, a.reply
FROM attempts a
JOIN l ON l.server = a.server AND l.at = a.finished_at
WHERE a.finished_at > now() - interval '1 hour' AND a.attempt_index > 0
ORDER BY a.server, a.queue_id, a.delivery, a.claim, a.attempt_index;

-- name: route_servers
SELECT route, server FROM route_servers ORDER BY route, position;

-- name: dsns
-- The DSNs about a message with their delivery. They are found by their recipient, which has an
-- index.
SELECT replace(CAST(n.id AS text), '-', '') AS queue_id, n.received_at, n.dsn_content, d.state,
       d.due_at, d.finished_at, d.last_outcome, d.last_reply, d.reason_source, d.last_server
FROM messages m
JOIN recipients r ON r.address = m.sender
JOIN messages n ON n.id = r.queue_id
JOIN deliveries d ON d.queue_id = r.queue_id AND d.number = r.delivery
WHERE m.id = CAST(:id AS uuid) AND n.dsn_of = m.id
ORDER BY n.id;

-- name: operations
-- The operations on the deliveries of a message, and those on its routes and servers
-- while it was unfinished, which have no delivery.
WITH d AS (
    SELECT route, state, finished_at FROM deliveries WHERE queue_id = CAST(:id AS uuid)
), s AS (
    SELECT 'route:' || route AS subject FROM d
    UNION
    SELECT 'server:' || server
    FROM attempts
    WHERE queue_id = CAST(:id AS uuid) AND server IS NOT NULL
), x AS (
    SELECT t.delivery, a.*
    FROM audit_deliveries t
    JOIN audit a ON a.id = t.audit_id
    WHERE t.queue_id = CAST(:id AS uuid)
    UNION ALL
    SELECT NULL, a.*
    FROM audit a
    WHERE a.operation IN (
              SELECT 'pause ' || subject FROM s UNION SELECT 'resume ' || subject FROM s)
      AND a.at > (SELECT received_at FROM messages WHERE id = CAST(:id AS uuid))
      AND a.at < (
          SELECT max(CASE WHEN state IN ('queued', 'sending', 'deferred', 'held') THEN now()
                          ELSE finished_at END)
          FROM d
      )
)
SELECT delivery, at AS acted_at, actor, operation, reason, filter FROM x ORDER BY at, id, delivery;

-- name: segments
SELECT replace(CAST(id AS text), '-', '') AS id, committed_to, sealed_at IS NOT NULL AS sealed
FROM segments
ORDER BY id;

-- name: mark
SELECT mark FROM spool;

-- name: spool_id
SELECT replace(CAST(id AS text), '-', '') AS id FROM spool;

-- name: pauses
SELECT subject, since AS since_at, actor, reason FROM pauses ORDER BY subject;

-- name: paused
-- The same with the mail that waits behind each, which takes longer.
SELECT subject, paused_at, actor, reason, deliveries FROM paused ORDER BY subject;

-- name: workers
-- All workers that have not ended, then the last that have.
SELECT replace(CAST(w.id AS text), '-', '') AS id, w.host, w.pid, w.started_at, w.lease_expires_at,
       w.ended_at, w.end_reason, w.ended_at IS NULL AND w.lease_expires_at > now() AS alive,
       coalesce(d.sending, 0) AS sending, w.claim_seconds, w.routes, w.version
FROM workers w
LEFT JOIN (
    SELECT worker, count(*) AS sending FROM deliveries WHERE state = 'sending' GROUP BY worker
) d ON d.worker = w.id
WHERE w.ended_at IS NULL
   OR w.id IN (
       SELECT id FROM workers WHERE ended_at IS NOT NULL ORDER BY started_at DESC LIMIT :most
   )
ORDER BY w.ended_at IS NOT NULL, w.started_at DESC, w.id DESC;

-- name: open_circuits
-- The open circuits of workers that are alive.
SELECT replace(CAST(c.worker AS text), '-', '') AS worker, c.server, c.why
FROM open_circuits c
JOIN workers w ON w.id = c.worker
WHERE w.ended_at IS NULL AND w.lease_expires_at > now()
ORDER BY c.server, c.worker;

-- name: count_from_sender
-- How many messages a sender has, counted up to a limit. The range is that of the index, which
-- compares bytes.
SELECT count(*) AS count
FROM (
    SELECT 1
    FROM messages
    WHERE sender ~>=~ :address_from AND sender ~<~ :address_to AND lower(sender) = lower(:address)
    LIMIT :most
) x;

-- name: count_to_recipient
-- The same for a recipient.
SELECT count(*) AS count
FROM (
    SELECT 1
    FROM recipients
    WHERE address ~>=~ :address_from AND address ~<~ :address_to
      AND lower(address) = lower(:address)
    LIMIT :most
) x;

-- name: message_below
-- The id of the message so many messages older than this one.
SELECT replace(CAST(id AS text), '-', '') AS id
FROM messages
WHERE id <= CAST(:after AS uuid)
ORDER BY messages.id DESC
LIMIT 1 OFFSET :skip;

-- name: actions
-- What operators did, the newest first; of everybody, or of those whose name is like :actor.
SELECT a.at AS acted_at, a.actor, a.operation, a.matched AS changed, a.filter, a.reason
FROM audit a
WHERE a.at > now() - :seconds * interval '1 second'
  AND a.actor LIKE :actor ESCAPE '\'
ORDER BY a.at DESC, a.id DESC
LIMIT :most;
