-- Acceptance (relay/queue/accept.py).

-- name: accept
-- Inserts the messages, recipients and deliveries of a batch, and moves the segment's position over
-- them. Nothing is inserted unless the position was :start, so nothing comes twice; without :start
-- there is no such condition. The relay chooses every key. Returns a row if the position was moved.
-- The lock :announced is for claims that wait for the end of this transaction, which therefore waits
-- for no sync: the COMMIT of the claim syncs these rows too, and the journal keeps them until then.
WITH s AS (
    UPDATE segments SET committed_to = :end
    WHERE id = CAST(:segment AS uuid) AND committed_to = CAST(:start AS bigint)
        AND (CAST(:announced AS bigint) IS NULL
            OR pg_advisory_xact_lock(CAST(:announced AS bigint)) IS NOT NULL
            AND set_config('synchronous_commit', 'off', true) IS NOT NULL)
    RETURNING id
), m AS (
    INSERT INTO messages (id, received_at, sender, size, client_address, helo, protocol, auth_user,
        header_message_id, body_type, ret, envid, dsn_of, client_trusted, dsn_content, segment,
        position, tls, prefix)
    SELECT id, now() - :age * interval '1 second', sender, size, client_address, helo, protocol,
        auth_user, header_message_id, body_type, ret, envid, dsn_of, client_trusted, dsn_content,
        CASE WHEN position IS NOT NULL THEN CAST(:segment AS uuid) END, position, tls,
        prefix
    FROM json_to_recordset(CAST(:messages AS json)) AS x(
        id uuid, sender text, size bigint, client_address text, helo text, protocol text,
        auth_user text, header_message_id text, body_type text, ret text, envid text, dsn_of uuid,
        client_trusted boolean, dsn_content text, position bigint, tls text,
        prefix text)
    WHERE CAST(:start AS bigint) IS NULL OR EXISTS (SELECT 1 FROM s)
    ON CONFLICT DO NOTHING
), r AS (
    INSERT INTO recipients (queue_id, position, address, delivery, notify, orcpt)
    SELECT queue_id, position, address, delivery, notify, orcpt
    FROM json_to_recordset(CAST(:recipients AS json)) AS x(
        queue_id uuid, position int, address text, delivery int, notify text, orcpt text)
    WHERE CAST(:start AS bigint) IS NULL OR EXISTS (SELECT 1 FROM s)
    ON CONFLICT DO NOTHING
), d AS (
    -- event: accepted
    -- event: accepted on hold
    INSERT INTO deliveries (queue_id, number, route, state, due_at, expires_at, warn_at,
        last_reply, reason_source)
    SELECT queue_id, number, route,
        CASE WHEN coalesce(CAST(:hold_reason AS text), hold_reason) IS NULL
            THEN 'queued' ELSE 'held' END,
        CASE WHEN coalesce(CAST(:hold_reason AS text), hold_reason) IS NULL
            THEN now() + :grace * interval '1 second' END,
        now() + (:lifetime - :age) * interval '1 second',
        now() + (warn_after - :age) * interval '1 second',
        coalesce(CAST(:hold_reason AS text), hold_reason),
        CASE WHEN coalesce(CAST(:hold_reason AS text), hold_reason) IS NOT NULL
            THEN CAST(:hold_source AS text) END
    FROM json_to_recordset(CAST(:deliveries AS json)) AS x(
        queue_id uuid, number int, route text, warn_after float8, hold_reason text)
    WHERE CAST(:start AS bigint) IS NULL OR EXISTS (SELECT 1 FROM s)
    ON CONFLICT DO NOTHING
)
SELECT id FROM s;

-- name: open_segment
INSERT INTO segments (id, committed_to) VALUES (:segment, :start) ON CONFLICT DO NOTHING;

-- name: close_segment
-- Takes that row back: the file was removed meanwhile, and no message was inserted.
DELETE FROM segments WHERE id = :segment AND committed_to = :start AND sealed_at IS NULL;

-- name: seal_segment
-- A segment that is sealed is read and removed, and never written or replayed. It is sealed where
-- its position stands, so no message without rows is passed over.
UPDATE segments SET sealed_at = now(), messages = :count,
    least_id = :least, greatest_id = :greatest
WHERE id = :segment AND sealed_at IS NULL AND committed_to = :end
RETURNING id;

-- name: committed_to
-- Up to where the messages of a segment have their rows, and whether it is sealed.
SELECT committed_to, sealed_at IS NOT NULL AS sealed FROM segments WHERE id = :segment;

-- name: sealed_segments
SELECT replace(CAST(id AS text), '-', '') AS id FROM segments WHERE sealed_at IS NOT NULL;
