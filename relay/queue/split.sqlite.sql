-- Bisection on SQLite. `:id` is the message, `:number` the delivery that is split; the transaction
-- is the only writer.

-- name: recipients
SELECT position, address FROM recipients
WHERE queue_id = :id AND delivery = :number ORDER BY position;

-- name: family
-- Children are numbered as in a heap, behind the deliveries that were accepted: no two deliveries
-- of a message have a child of the same number.
SELECT d.parent,
    (SELECT p.parent FROM deliveries p WHERE p.queue_id = d.queue_id AND p.number = d.parent)
        AS grandparent,
    (SELECT count(*) FROM deliveries o WHERE o.queue_id = d.queue_id) AS parts,
    (SELECT count(*) FROM deliveries o WHERE o.queue_id = d.queue_id AND o.parent IS NULL)
        + 2 * d.number - 1 AS first_child
FROM deliveries d WHERE d.queue_id = :id AND d.number = :number;

-- name: sibling_rejected_alike
-- Two routes are two servers, which may use the same text.
SELECT s.number FROM deliveries d
JOIN deliveries s ON s.queue_id = d.queue_id AND s.parent = d.parent AND s.number <> d.number
    AND s.route = d.route
WHERE d.queue_id = :id AND d.number = :number AND s.state IN ('split', 'bounced')
    AND s.last_outcome = 'rejected' AND s.reason_source = 'server' AND s.last_reply = :reply;

-- name: insert_child
-- The recipients in `:positions` get a delivery of their own. It is late when its parent would have
-- been, if one of them asks for that.
UPDATE recipients SET delivery = :child WHERE queue_id = :id
    AND position IN (SELECT value FROM json_each(:positions));
-- event: child inserted
INSERT INTO deliveries
    (queue_id, number, parent, route, state, due_at, expires_at, warned_at, warn_at)
SELECT d.queue_id, :child, d.number, d.route, 'queued', (SELECT now FROM clock), d.expires_at,
    d.warned_at,
    CASE WHEN EXISTS (
        SELECT 1 FROM recipients r WHERE r.queue_id = d.queue_id AND r.delivery = :child
        AND (r.notify IS NULL OR upper(r.notify) LIKE '%DELAY%')) THEN d.warn_at END
FROM deliveries d WHERE d.queue_id = :id AND d.number = :number;

-- name: insert_divided_child
-- As `insert_child`, but the child has the history of its parent, and the operations on the parent
-- count for it.
UPDATE recipients SET delivery = :child WHERE queue_id = :id
    AND position IN (SELECT value FROM json_each(:positions));
-- event: divided by route
INSERT INTO deliveries
    (queue_id, number, parent, route, state, due_at, expires_at, crash_count, last_outcome,
    last_reply, reason_source, last_server, warned_at, warn_at)
SELECT d.queue_id, :child, d.number, :route, d.state, d.due_at, d.expires_at, d.crash_count,
    d.last_outcome, d.last_reply, d.reason_source, d.last_server, d.warned_at,
    CASE WHEN EXISTS (
        SELECT 1 FROM recipients r WHERE r.queue_id = d.queue_id AND r.delivery = :child
        AND (r.notify IS NULL OR upper(r.notify) LIKE '%DELAY%')) THEN d.warn_at END
FROM deliveries d WHERE d.queue_id = :id AND d.number = :number;
INSERT INTO audit_deliveries (queue_id, delivery, audit_id)
SELECT queue_id, :child, audit_id FROM audit_deliveries WHERE queue_id = :id AND delivery = :number
ON CONFLICT DO NOTHING;

-- name: set_route
UPDATE deliveries SET route = :route WHERE queue_id = :id AND number = :number;

-- name: mark_divided
-- A new number of the claim: the worker that sent it before the division has no claim any more.
-- event: divided by route
UPDATE deliveries SET state = 'split', due_at = NULL, claim_count = claim_count + 1
WHERE queue_id = :id AND number = :number;

-- name: deliver_descendants
-- event: late K
UPDATE deliveries
SET state = 'delivered', due_at = NULL, finished_at = (SELECT now FROM clock), worker = NULL,
    pending_operation = NULL, pending_reason = NULL
WHERE queue_id = :id AND state NOT IN ('delivered', 'split') AND number IN (
    WITH RECURSIVE line(number) AS (
        SELECT number FROM deliveries WHERE queue_id = :id AND parent = :number
        UNION
        SELECT c.number FROM deliveries c JOIN line ON c.parent = line.number
        WHERE c.queue_id = :id)
    SELECT number FROM line);

-- name: bounce_descendants
-- event: sibling rejected
UPDATE deliveries
SET state = 'bounced', finished_at = (SELECT now FROM clock), last_outcome = 'rejected',
    last_reply = :reply, reason_source = 'server',
    due_at = CASE WHEN :sends_dsns AND (
        SELECT m.sender NOT IN ('', '#@[]') OR m.dsn_content IS NOT NULL
        FROM messages m WHERE m.id = :id) THEN (SELECT now FROM clock) END
WHERE queue_id = :id AND state IN ('queued', 'deferred') AND number IN (
    WITH RECURSIVE line(number) AS (
        SELECT number FROM deliveries WHERE queue_id = :id AND parent = :number
        UNION
        SELECT c.number FROM deliveries c JOIN line ON c.parent = line.number
        WHERE c.queue_id = :id)
    SELECT number FROM line);
