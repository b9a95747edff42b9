-- A worker's statements (relay/queue/claim.py). A batch of rows is one JSON parameter.

-- name: register_worker
INSERT INTO workers (id, host, pid, started_at, lease_expires_at, claim_seconds, version)
VALUES (:worker, :host, :pid, now(), now() + :lease * interval '1 second', :claim_seconds,
    :version)
ON CONFLICT DO NOTHING;

-- name: retire_worker
-- A worker that still holds claims stays, and a sweeper expires it.
UPDATE workers SET ended_at = now(), end_reason = 'stopped'
WHERE id = :worker AND ended_at IS NULL
    AND NOT EXISTS (SELECT 1 FROM deliveries WHERE state = 'sending' AND worker = :worker);

-- name: renew_lease
UPDATE workers SET lease_expires_at = now() + :lease * interval '1 second'
WHERE id = :worker AND ended_at IS NULL;

-- name: return_unknown_claims
-- A COMMIT of unknown outcome may have made claims that the worker does not hold.
UPDATE deliveries
-- event: claim returned
SET state = 'queued', worker = NULL, due_at = now()
WHERE state = 'sending'
    AND worker IN (
        SELECT CAST(value AS uuid) FROM json_array_elements_text(CAST(:workers AS json)))
    AND NOT EXISTS (
        SELECT 1
        FROM json_to_recordset(CAST(:held AS json)) AS x(queue_id uuid, number int, claim int)
        WHERE x.claim = deliveries.claim_count AND x.queue_id = deliveries.queue_id
            AND x.number = deliveries.number);

-- name: wait_for_rows
-- Waits until the transaction that inserts a message has ended (`accept` has this lock), or raises
-- lock_not_available. The time limit ends with the transaction.
SELECT set_config('lock_timeout', :patience, true), pg_advisory_xact_lock_shared(:announced);

-- name: claim_hinted
-- Claims the deliveries of a route that hints name; their rows with the envelope. `state || ''`
-- keeps PostgreSQL from using an index on the state: a plan that was made for a short queue would
-- scan all that waits for the route. The ids are an array and not a join: without statistics the
-- join would read the whole queue for each claim. A worker that was expired while it was stopped
-- claims nothing: a sweeper would make what it has not begun to send `uncertain`.
WITH p AS MATERIALIZED (
    SELECT queue_id, number FROM deliveries
    WHERE queue_id = ANY (ARRAY(
            SELECT CAST(value AS uuid) FROM json_array_elements_text(CAST(:ids AS json))))
        AND state || '' = 'queued' AND route = :route
    ORDER BY queue_id, number LIMIT :free
    FOR UPDATE SKIP LOCKED
), c AS (
    UPDATE deliveries d
    -- event: claimed
    SET state = 'sending', worker = :worker, claim_count = d.claim_count + 1,
        pending_operation = NULL, pending_reason = NULL, waiting_for = NULL,
        due_at = now() + :far * interval '1 second'
    FROM p WHERE d.queue_id = p.queue_id AND d.number = p.number
        AND EXISTS (SELECT 1 FROM workers WHERE id = :worker AND ended_at IS NULL)
    RETURNING d.queue_id, d.number, d.claim_count, d.route, d.deferrals, d.crash_count
)
SELECT replace(CAST(c.queue_id AS text), '-', '') AS queue_id, c.number, c.claim_count, c.route,
    m.sender, m.size,
    (SELECT array_agg(r.address ORDER BY r.position) FROM recipients r
     WHERE r.queue_id = c.queue_id AND r.delivery = c.number) AS recipients,
    c.deferrals, c.crash_count,
    CAST(extract(epoch FROM now() - m.received_at) AS float8) AS received_ago,
    replace(CAST(m.segment AS text), '-', '') AS segment, m.position, m.prefix
FROM c JOIN messages m ON m.id = c.queue_id;

