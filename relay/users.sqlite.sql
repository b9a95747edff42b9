-- Users (relay/users.py).

-- name: add
INSERT INTO users (name, role, senders, messages_per_minute, created_at, password_hash)
VALUES (:user, :role, :senders, :messages_per_minute, (SELECT now FROM clock), :password_hash)
ON CONFLICT DO NOTHING;

-- name: set_password
UPDATE users SET password_hash = :password_hash WHERE name = :user;

-- name: change
-- A parameter that is NULL changes nothing, and a limit of 0 ends the limit.
UPDATE users SET role = coalesce(:role, role),
    senders = coalesce(:senders, senders),
    messages_per_minute =
        nullif(coalesce(:messages_per_minute, messages_per_minute), 0)
WHERE name = :user;

-- name: disable
UPDATE users SET disabled_at = (SELECT now FROM clock)
WHERE name = :user AND disabled_at IS NULL;

-- name: enable
UPDATE users SET disabled_at = NULL WHERE name = :user AND disabled_at IS NOT NULL;

-- name: remove
DELETE FROM users WHERE name = :user;

-- name: all
-- A login that may only read runs this too, so it does not name the hashes.
SELECT name, role, senders, messages_per_minute, created_at, disabled_at, last_seen_at
FROM users ORDER BY name;

-- name: find
SELECT name, role, senders, messages_per_minute, created_at, disabled_at, last_seen_at,
    password_hash
FROM users WHERE name IN (SELECT value FROM json_each(:names));

-- name: any_in_roles
-- A login that may only read runs this too.
SELECT name FROM users WHERE role IN (SELECT value FROM json_each(:roles)) LIMIT 1;

-- name: note_seen
UPDATE users SET last_seen_at = (SELECT now FROM clock)
WHERE name IN (SELECT value FROM json_each(:names));
