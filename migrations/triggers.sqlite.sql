-- The triggers that write the outbox (migrations/triggers.py). A trigger is a part of the statement
-- that changes a delivery. Without a subscription it does nothing but look for one.

-- name: drop_triggers
DROP TRIGGER IF EXISTS record_accepted;
DROP TRIGGER IF EXISTS record_split;
DROP TRIGGER IF EXISTS record_outcome;
DROP TRIGGER IF EXISTS record_warned;
DROP TRIGGER IF EXISTS notify_subscriptions;

-- name: create_triggers
-- The id of `accepted` is made from the delivery: rows that `fsck --rebuild` makes again have an
-- event with the same id. Every other id is random.
CREATE TRIGGER record_accepted AFTER INSERT ON deliveries
WHEN NEW.parent IS NULL AND EXISTS (SELECT 1 FROM subscriptions)
BEGIN
    INSERT INTO events (id, at, type, queue_id, delivery, route, reply, reason_source)
    SELECT k.id, (SELECT now FROM clock), k.type, NEW.queue_id, NEW.number, NEW.route,
        NEW.last_reply, NEW.reason_source
    FROM (
        SELECT replace(NEW.queue_id, '-', '') || '-' || NEW.number AS id, 'accepted' AS type,
            1 AS place
        UNION ALL
        SELECT lower(hex(randomblob(16))), 'held', 2
        WHERE NEW.state = 'held'
    ) AS k
    WHERE EXISTS (
        SELECT 1 FROM subscriptions s
        WHERE s.disabled_at IS NULL
            AND (s.types IS NULL OR k.type IN (SELECT value FROM json_each(s.types)))
            AND (s.routes IS NULL OR NEW.route IN (SELECT value FROM json_each(s.routes))))
    ORDER BY k.place;
END;

-- A delivery is split when its first child is inserted: its state alone may be taken back in the
-- same transaction, when it turns out that it cannot be split.
CREATE TRIGGER record_split AFTER INSERT ON deliveries
WHEN NEW.parent IS NOT NULL AND EXISTS (SELECT 1 FROM subscriptions)
BEGIN
    INSERT INTO events (id, at, type, queue_id, delivery, route, attempt, server, outcome, reply,
        reason_source)
    SELECT lower(hex(randomblob(16))), (SELECT now FROM clock), 'split', p.queue_id, p.number,
        p.route, p.claim_count, p.last_server, p.last_outcome, p.last_reply, p.reason_source
    FROM deliveries p
    WHERE p.queue_id = NEW.queue_id AND p.number = NEW.parent
        AND NOT EXISTS (
            SELECT 1 FROM events e
            WHERE e.queue_id = NEW.queue_id AND e.delivery = NEW.parent AND e.type = 'split')
        AND EXISTS (
            SELECT 1 FROM subscriptions s
            WHERE s.disabled_at IS NULL
                AND (s.types IS NULL OR 'split' IN (SELECT value FROM json_each(s.types)))
                AND (s.routes IS NULL OR p.route IN (SELECT value FROM json_each(s.routes))));
END;

-- An attempt was uncertain if its row says so, or if its reply was malformed after the whole
-- request. Then `uncertain` takes the place of `deferred`, and comes before every other type.
CREATE TRIGGER record_outcome AFTER UPDATE OF state ON deliveries
WHEN NEW.state <> OLD.state
    AND (NEW.state IN ('delivered', 'deferred', 'bounced', 'expired', 'held', 'dropped')
        OR (OLD.state = 'sending' AND NEW.state = 'queued' AND NEW.last_outcome IN (
            'uncertain', 'malformed')))
    AND EXISTS (SELECT 1 FROM subscriptions)
BEGIN
    INSERT INTO events (id, at, type, queue_id, delivery, route, attempt, server, outcome, reply,
        reason_source, next_at)
    SELECT lower(hex(randomblob(16))), (SELECT now FROM clock), k.type, NEW.queue_id, NEW.number,
        NEW.route, NULLIF(NEW.claim_count, 0), NEW.last_server, NEW.last_outcome, NEW.last_reply,
        NEW.reason_source, CASE WHEN NEW.state IN ('deferred', 'queued') THEN NEW.due_at END
    FROM (
        SELECT OLD.state = 'sending' AND NEW.state <> 'delivered' AND EXISTS (
            SELECT 1 FROM attempts a JOIN messages m ON m.id = a.queue_id
            WHERE a.queue_id = NEW.queue_id AND a.delivery = NEW.number
                AND a.claim = NEW.claim_count
                AND (a.outcome = 'uncertain'
                    OR (a.outcome = 'malformed' AND a.bytes_sent >= m.size))) AS uncertain
    ) AS u JOIN (
        SELECT 'uncertain' AS type, 1 AS place
        UNION ALL
        SELECT NEW.state, 2
    ) AS k ON CASE WHEN k.place = 1 THEN u.uncertain
        ELSE NEW.state <> 'queued' AND NOT (u.uncertain AND NEW.state = 'deferred') END
    WHERE EXISTS (
        SELECT 1 FROM subscriptions s
        WHERE s.disabled_at IS NULL
            AND (s.types IS NULL OR k.type IN (SELECT value FROM json_each(s.types)))
            AND (s.routes IS NULL OR NEW.route IN (SELECT value FROM json_each(s.routes))))
    ORDER BY k.place;
END;

CREATE TRIGGER record_warned AFTER UPDATE OF warned_at ON deliveries
WHEN OLD.warned_at IS NULL AND NEW.warned_at IS NOT NULL
BEGIN
    INSERT INTO events (id, at, type, queue_id, delivery, route, attempt, server, outcome, reply,
        reason_source, next_at)
    SELECT lower(hex(randomblob(16))), (SELECT now FROM clock), 'warned', NEW.queue_id, NEW.number,
        NEW.route, NULLIF(NEW.claim_count, 0), NEW.last_server, NEW.last_outcome, NEW.last_reply,
        NEW.reason_source, CASE WHEN NEW.state = 'deferred' THEN NEW.due_at END
    WHERE EXISTS (
        SELECT 1 FROM subscriptions s
        WHERE s.disabled_at IS NULL
            AND (s.types IS NULL OR 'warned' IN (SELECT value FROM json_each(s.types)))
            AND (s.routes IS NULL OR NEW.route IN (SELECT value FROM json_each(s.routes))));
END;

CREATE TRIGGER notify_subscriptions AFTER INSERT ON events
BEGIN
    INSERT INTO notifications (queue_id, subscription, sequence, queued_at, due_at)
    SELECT NEW.queue_id, s.name, NEW.sequence, NEW.at, NEW.at FROM subscriptions s
    WHERE s.disabled_at IS NULL
        AND (s.types IS NULL OR NEW.type IN (SELECT value FROM json_each(s.types)))
        AND (s.routes IS NULL OR NEW.route IN (SELECT value FROM json_each(s.routes)));
END;
