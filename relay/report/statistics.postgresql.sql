-- Questions about the queue as a whole. An attempt with the index 0 was never made: it stands for a
-- transfer that was lost with its worker.

-- name: rates
-- Attempts of the last hour by outcome.
SELECT outcome, count(*) AS last_hour,
       count(*) FILTER (WHERE finished_at > now() - interval '1 minute') AS last_minute,
       CAST(sum(bytes_sent) AS bigint) AS bytes_sent,
       CAST(avg(extract(epoch FROM finished_at - started_at)) AS float8) AS seconds
FROM attempts
WHERE finished_at > now() - interval '1 hour' AND attempt_index > 0
GROUP BY outcome
ORDER BY outcome;

-- name: slowest
-- The longest attempts of the last hour.
SELECT replace(CAST(queue_id AS text), '-', '') AS queue_id, server, outcome, bytes_sent, reply,
       CAST(extract(epoch FROM finished_at - started_at) AS float8) AS seconds
FROM attempts
WHERE finished_at > now() - interval '1 hour' AND attempt_index > 0
ORDER BY seconds DESC
LIMIT :most;

-- name: ages
-- Unfinished mail by the domain of the recipient, the part after the last @, and by age: an id
-- begins with the time, so each age is an id. The domains after the first :most are one row.
WITH d AS (
    SELECT lower(substring(recipient FROM '[^@]*$')) AS domain, count(*) AS waiting,
           count(*) FILTER (WHERE queue_uuid >= CAST(:under_5m AS uuid)) AS under_5m,
           count(*) FILTER (WHERE queue_uuid < CAST(:under_5m AS uuid)
                            AND queue_uuid >= CAST(:under_20m AS uuid)) AS under_20m,
           count(*) FILTER (WHERE queue_uuid < CAST(:under_20m AS uuid)
                            AND queue_uuid >= CAST(:under_1h AS uuid)) AS under_1h,
           count(*) FILTER (WHERE queue_uuid < CAST(:under_1h AS uuid)
                            AND queue_uuid >= CAST(:under_4h AS uuid)) AS under_4h,
           count(*) FILTER (WHERE queue_uuid < CAST(:under_4h AS uuid)
                            AND queue_uuid >= CAST(:under_1d AS uuid)) AS under_1d,
           count(*) FILTER (WHERE queue_uuid < CAST(:under_1d AS uuid)) AS older
    FROM mail_queue
    GROUP BY 1
), ranked AS (
    SELECT d.*, row_number() OVER (ORDER BY waiting DESC, domain) AS place FROM d
)
SELECT CASE WHEN place <= :most THEN domain END AS domain, count(*) AS domains,
       CAST(sum(waiting) AS bigint) AS waiting, CAST(sum(under_5m) AS bigint) AS under_5m,
       CAST(sum(under_20m) AS bigint) AS under_20m, CAST(sum(under_1h) AS bigint) AS under_1h,
       CAST(sum(under_4h) AS bigint) AS under_4h, CAST(sum(under_1d) AS bigint) AS under_1d,
       CAST(sum(older) AS bigint) AS older
FROM ranked
GROUP BY 1, CASE WHEN place <= :most THEN place END
ORDER BY min(place);

-- name: received
-- Accepted messages, without DSNs. `:since` is an id, which the primary key finds; it is older than
-- an hour, because ids begin with the time of smtpd's clock, which may differ.
SELECT count(*) FILTER (WHERE received_at > now() - interval '1 minute') AS last_minute,
       count(*) AS last_hour, CAST(coalesce(sum(size), 0) AS bigint) AS bytes
FROM messages
WHERE id >= CAST(:since AS uuid) AND received_at > now() - interval '1 hour' AND dsn_of IS NULL;

-- name: history
-- Attempts by outcome in steps of time; step 0 is the newest.
SELECT CAST(floor(extract(epoch FROM now() - finished_at) / :step) AS bigint) AS step, outcome,
       count(*) AS tries,
       CAST(avg(extract(epoch FROM finished_at - started_at)) AS float8) AS seconds
FROM attempts
WHERE finished_at > now() - :seconds * interval '1 second' AND attempt_index > 0
GROUP BY 1, 2
ORDER BY 1, 2;

-- name: arrivals
-- Deliveries of accepted messages in steps of time; step 0 is the newest. `:since` is an id, which
-- the primary key finds; it is older than these seconds, as for `received`.
SELECT CAST(floor(extract(epoch FROM now() - m.received_at) / :step) AS bigint) AS step, count(*) AS deliveries
FROM messages m
JOIN deliveries d ON d.queue_id = m.id AND d.parent IS NULL
WHERE m.id >= CAST(:since AS uuid) AND m.received_at > now() - :seconds * interval '1 second'
GROUP BY 1
ORDER BY 1;

-- name: now
SELECT now() AS now_at;

-- name: flow
SELECT minutes, received, finished, waiting, drain_seconds FROM mail_flow ORDER BY minutes;

-- name: versions
-- Attempts of the last day by the version of the worker that made them.
SELECT coalesce(w.version, '') AS version, min(w.started_at) AS started_at,
       count(DISTINCT w.id) AS workers, count(*) AS attempts,
       count(*) FILTER (WHERE a.outcome = 'delivered') AS delivered,
       count(*) FILTER (WHERE a.outcome = 'deferred') AS deferred,
       count(*) FILTER (WHERE a.outcome = 'rejected') AS rejected,
       count(*) FILTER (WHERE a.outcome IN ('unreachable', 'interrupted', 'unsendable'))
           AS failed,
       count(*) FILTER (WHERE a.outcome IN ('uncertain', 'malformed')) AS uncertain
FROM attempts a
LEFT JOIN workers w ON w.id = a.worker
WHERE a.finished_at > now() - interval '1 day'
GROUP BY 1
ORDER BY 2, 1;

-- name: rate_limited
-- Who was refused by a rate in the last day, the most refused first.
SELECT subject, what, name, CAST(sum(refused) AS bigint) AS refused, max(last_at) AS last_at
FROM rate_refusals
WHERE hour > now() - interval '1 day'
GROUP BY subject, what, name
ORDER BY 4 DESC, 1, 2, 3
LIMIT :most;
