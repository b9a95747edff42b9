"""What a worker does to the queue: claim, record, renew.

How it works: everything is done to many rows by one statement (`WorkerQueue.commit` is what a
`rounds.CommitThread` runs). A claim turns `queued` into `sending`, numbers itself in `claims`, and
brings the envelope along. A record says what became of that claim: its tries go into `attempts`,
its delivery into the next state. On SQLite, which knows no CTE that changes rows, a claim and a
record are several statements in one transaction.

What must stay true:
- a record is fenced by (worker, claim number): whoever lost its claim changes nothing, except that
  a K makes the delivery `delivered` from any state, and nothing that comes later undoes that;
- every statement may run again: a record that is there already answers the state it made, and
  claims whose COMMIT was in doubt are handed back before new ones are made (`_return_strays`);
- rows are locked in key order or skipped.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from sqlalchemy import Connection, Engine

from relay.db.engine import writing
from relay.db.schema import DSN_PENDING, NEEDS_BODY
from relay.db.sql import Statements
from relay.ids import dashed
from relay.queue.model import (
    Attempt,
    Claim,
    ClaimRequest,
    Command,
    CommandResult,
    Completion,
    CompletionResult,
    Renewal,
)
from relay.queue.overdue import OverduePoll
from relay.queue.split import Splitter
from relay.queue.states import Outcome, State, successors
from relay.settings import WorkerSettings
from relay.spool.retention import body_needed, deletable_bodies

type Key = tuple[str, int]
KEYS = "d.queue_id = p.queue_id AND d.number = p.number"
WANTED = """-- event: pending operation
    CASE d.pending_operation WHEN 'hold' THEN 'held' WHEN 'drop' THEN 'dropped' WHEN 'bounce' THEN 'bounced'
    ELSE 'queued' END"""
DUE = f"""CASE WHEN p.final = 'deferred' THEN @later(p.delay) WHEN p.final = 'queued' THEN @later(:grace)
    WHEN p.final IN ('bounced', 'expired') THEN {DSN_PENDING} END"""
# When a pending operation takes effect, the reason is the operator's. The server replied to
# something else.
_BY_OPERATOR = "d.pending_operation IN ('hold', 'drop', 'bounce') AND p.final <> 'delivered'"
REASON = f"""last_reply = CASE WHEN {_BY_OPERATOR} THEN coalesce(d.pending_reason, p.final || ' by an operator')
        ELSE {{reply}} END,
    reason_source = CASE WHEN {_BY_OPERATOR} THEN 'operator' ELSE {{source}} END"""
_REPLY = "CASE WHEN p.outcome IS NULL THEN d.last_reply ELSE p.reply END"
_SOURCE = """CASE WHEN p.outcome IS NULL THEN d.reason_source
        WHEN p.outcome IN ('delivered', 'deferred', 'rejected') THEN 'server' ELSE 'relay' END"""
FINISHED = "CASE WHEN p.final IN ('delivered', 'bounced', 'expired', 'dropped') THEN @now END"

# Hints name keys. Spelt like this, the state does not let a plan that was made for a short queue
# walk through all that waits for the route, looking for them.
_NAMED = (
    "d.queue_id IN (SELECT queue_id FROM @rows(:ids; queue_id uuid)) AND d.state || '' = 'queued'"
)
_CLAIM_SET = """-- event: claimed
    SET state = 'sending', worker = :worker, claim_count = claim_count + 1, pending_operation = NULL,
    pending_reason = NULL, waiting_for = NULL, due_at = @later(:far)"""
_ENVELOPE = "@hex(c.queue_id), c.number, c.claim_count, c.route, m.sender, m.size, c.backoff_step, c.crash_count"

_RECORD_ROWS = """@rows(:records; queue_id uuid, number int, claim int, state text, delay float8, backoff_step int,
    outcome text, reply text, server text, waiting_for text)"""
_FINALS = f"""SELECT d.queue_id, d.number, x.delay, x.backoff_step, x.outcome, x.reply, x.server, x.waiting_for,
    -- event: completed, late K
    CASE WHEN x.outcome = 'delivered' THEN 'delivered' WHEN d.pending_operation IS NOT NULL THEN {WANTED}
         WHEN x.state = 'deferred' AND d.expires_at <= @now THEN 'expired' ELSE x.state END AS final
    FROM {_RECORD_ROWS} JOIN deliveries d ON d.queue_id = x.queue_id AND d.number = x.number
    WHERE (d.state = 'sending' AND d.worker = :worker AND d.claim_count = x.claim)
       OR (x.outcome = 'delivered' AND d.state <> 'delivered')
    ORDER BY d.queue_id, d.number"""
_RECORD_SET = f"""-- event: completed, pending operation, late K
    SET state = p.final, due_at = {DUE}, finished_at = {FINISHED}, worker = NULL, pending_operation = NULL,
    pending_reason = NULL,
    crash_count = CASE WHEN coalesce(p.outcome, 'unreachable') = 'unreachable' THEN d.crash_count ELSE 0 END,
    backoff_step = p.backoff_step, last_outcome = coalesce(p.outcome, d.last_outcome),
    {REASON.format(reply=_REPLY, source=_SOURCE)},
    last_server = coalesce(p.server, d.last_server),
    waiting_for = CASE WHEN p.final = 'deferred' THEN p.waiting_for END"""
_ATTEMPTS = """INSERT INTO attempts (queue_id, delivery, claim, attempt_index, worker, server, started_at, finished_at, outcome,
        reply, bytes_sent)
    SELECT queue_id, delivery, claim, attempt_index, @id(:worker), server, @ago(started_ago), @ago(finished_ago), outcome,
        reply, bytes_sent
    FROM @rows(:tries; queue_id uuid, delivery int, claim int, attempt_index int, server text, started_ago float8,
        finished_ago float8, outcome text, reply text, bytes_sent bigint) WHERE true
    ON CONFLICT DO NOTHING"""
# What a record came to, told by the UPDATE itself: this row as it is now, the others of its message
# as they were.
_CAME_TO = f"""RETURNING @hex(d.queue_id), d.number, d.claim_count, d.state, NOT {NEEDS_BODY} AND NOT EXISTS (
    SELECT 1 FROM deliveries o WHERE o.queue_id = d.queue_id AND o.number <> d.number AND {NEEDS_BODY})"""
_AFTER = f"""SELECT @hex(d.queue_id), d.number, d.claim_count, d.state, NOT {body_needed("d.queue_id")}
    FROM deliveries d JOIN {_RECORD_ROWS} ON d.queue_id = x.queue_id AND d.number = x.number"""
_DONE = (
    State.DELIVERED,
    State.DROPPED,
)  # after anything else that is final a sweeper looks, if a notice is owed


def longest_claim(settings: WorkerSettings) -> float:
    """From a claim to the `due_at` of its delivery: seconds, more than any session takes."""
    return 2 * settings.session_timeout + 2 * settings.lease


class WorkerQueue:
    """The queue as one worker process uses it. `commit` is called by one thread."""

    def __init__(self, engine: Engine, settings: WorkerSettings) -> None:
        self._engine = engine
        far = longest_claim(settings)
        self._far = round(far)
        self._sql = Statements(
            engine,
            grace=settings.grace,
            lease=settings.lease,
            notices=settings.bounces == "dsn",
            far=far,
        )
        self._splitter, self._looks = Splitter(self._sql), OverduePoll(self._sql)
        self._held: dict[
            Key, tuple[str, int]
        ] = {}  # what we claimed and have not recorded: key -> (worker, claim)
        self._in_doubt = False

    def register(self, worker: str, host: str, pid: int) -> None:
        """Add a worker with a fresh lease, and how long it gives itself for a claim."""
        with writing(self._engine) as connection:
            self._sql.run(
                connection,
                "INSERT INTO workers (id, host, pid, started_at, lease_expires_at, claim_seconds)"
                " VALUES (:worker, :host, :pid, @now, @later(:lease), :claim_seconds) ON CONFLICT DO NOTHING",
                worker=dashed(worker), host=host, pid=pid, claim_seconds=self._far,
            )  # fmt: skip

    def retire(self, worker: str) -> None:
        """End a worker that stops of its own accord; what it still holds is a sweeper's."""
        with writing(self._engine) as connection:
            self._sql.run(
                connection,
                "UPDATE workers SET ended_at = @now, end_reason = 'stopped' WHERE id = :worker AND ended_at IS NULL"
                " AND NOT EXISTS (SELECT 1 FROM deliveries WHERE state = 'sending' AND worker = :worker)",
                worker=dashed(worker),
            )

    def commit(self, items: Sequence[Command]) -> list[CommandResult]:
        """Record, renew and claim in one transaction; results in the order of the items,
        `CommandResult` by kind.

        Raises the database's errors; then nothing happened, or it is in doubt and the same call
        settles it.
        """
        results: list[CommandResult] = [False] * len(items)
        claimed: dict[Key, tuple[str, int]] = {}
        records = [(n, item) for n, item in enumerate(items) if isinstance(item, Completion)]
        in_doubt, self._in_doubt = self._in_doubt, True
        with writing(self._engine) as connection:
            # A burial locks the worker and then its deliveries; so do we.
            for n, item in enumerate(items):
                if isinstance(item, Renewal):
                    results[n] = self._renew(connection, item.worker)
            if in_doubt:
                self._return_strays(connection, {i.worker for i in items})
            for worker in dict.fromkeys(record.worker for _, record in records):
                self._record(
                    connection, worker, [(n, r) for n, r in records if r.worker == worker], results
                )
            for n, item in enumerate(items):
                if isinstance(item, ClaimRequest):
                    results[n] = claims = self._claim(connection, item)
                    claimed.update({(c.queue_id, c.number): (item.worker, c.claim) for c in claims})
        self._look_again(records, results)
        self._in_doubt = False
        for _, record in records:
            key = (record.queue_id, record.number)
            if self._held.get(key) == (record.worker, record.claim):
                del self._held[key]
        self._held.update(claimed)
        return results

    def _look_again(
        self, records: list[tuple[int, Completion]], results: list[CommandResult]
    ) -> None:
        """Whether a body is needed still, after the COMMIT: who ended another delivery of it
        meanwhile saw not ours."""
        ended: dict[str, list[int]] = {}
        for n, record in records:
            if (
                isinstance(found := results[n], CompletionResult)
                and found.state in _DONE
                and not found.body_deletable
            ):
                ended.setdefault(record.queue_id, []).append(n)
        for queue_id in deletable_bodies(self._engine, self._sql, ended):
            for n in ended[queue_id]:
                results[n] = replace(cast(CompletionResult, results[n]), body_deletable=True)

    def _renew(self, connection: Connection, worker: str) -> bool:
        return bool(
            self._sql.run(
                connection,
                "UPDATE workers SET lease_expires_at = @later(:lease) WHERE id = :worker AND ended_at IS NULL",
                worker=dashed(worker),
            ).rowcount
        )

    def _return_strays(self, connection: Connection, workers: Iterable[str]) -> None:
        """Hand back what a COMMIT in doubt may have claimed for us without our knowing."""
        for worker in workers:
            held = [
                {"queue_id": dashed(m), "number": n, "claim": claim}
                for (m, n), (who, claim) in self._held.items()
                if who == worker
            ]
            self._sql.run(
                connection,
                """-- event: claim returned
                UPDATE deliveries SET state = 'queued', worker = NULL, due_at = @now
                WHERE state = 'sending' AND worker = :worker AND NOT EXISTS (
                    SELECT 1 FROM @rows(:held; queue_id uuid, number int, claim int) WHERE x.claim = deliveries.claim_count
                    AND x.queue_id = deliveries.queue_id AND x.number = deliveries.number)""",
                worker=dashed(worker), held=json.dumps(held),
            )  # fmt: skip

    def _claim(self, connection: Connection, wish: ClaimRequest) -> list[Claim]:
        claims: list[Claim] = []
        for route, most in wish.room.items():
            shared = [
                left - sum(c.route in them for c in claims)
                for them, left in wish.together
                if route in them
            ]
            if (free := min([most, *shared])) > 0:
                claims += self._claim_route(connection, wish, route, free)
        return claims

    def _claim_route(
        self, connection: Connection, wish: ClaimRequest, route: str, free: int
    ) -> list[Claim]:
        given = {"worker": dashed(wish.worker), "route": route}
        if wish.ids is None:
            return self._looks.claim(
                connection, route, free, partial(self._picked, connection, "due_at", given)
            )
        given["ids"] = json.dumps([{"queue_id": dashed(i)} for i in wish.ids])
        return self._picked(connection, "queue_id, number", given, _NAMED, free)

    def _picked(
        self,
        connection: Connection,
        order: str,
        given: dict[str, Any],
        which: str,
        free: int,
        **more: Any,
    ) -> list[Claim]:
        picked = f"""SELECT queue_id, number FROM deliveries d WHERE {which} AND route = :route
            ORDER BY {order} LIMIT :free"""
        given = given | more | {"free": free}
        if self._sql.postgresql:
            found = self._sql.run(
                connection,
                f"""WITH p AS MATERIALIZED ({picked} @skip_locked),
                c AS (UPDATE deliveries d {_CLAIM_SET} FROM p WHERE {KEYS} RETURNING d.*)
                SELECT {_ENVELOPE}, @since(m.received_at), (SELECT array_agg(r.address ORDER BY r.position)
                    FROM recipients r WHERE r.queue_id = c.queue_id AND r.delivery = c.number)
                FROM c JOIN messages m ON m.id = c.queue_id ORDER BY m.id""",
                **given,
            )
            return [_claim(row, row[9] or ()) for row in found]
        keys = self._sql.run(
            connection,
            f"UPDATE deliveries {_CLAIM_SET} WHERE (queue_id, number) IN ({picked}) RETURNING queue_id, number",
            **given,
        ).all()
        found = self._sql.run(
            connection,
            f"""SELECT {_ENVELOPE}, @since(m.received_at), (SELECT json_group_array(address) FROM (SELECT r.address
                FROM recipients r WHERE r.queue_id = c.queue_id AND r.delivery = c.number ORDER BY r.position))
            FROM @rows(:keys; queue_id uuid, number int)
            JOIN deliveries c ON c.queue_id = x.queue_id AND c.number = x.number
            JOIN messages m ON m.id = c.queue_id ORDER BY m.id""",
            keys=json.dumps([{"queue_id": m, "number": n} for m, n in keys]),
        )
        return [_claim(row, json.loads(row[9])) for row in found]

    def _record(
        self,
        connection: Connection,
        worker: str,
        records: list[tuple[int, Completion]],
        results: list[CommandResult],
    ) -> None:
        # A K beats what another claim of the same delivery came to, also in one round: one row may
        # match once only.
        taken = {(r.queue_id, r.number) for _, r in records if r.outcome is Outcome.DELIVERED}
        rows = [
            _record_row(r)
            for _, r in records
            if r.outcome is Outcome.DELIVERED or (r.queue_id, r.number) not in taken
        ]
        given = {
            "worker": dashed(worker),
            "records": json.dumps(rows),
            "tries": json.dumps(
                [_try_row(record, one) for _, record in records for one in record.tries]
            ),
        }
        after: dict[Key, tuple[int, State, bool]] = {}
        if self._sql.postgresql:
            found = self._sql.run(
                connection,
                f"""WITH p AS MATERIALIZED ({_FINALS} @locked(d)), a AS ({_ATTEMPTS})
                UPDATE deliveries d {_RECORD_SET} FROM p WHERE {KEYS} {_CAME_TO}""",
                **given,
            )
            # What is about to be cut has a body that nobody needs, until it has been.
            after = {
                (m, n): (c, State(state), free)
                for m, n, c, state, free in found
                if state != State.SPLIT
            }
        else:
            self._sql.run(connection, _ATTEMPTS, **given)
            sql = f"UPDATE deliveries AS d {_RECORD_SET} FROM ({_FINALS}) AS p WHERE {KEYS}"
            self._sql.run(connection, sql, **given)
        self._cut(connection, [record for _, record in records if record.state is State.SPLIT])
        if rest := [
            record for _, record in records if (record.queue_id, record.number) not in after
        ]:
            found = self._sql.run(
                connection, _AFTER, records=json.dumps([_record_row(record) for record in rest])
            )
            after |= {(m, n): (c, State(state), bool(free)) for m, n, c, state, free in found}
        for n, record in records:
            claims, state, free = after.get((record.queue_id, record.number), (0, None, False))
            if claims > record.claim and record.outcome is Outcome.DELIVERED:
                self._splitter.taken(connection, dashed(record.queue_id), record.number)
            mine = claims == record.claim or state is State.DELIVERED
            results[n] = CompletionResult(state if mine else None, free and mine)

    def _cut(self, connection: Connection, records: list[Completion]) -> None:
        """Cut in two what was just recorded as `split`; what cannot be cut bounces."""
        for record in records:
            key, number = dashed(record.queue_id), record.number
            state = "SELECT state FROM deliveries WHERE queue_id = @id(:id) AND number = :number AND claim_count = :claim"
            found = self._sql.run(
                connection, state, id=key, number=number, claim=record.claim
            ).scalar()
            if found != State.SPLIT:
                continue
            if record.outcome is Outcome.UNSENDABLE:
                self._splitter.part(connection, key, number)
            elif not self._splitter.cut(connection, key, number, record.reply):
                self._sql.run(
                    connection,
                    f"""-- event: cut refused
                    UPDATE deliveries AS d SET state = 'bounced', finished_at = @now, due_at = {DSN_PENDING}
                    WHERE queue_id = @id(:id) AND number = :number""",
                    id=key,
                    number=number,
                )


