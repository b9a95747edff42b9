-- A worker's statements (relay/queue/claim.py). A batch of rows is one JSON parameter. Times are
-- microseconds; a transaction is the only writer from its beginning, so nothing is locked.

-- name: register_worker
INSERT INTO workers (id, host, pid, started_at, lease_expires_at, claim_seconds, version)
VALUES (:worker, :host, :pid, (SELECT now FROM clock),
    (SELECT now FROM clock) + CAST(:lease * 1000000 AS INTEGER), :claim_seconds, :version)
ON CONFLICT DO NOTHING;

-- name: retire_worker
-- A worker that still holds claims stays, and a sweeper expires it.
UPDATE workers SET ended_at = (SELECT now FROM clock), end_reason = 'stopped'
WHERE id = :worker AND ended_at IS NULL
    AND NOT EXISTS (SELECT 1 FROM deliveries WHERE state = 'sending' AND worker = :worker);

-- name: renew_lease
UPDATE workers
SET lease_expires_at = (SELECT now FROM clock) + CAST(:lease * 1000000 AS INTEGER)
WHERE id = :worker AND ended_at IS NULL;

-- name: return_unknown_claims
-- A COMMIT of unknown outcome may have made claims that the worker does not hold.
UPDATE deliveries
-- event: claim returned
SET state = 'queued', worker = NULL, due_at = (SELECT now FROM clock)
WHERE state = 'sending' AND worker IN (SELECT value FROM json_each(:workers))
    AND NOT EXISTS (
        SELECT 1 FROM json_each(:held)
        WHERE value ->> '$.claim' = deliveries.claim_count
            AND value ->> '$.queue_id' = deliveries.queue_id
            AND value ->> '$.number' = deliveries.number);

-- name: claim_hinted
-- Claims the deliveries of a route that hints name; their rows with the envelope. `state || ''`
-- keeps SQLite from using an index on the state, and so from scanning all that waits for the
-- route. RETURNING may read other tables only in scalar subqueries. A worker that was expired while
-- it was stopped claims nothing: a sweeper would make what it has not begun to send `uncertain`.
UPDATE deliveries
-- event: claimed
SET state = 'sending', worker = :worker, claim_count = claim_count + 1,
    pending_operation = NULL, pending_reason = NULL, waiting_for = NULL,
    due_at = (SELECT now FROM clock) + CAST(:far * 1000000 AS INTEGER)
WHERE EXISTS (SELECT 1 FROM workers WHERE id = :worker AND ended_at IS NULL)
    AND (queue_id, number) IN (
        SELECT queue_id, number FROM deliveries
        WHERE queue_id IN (SELECT value FROM json_each(:ids))
            AND state || '' = 'queued' AND route = :route
        ORDER BY queue_id, number LIMIT :free)
RETURNING replace(queue_id, '-', '') AS queue_id, number, claim_count, route,
    (SELECT m.sender FROM messages m WHERE m.id = deliveries.queue_id) AS sender,
    (SELECT m.size FROM messages m WHERE m.id = deliveries.queue_id) AS size,
    (SELECT json_group_array(address) FROM (
        SELECT r.address FROM recipients r
        WHERE r.queue_id = deliveries.queue_id AND r.delivery = deliveries.number
        ORDER BY r.position)) AS recipients,
    deferrals, crash_count,
    (SELECT (now - m.received_at) / 1000000.0 FROM clock, messages m
     WHERE m.id = deliveries.queue_id) AS received_ago,
    (SELECT replace(m.segment, '-', '') FROM messages m
     WHERE m.id = deliveries.queue_id) AS segment,
    (SELECT m.position FROM messages m WHERE m.id = deliveries.queue_id) AS position,
    (SELECT m.prefix FROM messages m WHERE m.id = deliveries.queue_id) AS prefix;

