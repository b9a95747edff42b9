-- The places of bodies (relay/spool/bodies.py), on PostgreSQL.

-- name: place
SELECT replace(CAST(segment AS text), '-', '') AS segment, position FROM messages WHERE id = :id;
