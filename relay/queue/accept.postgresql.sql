-- Acceptance (relay/queue/accept.py).

-- name: accept
-- Inserts the messages, recipients and deliveries of a batch. The relay chooses every key, so the
-- same batch may run again and then changes nothing.
WITH m AS (
    INSERT INTO messages (id, received_at, sender, size, client_address, helo, protocol, auth_user,
        header_message_id, body_type, ret, envid, dsn_of, client_trusted, dsn_content, tls)
    SELECT id, now(), sender, size, client_address, helo, protocol, auth_user,
        header_message_id, body_type, ret, envid, dsn_of, client_trusted, dsn_content, tls
    FROM json_to_recordset(CAST(:messages AS json)) AS x(
        id uuid, sender text, size bigint, client_address text, helo text, protocol text,
        auth_user text, header_message_id text, body_type text, ret text, envid text, dsn_of uuid,
        client_trusted boolean, dsn_content text, tls text)
    ON CONFLICT DO NOTHING
), r AS (
    INSERT INTO recipients (queue_id, position, address, delivery, notify, orcpt)
    SELECT queue_id, position, address, delivery, notify, orcpt
    FROM json_to_recordset(CAST(:recipients AS json)) AS x(
        queue_id uuid, position int, address text, delivery int, notify text, orcpt text)
    ON CONFLICT DO NOTHING
)
-- event: accepted
INSERT INTO deliveries (queue_id, number, route, state, due_at, expires_at, warn_at)
SELECT queue_id, number, route, 'queued', now() + :grace * interval '1 second',
    now() + :lifetime * interval '1 second', now() + warn_after * interval '1 second'
FROM json_to_recordset(CAST(:deliveries AS json)) AS x(
    queue_id uuid, number int, route text, warn_after float8)
ON CONFLICT DO NOTHING;
