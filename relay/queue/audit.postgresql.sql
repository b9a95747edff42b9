-- The record of operations on PostgreSQL.

-- name: record
-- The first chunk of an operation inserts its row, later chunks raise `matched`. `:keys` names the
-- deliveries that the chunk changed.
WITH a AS (
    INSERT INTO audit (id, at, actor, operation, reason, filter, matched)
    VALUES (:id, now(), :actor, :operation, :reason, :filter, :matched)
    ON CONFLICT (id) DO UPDATE SET matched = audit.matched + excluded.matched)
INSERT INTO audit_deliveries (queue_id, delivery, audit_id)
SELECT queue_id, number, CAST(:id AS uuid)
FROM json_to_recordset(CAST(:keys AS json)) AS x(queue_id uuid, number int)
ON CONFLICT DO NOTHING;