-- name: claim_overdue
-- Claims overdue deliveries of a route, the longest due first. :fresh of them were never claimed
-- and :retries were, so that neither kind waits for all of the other; slots that one kind leaves
-- free go to the other. The index has each kind by `due_at`. A worker that has ended claims
-- nothing, as above.
WITH fresh AS MATERIALIZED (
    SELECT queue_id, number, due_at FROM deliveries
    WHERE state = 'queued' AND CAST(claim_count > 0 AS integer) = 0 AND route = :route
        AND due_at <= (SELECT now FROM clock)
    ORDER BY due_at LIMIT :free
), retries AS MATERIALIZED (
    SELECT queue_id, number, due_at FROM deliveries
    WHERE state = 'queued' AND CAST(claim_count > 0 AS integer) = 1 AND route = :route
        AND due_at <= (SELECT now FROM clock)
    ORDER BY due_at LIMIT :free
), p AS MATERIALIZED (
    SELECT queue_id, number
    FROM (
        SELECT queue_id, number, due_at, row_number() OVER (ORDER BY due_at) > :fresh AS beyond
        FROM fresh
        UNION ALL
        SELECT queue_id, number, due_at, row_number() OVER (ORDER BY due_at) > :retries
        FROM retries
    ) AS either
    ORDER BY beyond, due_at LIMIT :free
)
UPDATE deliveries
-- event: claimed
SET state = 'sending', worker = :worker, claim_count = claim_count + 1,
    pending_operation = NULL, pending_reason = NULL, waiting_for = NULL,
    due_at = (SELECT now FROM clock) + CAST(:far * 1000000 AS INTEGER)
WHERE EXISTS (SELECT 1 FROM workers WHERE id = :worker AND ended_at IS NULL)
    AND (queue_id, number) IN (SELECT queue_id, number FROM p)
RETURNING replace(queue_id, '-', '') AS queue_id, number, claim_count, route,
    (SELECT m.sender FROM messages m WHERE m.id = deliveries.queue_id) AS sender,
    (SELECT m.size FROM messages m WHERE m.id = deliveries.queue_id) AS size,
    (SELECT json_group_array(address) FROM (
        SELECT r.address FROM recipients r
        WHERE r.queue_id = deliveries.queue_id AND r.delivery = deliveries.number
        ORDER BY r.position)) AS recipients,
    deferrals, crash_count,
    (SELECT (now - m.received_at) / 1000000.0 FROM clock, messages m
     WHERE m.id = deliveries.queue_id) AS received_ago,
    (SELECT replace(m.segment, '-', '') FROM messages m
     WHERE m.id = deliveries.queue_id) AS segment,
    (SELECT m.position FROM messages m WHERE m.id = deliveries.queue_id) AS position,
    (SELECT m.prefix FROM messages m WHERE m.id = deliveries.queue_id) AS prefix;

-- name: complete
-- Records attempts and the next state of each claim. A completion is fenced by worker and claim
-- number, except that a K makes the delivery `delivered` from any state. When a pending operation
-- takes effect, the reason is the operator's, because the server replied to something else. A DSN
-- is pending if there is a sender, or if the message was a DSN, which may be made again with less.
-- A delivery whose body does not verify is this relay's fault, so it never expires for that.
-- The last column: whether the body can be deleted, by the rows as they are after each change. (It
-- asks the table, because SQLite 3.40 answers `due_at IS NULL` wrongly in RETURNING.) It is
-- asked for the messages in :files only, because a segment is removed as a whole.
INSERT INTO attempts (queue_id, delivery, claim, attempt_index, worker, server, started_at,
    finished_at, outcome, reply, bytes_sent)
SELECT value ->> '$.queue_id', value ->> '$.delivery', value ->> '$.claim',
    value ->> '$.attempt_index', value ->> '$.worker', value ->> '$.server',
    (SELECT now FROM clock) - CAST((value ->> '$.started_ago') * 1000000 AS INTEGER),
    (SELECT now FROM clock) - CAST((value ->> '$.finished_ago') * 1000000 AS INTEGER),
    value ->> '$.outcome', value ->> '$.reply', value ->> '$.bytes_sent'
