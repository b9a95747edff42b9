-- Refusals by a rate (relay/rate_refusals.py).

-- name: add
-- The rows are locked in the order of their key. What another process removes is left to it.
INSERT INTO rate_refusals (subject, what, name, hour, refused, last_at)
SELECT subject, what, name, date_trunc('hour', now()), refused, now()
FROM json_to_recordset(CAST(:refusals AS json))
    AS r (subject text, what text, name text, refused bigint)
ORDER BY subject, what, name
ON CONFLICT (subject, what, name, hour) DO UPDATE
SET refused = rate_refusals.refused + excluded.refused, last_at = excluded.last_at;
DELETE FROM rate_refusals
WHERE (subject, what, name, hour) IN (
    SELECT subject, what, name, hour FROM rate_refusals
    WHERE hour < now() - interval '1 day'
    FOR UPDATE SKIP LOCKED);
