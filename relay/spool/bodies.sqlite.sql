-- The places of bodies (relay/spool/bodies.py), on SQLite.

-- name: place
SELECT replace(segment, '-', '') AS segment, position FROM messages WHERE id = :id;