-- name: claim_overdue
-- Claims overdue deliveries of a route, the longest due first. :fresh of them were never claimed
-- and :retries were, so that neither kind waits for all of the other; slots that one kind leaves
-- free go to the other. The index has each kind by `due_at`. A row that is locked and not claimed
-- stays `queued`. A worker that has ended claims nothing, as above.
WITH fresh AS MATERIALIZED (
    SELECT queue_id, number, due_at FROM deliveries
    WHERE state = 'queued' AND CAST(claim_count > 0 AS integer) = 0
        AND route = :route AND due_at <= now()
    ORDER BY due_at LIMIT :free
    FOR UPDATE SKIP LOCKED
), retries AS MATERIALIZED (
    SELECT queue_id, number, due_at FROM deliveries
    WHERE state = 'queued' AND CAST(claim_count > 0 AS integer) = 1
        AND route = :route AND due_at <= now()
    ORDER BY due_at LIMIT :free
    FOR UPDATE SKIP LOCKED
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
), c AS (
    UPDATE deliveries d
    -- event: claimed
    SET state = 'sending', worker = :worker, claim_count = d.claim_count + 1,
        pending_operation = NULL, pending_reason = NULL, waiting_for = NULL,
        due_at = now() + :far * interval '1 second'
    FROM p WHERE d.queue_id = p.queue_id AND d.number = p.number
        AND EXISTS (SELECT 1 FROM workers WHERE id = :worker AND ended_at IS NULL)
    RETURNING d.queue_id, d.number, d.claim_count, d.route, d.deferrals, d.crash_count
)
SELECT replace(CAST(c.queue_id AS text), '-', '') AS queue_id, c.number, c.claim_count, c.route,
    m.sender, m.size,
    (SELECT array_agg(r.address ORDER BY r.position) FROM recipients r
     WHERE r.queue_id = c.queue_id AND r.delivery = c.number) AS recipients,
    c.deferrals, c.crash_count,
    CAST(extract(epoch FROM now() - m.received_at) AS float8) AS received_ago,
    replace(CAST(m.segment AS text), '-', '') AS segment, m.position, m.prefix
FROM c JOIN messages m ON m.id = c.queue_id;

-- name: complete
-- Records attempts and the next state of each claim. A completion is fenced by worker and claim
-- number, except that a K makes the delivery `delivered` from any state. When a pending operation
-- takes effect, the reason is the operator's, because the server replied to something else. A DSN
-- is pending if there is a sender, or if the message was a DSN, which may be made again with less.
-- A delivery whose body does not verify is this relay's fault, so it never expires for that.
-- The last column: whether the body can be deleted, by this row and the other rows before it. It
-- is asked for the messages in :files only, because a segment is removed as a whole.
WITH p AS MATERIALIZED (
    SELECT d.queue_id, d.number, x.delay, x.deferrals, x.outcome, x.reply, x.server,
        x.waiting_for,
        -- event: completed, pending operation, late K
        CASE WHEN x.outcome = 'delivered' THEN 'delivered'
             WHEN d.pending_operation = 'hold' THEN 'held'
             WHEN d.pending_operation = 'drop' THEN 'dropped'
             WHEN d.pending_operation = 'bounce' THEN 'bounced'
             WHEN d.pending_operation IS NOT NULL THEN 'queued'
             WHEN x.state = 'deferred' AND d.expires_at <= now()
                 AND coalesce(x.outcome, '') <> 'unsendable' THEN 'expired'
             ELSE x.state END AS final
    FROM json_to_recordset(CAST(:completions AS json)) AS x(
            worker uuid, queue_id uuid, number int, claim int, state text, delay float8,
            deferrals int, outcome text, reply text, server text, waiting_for text)
        JOIN deliveries d ON d.queue_id = x.queue_id AND d.number = x.number
    WHERE (d.state = 'sending' AND d.worker = x.worker AND d.claim_count = x.claim)
        OR (x.outcome = 'delivered' AND d.state <> 'delivered')
    ORDER BY d.queue_id, d.number
    FOR UPDATE OF d
), a AS (
    INSERT INTO attempts (queue_id, delivery, claim, attempt_index, worker, server, started_at,
        finished_at, outcome, reply, bytes_sent)
    SELECT queue_id, delivery, claim, attempt_index, worker, server,
        now() - started_ago * interval '1 second', now() - finished_ago * interval '1 second',
        outcome, reply, bytes_sent
    FROM json_to_recordset(CAST(:attempts AS json)) AS x(
        queue_id uuid, delivery int, claim int, attempt_index int, worker uuid, server text,
        started_ago float8, finished_ago float8, outcome text, reply text, bytes_sent bigint)
    ON CONFLICT DO NOTHING
)
UPDATE deliveries d
-- event: completed, pending operation, late K
SET state = p.final,
    due_at = CASE
        WHEN p.final = 'deferred' THEN now() + p.delay * interval '1 second'
        WHEN p.final = 'queued' THEN now() + :grace * interval '1 second'
        WHEN p.final IN ('bounced', 'expired') AND :sends_dsns AND (
            SELECT m.sender NOT IN ('', '#@[]') OR m.dsn_content IS NOT NULL
            FROM messages m WHERE m.id = d.queue_id) THEN now() END,
    finished_at = CASE
        WHEN p.final IN ('delivered', 'bounced', 'expired', 'dropped') THEN now() END,
    worker = NULL, pending_operation = NULL, pending_reason = NULL,
    crash_count = CASE WHEN coalesce(p.outcome, 'unreachable') = 'unreachable'
        THEN d.crash_count ELSE 0 END,
    deferrals = p.deferrals,
    last_outcome = coalesce(p.outcome, d.last_outcome),
    last_reply = CASE
        WHEN d.pending_operation IN ('hold', 'drop', 'bounce') AND p.final <> 'delivered'
            THEN coalesce(d.pending_reason, p.final || ' by an operator')
        WHEN p.outcome IS NULL THEN d.last_reply ELSE p.reply END,
    reason_source = CASE
        WHEN d.pending_operation IN ('hold', 'drop', 'bounce') AND p.final <> 'delivered'
            THEN 'operator'
        WHEN p.outcome IS NULL THEN d.reason_source
        WHEN p.outcome IN ('delivered', 'deferred', 'rejected') THEN 'server' ELSE 'relay' END,
    last_server = coalesce(p.server, d.last_server),
    waiting_for = CASE WHEN p.final = 'deferred' THEN p.waiting_for END
