-- The identity of the spool that this database knows, on PostgreSQL.

-- name: lock_identity
-- Services start together, so each waits here until the one before it has recorded the identity.
LOCK TABLE spool IN EXCLUSIVE MODE;
SELECT replace(CAST(id AS text), '-', '') AS id FROM spool;

-- name: insert_identity
INSERT INTO spool (id, created_at) VALUES (:id, now());
