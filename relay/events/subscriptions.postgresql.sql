-- Subscriptions (relay/events/subscriptions.py).

-- name: register
INSERT INTO subscriptions (name, types, routes, created_at, seen_at)
SELECT name, CAST(types AS text), CAST(routes AS text), now(), now()
FROM json_to_recordset(CAST(:subscriptions AS json)) AS x(name text, types json, routes json)
WHERE true
ORDER BY name
ON CONFLICT (name) DO UPDATE
SET types = excluded.types, routes = excluded.routes, seen_at = excluded.seen_at;

-- name: all
SELECT s.name, s.types, s.routes, s.seen_at, s.disabled_at, s.disabled_reason,
    s.failing_since AS failing_at, s.last_error, s.succeeded_at, coalesce(n.pending, 0) AS pending,
    n.oldest_at
FROM subscriptions s
LEFT JOIN (
    SELECT subscription, count(*) AS pending, min(queued_at) AS oldest_at
    FROM notifications GROUP BY subscription
) AS n ON n.subscription = s.name
ORDER BY s.name;

-- name: note_success
-- Written when something changes, and once a minute.
UPDATE subscriptions SET succeeded_at = now(), failing_since = NULL, last_error = NULL
WHERE name = :subscription
    AND (failing_since IS NOT NULL OR succeeded_at IS NULL
        OR succeeded_at < now() - interval '60 seconds' OR succeeded_at > now());

-- name: note_failure
UPDATE subscriptions SET failing_since = coalesce(failing_since, now()), last_error = :error
WHERE name = :subscription;

-- name: disable
UPDATE subscriptions SET disabled_at = now(), disabled_reason = :reason
WHERE name = :subscription AND disabled_at IS NULL;

-- name: enable
UPDATE notifications SET due_at = now() WHERE subscription = :subscription AND claim IS NULL;
UPDATE subscriptions
SET disabled_at = NULL, disabled_reason = NULL, failing_since = NULL, last_error = NULL
WHERE name = :subscription AND disabled_at IS NOT NULL;

-- name: seen
SELECT name, CAST(seen_at AS text) AS seen FROM subscriptions;

-- name: remove
DELETE FROM subscriptions WHERE name = :subscription AND CAST(seen_at AS text) = :seen;

-- name: remove_notifications
WITH x AS MATERIALIZED (
    SELECT queue_id, sequence FROM notifications WHERE subscription = :subscription LIMIT :most
)
DELETE FROM notifications n
USING x
WHERE n.queue_id = x.queue_id AND n.subscription = :subscription AND n.sequence = x.sequence;