FROM p WHERE d.queue_id = p.queue_id AND d.number = p.number
RETURNING replace(CAST(d.queue_id AS text), '-', '') AS queue_id, d.number, d.claim_count, d.state,
    CASE WHEN d.queue_id = ANY (ARRAY(
                SELECT CAST(value AS uuid) FROM json_array_elements_text(CAST(:files AS json))))
            AND d.state NOT IN ('queued', 'sending', 'deferred', 'held')
            AND d.due_at IS NULL
        THEN NOT EXISTS (
            SELECT 1 FROM deliveries o
            WHERE o.queue_id = d.queue_id AND o.number <> d.number
                AND (o.state IN ('queued', 'sending', 'deferred', 'held')
                    OR o.due_at IS NOT NULL))
        ELSE false END AS body_deletable;

-- name: recorded_states
-- The states of deliveries that a completion did not change, or that were split after it.
SELECT replace(CAST(d.queue_id AS text), '-', '') AS queue_id, d.number, d.claim_count, d.state,
    NOT EXISTS (
        SELECT 1 FROM deliveries o
        WHERE o.queue_id = d.queue_id
            AND (o.state IN ('queued', 'sending', 'deferred', 'held') OR o.due_at IS NOT NULL)
    ) AS body_deletable
FROM json_to_recordset(CAST(:keys AS json)) AS x(queue_id uuid, number int)
    JOIN deliveries d ON d.queue_id = x.queue_id AND d.number = x.number;

-- name: bounce_unsplittable
-- A rejected delivery that cannot be split bounces.
UPDATE deliveries d
-- event: split rejected
SET state = 'bounced', finished_at = now(),
    due_at = CASE WHEN :sends_dsns AND (
        SELECT m.sender NOT IN ('', '#@[]') OR m.dsn_content IS NOT NULL
        FROM messages m WHERE m.id = d.queue_id) THEN now() END
WHERE queue_id = :id AND number = :number AND state = 'split';
