-- The record of operations on SQLite.

-- name: record
-- The first chunk of an operation inserts its row, later chunks raise `matched`. `:keys` names the
-- deliveries that the chunk changed.
INSERT INTO audit (id, at, actor, operation, reason, filter, matched)
VALUES (:id, (SELECT now FROM clock), :actor, :operation, :reason, :filter, :matched)
ON CONFLICT (id) DO UPDATE SET matched = audit.matched + excluded.matched;
INSERT INTO audit_deliveries (queue_id, delivery, audit_id)
SELECT value ->> '$.queue_id', value ->> '$.number', :id FROM json_each(:keys)
WHERE true ON CONFLICT DO NOTHING;