FROM json_each(:attempts) WHERE true
ON CONFLICT DO NOTHING;
WITH x AS MATERIALIZED (
    SELECT value ->> '$.worker' AS worker, value ->> '$.queue_id' AS queue_id,
        value ->> '$.number' AS number, value ->> '$.claim' AS claim, value ->> '$.state' AS state,
        value ->> '$.delay' AS delay, value ->> '$.deferrals' AS deferrals,
        value ->> '$.outcome' AS outcome, value ->> '$.reply' AS reply,
        value ->> '$.server' AS server, value ->> '$.waiting_for' AS waiting_for
    FROM json_each(:completions)
), p AS MATERIALIZED (
    SELECT d.queue_id, d.number, x.delay, x.deferrals, x.outcome, x.reply, x.server,
        x.waiting_for,
        -- event: completed, pending operation, late K
        CASE WHEN x.outcome = 'delivered' THEN 'delivered'
             WHEN d.pending_operation = 'hold' THEN 'held'
             WHEN d.pending_operation = 'drop' THEN 'dropped'
             WHEN d.pending_operation = 'bounce' THEN 'bounced'
             WHEN d.pending_operation IS NOT NULL THEN 'queued'
             WHEN x.state = 'deferred' AND d.expires_at <= (SELECT now FROM clock)
                 AND coalesce(x.outcome, '') <> 'unsendable' THEN 'expired'
             ELSE x.state END AS final
    FROM x JOIN deliveries d ON d.queue_id = x.queue_id AND d.number = x.number
    WHERE (d.state = 'sending' AND d.worker = x.worker AND d.claim_count = x.claim)
        OR (x.outcome = 'delivered' AND d.state <> 'delivered')
)
UPDATE deliveries
-- event: completed, pending operation, late K
SET state = p.final,
    due_at = CASE
        WHEN p.final = 'deferred'
            THEN (SELECT now FROM clock) + CAST(p.delay * 1000000 AS INTEGER)
        WHEN p.final = 'queued' THEN (SELECT now FROM clock) + CAST(:grace * 1000000 AS INTEGER)
        WHEN p.final IN ('bounced', 'expired') AND :sends_dsns AND (
            SELECT m.sender NOT IN ('', '#@[]') OR m.dsn_content IS NOT NULL
            FROM messages m WHERE m.id = deliveries.queue_id) THEN (SELECT now FROM clock) END,
    finished_at = CASE WHEN p.final IN ('delivered', 'bounced', 'expired', 'dropped')
        THEN (SELECT now FROM clock) END,
    worker = NULL, pending_operation = NULL, pending_reason = NULL,
    crash_count = CASE WHEN coalesce(p.outcome, 'unreachable') = 'unreachable'
        THEN crash_count ELSE 0 END,
    deferrals = p.deferrals,
    last_outcome = coalesce(p.outcome, last_outcome),
    last_reply = CASE
        WHEN pending_operation IN ('hold', 'drop', 'bounce') AND p.final <> 'delivered'
            THEN coalesce(pending_reason, p.final || ' by an operator')
        WHEN p.outcome IS NULL THEN last_reply ELSE p.reply END,
    reason_source = CASE
        WHEN pending_operation IN ('hold', 'drop', 'bounce') AND p.final <> 'delivered'
            THEN 'operator'
        WHEN p.outcome IS NULL THEN reason_source
        WHEN p.outcome IN ('delivered', 'deferred', 'rejected') THEN 'server' ELSE 'relay' END,
    last_server = coalesce(p.server, last_server),
    waiting_for = CASE WHEN p.final = 'deferred' THEN p.waiting_for END
FROM p WHERE deliveries.queue_id = p.queue_id AND deliveries.number = p.number
RETURNING replace(queue_id, '-', '') AS queue_id, number, claim_count, state,
    CASE WHEN queue_id IN (SELECT value FROM json_each(:files))
        THEN NOT EXISTS (
            SELECT 1 FROM deliveries o
            WHERE o.queue_id = deliveries.queue_id
                AND (o.state IN ('queued', 'sending', 'deferred', 'held')
                    OR o.due_at IS NOT NULL))
        ELSE 0 END AS body_deletable;

-- name: recorded_states
-- The states of deliveries that a completion did not change, or that were split after it.
SELECT replace(d.queue_id, '-', '') AS queue_id, d.number, d.claim_count, d.state,
    NOT EXISTS (
        SELECT 1 FROM deliveries o
        WHERE o.queue_id = d.queue_id
            AND (o.state IN ('queued', 'sending', 'deferred', 'held') OR o.due_at IS NOT NULL)
    ) AS body_deletable
FROM json_each(:keys)
    JOIN deliveries d ON d.queue_id = value ->> '$.queue_id' AND d.number = value ->> '$.number';

-- name: bounce_unsplittable
-- A rejected delivery that cannot be split bounces.
UPDATE deliveries
-- event: split rejected
SET state = 'bounced', finished_at = (SELECT now FROM clock),
    due_at = CASE WHEN :sends_dsns AND (
        SELECT m.sender NOT IN ('', '#@[]') OR m.dsn_content IS NOT NULL
        FROM messages m WHERE m.id = deliveries.queue_id) THEN (SELECT now FROM clock) END
WHERE queue_id = :id AND number = :number AND state = 'split';
