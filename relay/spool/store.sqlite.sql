-- The identity of the spool that this database knows, on SQLite.

-- name: lock_identity
-- The transaction is the only writer.
SELECT replace(id, '-', '') AS id FROM spool;

-- name: insert_identity
INSERT INTO spool (id, created_at) VALUES (:id, (SELECT now FROM clock));
