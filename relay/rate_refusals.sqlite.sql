-- Refusals by a rate (relay/rate_refusals.py). Times are microseconds.

-- name: add
INSERT INTO rate_refusals (subject, what, name, hour, refused, last_at)
SELECT value ->> 'subject', value ->> 'what', value ->> 'name',
       now - now % (3600 * 1000000), value ->> 'refused', now
FROM json_each(:refusals), clock
WHERE true
ON CONFLICT (subject, what, name, hour) DO UPDATE
SET refused = rate_refusals.refused + excluded.refused, last_at = excluded.last_at;
DELETE FROM rate_refusals WHERE hour < (SELECT now FROM clock) - 86400 * 1000000;
