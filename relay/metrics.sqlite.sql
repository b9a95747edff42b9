-- The queue for Prometheus. Times are microseconds.

-- name: counts
-- Deliveries by state, with the age of the oldest message in seconds. Each part has an index of its
-- own, so no history is scanned. A failed delivery with a due time has a DSN that is pending.
SELECT s.state, s.deliveries, s.overdue, ((SELECT now FROM clock) - m.received_at) / 1e6 AS age
FROM (
    SELECT state, count(*) AS deliveries,
           count(*) FILTER (WHERE due_at < (SELECT now FROM clock)) AS overdue,
           min(queue_id) AS oldest
    FROM (
        SELECT state, queue_id, due_at FROM deliveries WHERE state = 'queued'
        UNION ALL
        SELECT state, queue_id, due_at FROM deliveries WHERE state = 'sending'
        UNION ALL
        SELECT state, queue_id, due_at FROM deliveries WHERE state = 'deferred'
        UNION ALL
        SELECT state, queue_id, due_at FROM deliveries WHERE state = 'held'
        UNION ALL
        SELECT state, queue_id, due_at
        FROM deliveries
        WHERE state IN ('bounced', 'expired') AND due_at IS NOT NULL
    ) d
    GROUP BY state
) s
JOIN messages m ON m.id = s.oldest;

-- name: totals
-- Workers that are alive, and attempts of the last hour whose end is unknown.
SELECT (SELECT count(*)
        FROM workers
        WHERE ended_at IS NULL AND lease_expires_at > (SELECT now FROM clock)) AS workers,
       (SELECT count(*)
        FROM attempts
        WHERE finished_at > (SELECT now FROM clock) - 3600 * 1000000
          AND outcome IN ('uncertain', 'malformed')) AS uncertain;

-- name: paused
SELECT subject FROM pauses;

-- name: journal
-- Sealed segments, the bytes in them that deliveries need as last seen, and the mark of the spool.
SELECT count(*) AS segments, coalesce(sum(live_bytes), 0) AS live,
    coalesce((SELECT max(mark) FROM spool), 0) AS mark
FROM segments
WHERE sealed_at IS NOT NULL;
