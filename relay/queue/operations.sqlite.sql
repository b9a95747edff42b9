-- Operations of an operator on SQLite. `:keys` names the deliveries of a chunk. A delivery
-- that is being sent only gets or loses a pending operation.

-- name: retry
UPDATE deliveries AS d SET pending_operation = 'retry', pending_reason = :why
FROM (SELECT value ->> '$.queue_id' AS queue_id, value ->> '$.number' AS number
    FROM json_each(:keys)) AS x
WHERE d.queue_id = x.queue_id AND d.number = x.number AND d.state = 'sending';
-- event: retry
UPDATE deliveries AS d SET state = 'queued', due_at = (SELECT now FROM clock), deferrals = 0
FROM (SELECT value ->> '$.queue_id' AS queue_id, value ->> '$.number' AS number
    FROM json_each(:keys)) AS x
WHERE d.queue_id = x.queue_id AND d.number = x.number
    AND d.state = 'deferred';

-- name: hold
UPDATE deliveries AS d SET pending_operation = 'hold', pending_reason = :why
FROM (SELECT value ->> '$.queue_id' AS queue_id, value ->> '$.number' AS number
    FROM json_each(:keys)) AS x
WHERE d.queue_id = x.queue_id AND d.number = x.number AND d.state = 'sending';
-- event: hold
UPDATE deliveries AS d
SET state = 'held', due_at = NULL, last_reply = :why, reason_source = 'operator'
FROM (SELECT value ->> '$.queue_id' AS queue_id, value ->> '$.number' AS number
    FROM json_each(:keys)) AS x
WHERE d.queue_id = x.queue_id AND d.number = x.number
    AND d.state IN ('queued', 'deferred');

-- name: release
UPDATE deliveries AS d SET pending_operation = NULL, pending_reason = NULL
FROM (SELECT value ->> '$.queue_id' AS queue_id, value ->> '$.number' AS number
    FROM json_each(:keys)) AS x
WHERE d.queue_id = x.queue_id AND d.number = x.number AND d.state = 'sending';
-- event: release
UPDATE deliveries AS d
SET state = 'queued', due_at = (SELECT now FROM clock), deferrals = 0, crash_count = 0
FROM (SELECT value ->> '$.queue_id' AS queue_id, value ->> '$.number' AS number
    FROM json_each(:keys)) AS x
WHERE d.queue_id = x.queue_id AND d.number = x.number
    AND d.state = 'held';

-- name: bounce
-- A DSN is pending if the sender can get one, or if this is a DSN that may be built with less.
UPDATE deliveries AS d SET pending_operation = 'bounce', pending_reason = :why
FROM (SELECT value ->> '$.queue_id' AS queue_id, value ->> '$.number' AS number
    FROM json_each(:keys)) AS x
WHERE d.queue_id = x.queue_id AND d.number = x.number AND d.state = 'sending';
-- event: bounce
UPDATE deliveries AS d
SET state = 'bounced', finished_at = (SELECT now FROM clock),
    last_outcome = coalesce(d.last_outcome, 'rejected'), last_reply = :why,
    reason_source = 'operator',
    due_at = CASE WHEN :sends_dsns AND (
        SELECT m.sender NOT IN ('', '#@[]') OR m.dsn_content IS NOT NULL
        FROM messages m WHERE m.id = d.queue_id) THEN (SELECT now FROM clock) END
FROM (SELECT value ->> '$.queue_id' AS queue_id, value ->> '$.number' AS number
    FROM json_each(:keys)) AS x
WHERE d.queue_id = x.queue_id AND d.number = x.number
    AND d.state IN ('queued', 'deferred', 'held');

-- name: drop
UPDATE deliveries AS d SET pending_operation = 'drop', pending_reason = :why
FROM (SELECT value ->> '$.queue_id' AS queue_id, value ->> '$.number' AS number
    FROM json_each(:keys)) AS x
WHERE d.queue_id = x.queue_id AND d.number = x.number AND d.state = 'sending';
-- event: drop
UPDATE deliveries AS d
SET state = 'dropped', due_at = NULL, finished_at = (SELECT now FROM clock), last_reply = :why,
    reason_source = 'operator'
FROM (SELECT value ->> '$.queue_id' AS queue_id, value ->> '$.number' AS number
    FROM json_each(:keys)) AS x
WHERE d.queue_id = x.queue_id AND d.number = x.number
    AND d.state IN ('queued', 'deferred', 'held');

-- name: reroute
-- A route is chosen when a message is accepted. This statement runs before a new choice among the
-- routes of today: a delivery that is not held is tried at once.
-- event: reroute
UPDATE deliveries AS d
SET state = 'queued', due_at = (SELECT now FROM clock), deferrals = 0
FROM (SELECT value ->> '$.queue_id' AS queue_id, value ->> '$.number' AS number
    FROM json_each(:keys)) AS x
WHERE d.queue_id = x.queue_id AND d.number = x.number
    AND d.state IN ('queued', 'deferred');
UPDATE deliveries AS d SET deferrals = 0
FROM (SELECT value ->> '$.queue_id' AS queue_id, value ->> '$.number' AS number
    FROM json_each(:keys)) AS x
WHERE d.queue_id = x.queue_id AND d.number = x.number AND d.state = 'held';

-- name: pause
INSERT INTO pauses (subject, since, actor, reason)
VALUES (:subject, (SELECT now FROM clock), :actor, :reason)
ON CONFLICT DO NOTHING;

-- name: resume
DELETE FROM pauses WHERE subject = :subject;
