-- Operations of an operator on PostgreSQL. `:keys` names the deliveries of a chunk; the caller has
-- locked them. A delivery that is being sent only gets or loses a pending operation.

-- name: retry
UPDATE deliveries AS d SET pending_operation = 'retry', pending_reason = :why
FROM json_to_recordset(CAST(:keys AS json)) AS x(queue_id uuid, number int)
WHERE d.queue_id = x.queue_id AND d.number = x.number AND d.state = 'sending';
-- event: retry
UPDATE deliveries AS d SET state = 'queued', due_at = now(), deferrals = 0
FROM json_to_recordset(CAST(:keys AS json)) AS x(queue_id uuid, number int)
WHERE d.queue_id = x.queue_id AND d.number = x.number
    AND d.state = 'deferred';

-- name: hold
UPDATE deliveries AS d SET pending_operation = 'hold', pending_reason = :why
FROM json_to_recordset(CAST(:keys AS json)) AS x(queue_id uuid, number int)
WHERE d.queue_id = x.queue_id AND d.number = x.number AND d.state = 'sending';
-- event: hold
UPDATE deliveries AS d
SET state = 'held', due_at = NULL, last_reply = :why, reason_source = 'operator'
FROM json_to_recordset(CAST(:keys AS json)) AS x(queue_id uuid, number int)
WHERE d.queue_id = x.queue_id AND d.number = x.number
    AND d.state IN ('queued', 'deferred');

-- name: release
UPDATE deliveries AS d SET pending_operation = NULL, pending_reason = NULL
FROM json_to_recordset(CAST(:keys AS json)) AS x(queue_id uuid, number int)
WHERE d.queue_id = x.queue_id AND d.number = x.number AND d.state = 'sending';
-- event: release
UPDATE deliveries AS d
SET state = 'queued', due_at = now(), deferrals = 0, crash_count = 0
FROM json_to_recordset(CAST(:keys AS json)) AS x(queue_id uuid, number int)
WHERE d.queue_id = x.queue_id AND d.number = x.number
    AND d.state = 'held';

-- name: bounce
-- A DSN is pending if the sender can get one, or if this is a DSN that may be built with less.
UPDATE deliveries AS d SET pending_operation = 'bounce', pending_reason = :why
FROM json_to_recordset(CAST(:keys AS json)) AS x(queue_id uuid, number int)
WHERE d.queue_id = x.queue_id AND d.number = x.number AND d.state = 'sending';
-- event: bounce
UPDATE deliveries AS d
SET state = 'bounced', finished_at = now(), last_outcome = coalesce(d.last_outcome, 'rejected'),
    last_reply = :why, reason_source = 'operator',
    due_at = CASE WHEN :sends_dsns AND (
        SELECT m.sender NOT IN ('', '#@[]') OR m.dsn_content IS NOT NULL
        FROM messages m WHERE m.id = d.queue_id) THEN now() END
FROM json_to_recordset(CAST(:keys AS json)) AS x(queue_id uuid, number int)
WHERE d.queue_id = x.queue_id AND d.number = x.number
    AND d.state IN ('queued', 'deferred', 'held');

-- name: drop
UPDATE deliveries AS d SET pending_operation = 'drop', pending_reason = :why
FROM json_to_recordset(CAST(:keys AS json)) AS x(queue_id uuid, number int)
WHERE d.queue_id = x.queue_id AND d.number = x.number AND d.state = 'sending';
-- event: drop
UPDATE deliveries AS d
SET state = 'dropped', due_at = NULL, finished_at = now(), last_reply = :why,
    reason_source = 'operator'
FROM json_to_recordset(CAST(:keys AS json)) AS x(queue_id uuid, number int)
WHERE d.queue_id = x.queue_id AND d.number = x.number
    AND d.state IN ('queued', 'deferred', 'held');

-- name: reroute
-- A route is chosen when a message is accepted. This statement runs before a new choice among the
-- routes of today: a delivery that is not held is tried at once.
-- event: reroute
UPDATE deliveries AS d
SET state = 'queued', due_at = now(), deferrals = 0
FROM json_to_recordset(CAST(:keys AS json)) AS x(queue_id uuid, number int)
WHERE d.queue_id = x.queue_id AND d.number = x.number
    AND d.state IN ('queued', 'deferred');
UPDATE deliveries AS d SET deferrals = 0
FROM json_to_recordset(CAST(:keys AS json)) AS x(queue_id uuid, number int)
WHERE d.queue_id = x.queue_id AND d.number = x.number AND d.state = 'held';

-- name: pause
INSERT INTO pauses (subject, since, actor, reason) VALUES (:subject, now(), :actor, :reason)
ON CONFLICT DO NOTHING;

-- name: resume
DELETE FROM pauses WHERE subject = :subject;
