-- The queue for Prometheus.

-- name: counts
-- Deliveries by state, with the age of the oldest message in seconds. Each part has an index of its
-- own, so no history is scanned. A failed delivery with a due time has a DSN that is pending.
SELECT s.state, s.deliveries, s.overdue, extract(epoch FROM now() - m.received_at) AS age
FROM (
    SELECT state, count(*) AS deliveries, count(*) FILTER (WHERE due_at < now()) AS overdue,
           min(CAST(queue_id AS text)) AS oldest
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
JOIN messages m ON m.id = CAST(s.oldest AS uuid);

-- name: totals
-- Workers that are alive, and attempts of the last hour whose end is unknown.
SELECT (SELECT count(*) FROM workers WHERE ended_at IS NULL AND lease_expires_at > now())
           AS workers,
       (SELECT count(*)
        FROM attempts
        WHERE finished_at > now() - interval '1 hour' AND outcome IN ('uncertain', 'malformed'))
           AS uncertain;

-- name: paused
SELECT subject FROM pauses;

-- name: journal
-- Sealed segments, the bytes in them that deliveries need as last seen, and the mark of the spool.
SELECT count(*) AS segments, CAST(coalesce(sum(live_bytes), 0) AS bigint) AS live,
    coalesce((SELECT max(mark) FROM spool), 0) AS mark
FROM segments
WHERE sealed_at IS NOT NULL;