def _claim(row: Any, recipients: Sequence[str]) -> Claim:
    queue_id, number, claims, route, sender, size, step, crash_count, ago = row[:9]
    return Claim(
        queue_id,
        number,
        claims,
        route,
        sender,
        size,
        tuple(recipients),
        step,
        crash_count,
        float(ago),
    )


def _record_row(record: Completion) -> dict[str, Any]:
    if record.state not in successors(State.SENDING):
        raise ValueError(f"no way from sending to {record.state}")
    if record.state is State.DELIVERED and record.outcome is not Outcome.DELIVERED:
        raise ValueError(f"{record.outcome} is no reason for delivered")
    return {
        "queue_id": dashed(record.queue_id), "number": record.number, "claim": record.claim,
        "state": record.state, "delay": record.delay, "backoff_step": record.backoff_step,
        "outcome": record.outcome, "reply": record.reply, "server": record.server,
        "waiting_for": record.waiting_for,
    }  # fmt: skip


def _try_row(record: Completion, one: Attempt) -> dict[str, Any]:
    return {
        "queue_id": dashed(record.queue_id), "delivery": record.number, "claim": record.claim,
        "attempt_index": one.attempt_index,
        "server": one.server, "started_ago": one.started_ago, "finished_ago": one.finished_ago,
        "outcome": one.outcome, "reply": one.reply, "bytes_sent": one.bytes_sent,
    }  # fmt: skip
