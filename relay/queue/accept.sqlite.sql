-- Acceptance (relay/queue/accept.py).

-- name: accept
-- Inserts the messages, recipients and deliveries of a batch. The relay chooses every key, so the
-- same batch may run again and then changes nothing. `WHERE true` keeps SQLite from reading ON
-- CONFLICT as the condition of a join.
INSERT INTO messages (id, received_at, sender, size, client_address, helo, protocol, auth_user,
    header_message_id, body_type, ret, envid, dsn_of, client_trusted, dsn_content, tls)
SELECT value ->> '$.id', (SELECT now FROM clock), value ->> '$.sender', value ->> '$.size',
    value ->> '$.client_address', value ->> '$.helo', value ->> '$.protocol',
    value ->> '$.auth_user', value ->> '$.header_message_id', value ->> '$.body_type',
    value ->> '$.ret', value ->> '$.envid', value ->> '$.dsn_of', value ->> '$.client_trusted',
    value ->> '$.dsn_content', value ->> '$.tls'
FROM json_each(:messages) WHERE true
ON CONFLICT DO NOTHING;
INSERT INTO recipients (queue_id, position, address, delivery, notify, orcpt)
SELECT value ->> '$.queue_id', value ->> '$.position', value ->> '$.address',
    value ->> '$.delivery', value ->> '$.notify', value ->> '$.orcpt'
FROM json_each(:recipients) WHERE true
ON CONFLICT DO NOTHING;
-- event: accepted
INSERT INTO deliveries (queue_id, number, route, state, due_at, expires_at, warn_at)
SELECT value ->> '$.queue_id', value ->> '$.number', value ->> '$.route', 'queued',
    (SELECT now FROM clock) + CAST(:grace * 1000000 AS INTEGER),
    (SELECT now FROM clock) + CAST(:lifetime * 1000000 AS INTEGER),
    (SELECT now FROM clock) + CAST(value ->> '$.warn_after' * 1000000 AS INTEGER)
FROM json_each(:deliveries) WHERE true
ON CONFLICT DO NOTHING;
