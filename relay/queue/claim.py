"""A worker's side of the queue: claim, complete, renew.

One statement serves many rows (`WorkerQueue.commit` is what a `group_commit.CommitThread` runs). A
claim changes `queued` to `sending`, raises `claim_count` and returns the envelope. A completion
inserts the attempts of a claim and moves its delivery to the next state. SQLite has no CTE that
changes rows, so there both are several statements in one transaction.

What must stay true:
- a completion is fenced by (worker, claim number): without the claim it changes nothing, except
  that a K makes the delivery `delivered` from any state, and no later completion undoes that;
- every statement may run again: a completion that is recorded returns the state that it made, and
  claims of a COMMIT of unknown outcome are returned before new ones (`_return_unknown_claims`);
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

# Hints name ids. `state || ''` keeps PostgreSQL from using the index on the state: a plan that was
# made for a short queue would scan all that waits for the route.
_NAMED = (
    "d.queue_id IN (SELECT queue_id FROM @rows(:ids; queue_id uuid)) AND d.state || '' = 'queued'"
)
_CLAIM_SET = """-- event: claimed
    SET state = 'sending', worker = :worker, claim_count = claim_count + 1, pending_operation = NULL,
    pending_reason = NULL, waiting_for = NULL, due_at = @later(:far)"""
_ENVELOPE = "@hex(c.queue_id), c.number, c.claim_count, c.route, m.sender, m.size, c.backoff_step, c.crash_count"

_COMPLETION_ROWS = """@rows(:completions; queue_id uuid, number int, claim int, state text, delay float8, backoff_step int,
    outcome text, reply text, server text, waiting_for text)"""
_FINALS = f"""SELECT d.queue_id, d.number, x.delay, x.backoff_step, x.outcome, x.reply, x.server, x.waiting_for,
    -- event: completed, late K
    CASE WHEN x.outcome = 'delivered' THEN 'delivered' WHEN d.pending_operation IS NOT NULL THEN {WANTED}
         WHEN x.state = 'deferred' AND d.expires_at <= @now THEN 'expired' ELSE x.state END AS final
    FROM {_COMPLETION_ROWS} JOIN deliveries d ON d.queue_id = x.queue_id AND d.number = x.number
    WHERE (d.state = 'sending' AND d.worker = :worker AND d.claim_count = x.claim)
       OR (x.outcome = 'delivered' AND d.state <> 'delivered')
    ORDER BY d.queue_id, d.number"""
_COMPLETE_SET = f"""-- event: completed, pending operation, late K
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
# The UPDATE returns the result of a completion: its row after the change, and the other rows of the
# message before it.
_RETURNING = f"""RETURNING @hex(d.queue_id), d.number, d.claim_count, d.state, NOT {NEEDS_BODY} AND NOT EXISTS (
    SELECT 1 FROM deliveries o WHERE o.queue_id = d.queue_id AND o.number <> d.number AND {NEEDS_BODY})"""
_AFTER = f"""SELECT @hex(d.queue_id), d.number, d.claim_count, d.state, NOT {body_needed("d.queue_id")}
    FROM deliveries d JOIN {_COMPLETION_ROWS} ON d.queue_id = x.queue_id AND d.number = x.number"""
_WITHOUT_DSN = (
    State.DELIVERED,
    State.DROPPED,
)  # the other final states may have a DSN pending, which needs the body


def longest_claim(settings: WorkerSettings) -> float:
    """From a claim to the `due_at` of its delivery: seconds, more than any session takes."""
    return 2 * settings.session_timeout + 2 * settings.lease


class WorkerQueue:
    """The queue as one worker process uses it. One thread calls `commit`."""

    def __init__(self, engine: Engine, settings: WorkerSettings) -> None:
        self._engine = engine
        seconds = longest_claim(settings)
        self._far = round(seconds)
        self._sql = Statements(
            engine,
            grace=settings.grace,
            lease=settings.lease,
            notices=settings.bounces == "dsn",
            far=seconds,
        )
        self._splitter, self._overdue = Splitter(self._sql), OverduePoll(self._sql)
        self._held: dict[
            Key, tuple[str, int]
        ] = {}  # claims without a completion: key -> (worker, claim)
        self._commit_unknown = False

    def register(self, worker: str, host: str, pid: int) -> None:
        """Register a worker with a new lease and the longest time that it takes for a claim."""
        with writing(self._engine) as connection:
            self._sql.run(
                connection,
                "INSERT INTO workers (id, host, pid, started_at, lease_expires_at, claim_seconds)"
                " VALUES (:worker, :host, :pid, @now, @later(:lease), :claim_seconds) ON CONFLICT DO NOTHING",
                worker=dashed(worker), host=host, pid=pid, claim_seconds=self._far,
            )  # fmt: skip

    def retire(self, worker: str) -> None:
        """End a worker that stops in order. One that still holds claims stays for a sweeper."""
        with writing(self._engine) as connection:
            self._sql.run(
                connection,
                "UPDATE workers SET ended_at = @now, end_reason = 'stopped' WHERE id = :worker AND ended_at IS NULL"
                " AND NOT EXISTS (SELECT 1 FROM deliveries WHERE state = 'sending' AND worker = :worker)",
                worker=dashed(worker),
            )

    def commit(self, items: Sequence[Command]) -> list[CommandResult]:
        """Complete, renew and claim in one transaction; the results in the order of the commands.

        Raises the database's errors. Then nothing changed, or the outcome of the COMMIT is unknown
        and the same call settles it.
        """
        results: list[CommandResult] = [False] * len(items)
        claimed: dict[Key, tuple[str, int]] = {}
        completions = [(n, item) for n, item in enumerate(items) if isinstance(item, Completion)]
        commit_unknown, self._commit_unknown = self._commit_unknown, True
        with writing(self._engine) as connection:
            # `Rescuer.expire_worker` locks the worker first and then its deliveries, as here.
            for n, item in enumerate(items):
                if isinstance(item, Renewal):
                    results[n] = self._renew(connection, item.worker)
            if commit_unknown:
                self._return_unknown_claims(connection, {i.worker for i in items})
            for worker in dict.fromkeys(completion.worker for _, completion in completions):
                self._complete(
                    connection,
                    worker,
                    [(n, r) for n, r in completions if r.worker == worker],
                    results,
                )
            for n, item in enumerate(items):
                if isinstance(item, ClaimRequest):
                    results[n] = claims = self._claim(connection, item)
                    claimed.update({(c.queue_id, c.number): (item.worker, c.claim) for c in claims})
        self._check_bodies_again(completions, results)
        self._commit_unknown = False
        for _, completion in completions:
            key = (completion.queue_id, completion.number)
            if self._held.get(key) == (completion.worker, completion.claim):
                del self._held[key]
        self._held.update(claimed)
        return results

    def _check_bodies_again(
        self, completions: list[tuple[int, Completion]], results: list[CommandResult]
    ) -> None:
        """Check after the COMMIT whether bodies can be deleted.

        Two transactions that finish the last two deliveries of a message cannot see each other.
        """
        ended: dict[str, list[int]] = {}
        for n, completion in completions:
            if (
                isinstance(result := results[n], CompletionResult)
                and result.state in _WITHOUT_DSN
                and not result.body_deletable
            ):
                ended.setdefault(completion.queue_id, []).append(n)
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

    def _return_unknown_claims(self, connection: Connection, workers: Iterable[str]) -> None:
        """Return the claims that a COMMIT of unknown outcome may have made."""
        for worker in workers:
            held = [
                {"queue_id": dashed(m), "number": n, "claim": claim}
                for (m, n), (owner, claim) in self._held.items()
                if owner == worker
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

    def _claim(self, connection: Connection, request: ClaimRequest) -> list[Claim]:
        claims: list[Claim] = []
        for route, most in request.room.items():
            claims += self._claim_route(connection, request, route, most)
        return claims

    def _claim_route(
        self, connection: Connection, request: ClaimRequest, route: str, free: int
    ) -> list[Claim]:
        parameters = {"worker": dashed(request.worker), "route": route}
        if request.ids is None:
            return self._overdue.claim(
                connection, route, free, partial(self._picked, connection, "due_at", parameters)
            )
        parameters["ids"] = json.dumps([{"queue_id": dashed(i)} for i in request.ids])
        return self._picked(connection, "queue_id, number", parameters, _NAMED, free)

    def _picked(
        self,
        connection: Connection,
        order: str,
        parameters: dict[str, Any],
        which: str,
        free: int,
        **more: Any,
    ) -> list[Claim]:
        picked = f"""SELECT queue_id, number FROM deliveries d WHERE {which} AND route = :route
            ORDER BY {order} LIMIT :free"""
        parameters = parameters | more | {"free": free}
        if self._sql.postgresql:
            rows = self._sql.run(
                connection,
                f"""WITH p AS MATERIALIZED ({picked} @skip_locked),
                c AS (UPDATE deliveries d {_CLAIM_SET} FROM p WHERE {KEYS} RETURNING d.*)
                SELECT {_ENVELOPE}, @since(m.received_at), (SELECT array_agg(r.address ORDER BY r.position)
                    FROM recipients r WHERE r.queue_id = c.queue_id AND r.delivery = c.number)
                FROM c JOIN messages m ON m.id = c.queue_id ORDER BY m.id""",
                **parameters,
            )
            return [_claim(row, row[9] or ()) for row in rows]
        keys = self._sql.run(
            connection,
            f"UPDATE deliveries {_CLAIM_SET} WHERE (queue_id, number) IN ({picked}) RETURNING queue_id, number",
            **parameters,
        ).all()
        rows = self._sql.run(
            connection,
            f"""SELECT {_ENVELOPE}, @since(m.received_at), (SELECT json_group_array(address) FROM (SELECT r.address
                FROM recipients r WHERE r.queue_id = c.queue_id AND r.delivery = c.number ORDER BY r.position))
            FROM @rows(:keys; queue_id uuid, number int)
            JOIN deliveries c ON c.queue_id = x.queue_id AND c.number = x.number
            JOIN messages m ON m.id = c.queue_id ORDER BY m.id""",
            keys=json.dumps([{"queue_id": m, "number": n} for m, n in keys]),
        )
        return [_claim(row, json.loads(row[9])) for row in rows]

    def _complete(
        self,
        connection: Connection,
        worker: str,
        completions: list[tuple[int, Completion]],
        results: list[CommandResult],
    ) -> None:
        # A K beats the completion of another claim of the same delivery, also in one batch: an
        # UPDATE may match a row only once.
        taken = {(r.queue_id, r.number) for _, r in completions if r.outcome is Outcome.DELIVERED}
        inputs = [
            _completion_row(r)
            for _, r in completions
            if r.outcome is Outcome.DELIVERED or (r.queue_id, r.number) not in taken
        ]
        parameters = {
            "worker": dashed(worker),
            "completions": json.dumps(inputs),
            "tries": json.dumps(
                [
                    _attempt_row(completion, one)
                    for _, completion in completions
                    for one in completion.tries
                ]
            ),
        }
        after: dict[Key, tuple[int, State, bool]] = {}
        if self._sql.postgresql:
            rows = self._sql.run(
                connection,
                f"""WITH p AS MATERIALIZED ({_FINALS} @locked(d)), a AS ({_ATTEMPTS})
                UPDATE deliveries d {_COMPLETE_SET} FROM p WHERE {KEYS} {_RETURNING}""",
                **parameters,
            )
            # A split delivery has no children yet, so its body only seems deletable.
            after = {
                (m, n): (c, State(state), free)
                for m, n, c, state, free in rows
                if state != State.SPLIT
            }
        else:
            self._sql.run(connection, _ATTEMPTS, **parameters)
            sql = f"UPDATE deliveries AS d {_COMPLETE_SET} FROM ({_FINALS}) AS p WHERE {KEYS}"
            self._sql.run(connection, sql, **parameters)
        self._cut(
            connection,
            [completion for _, completion in completions if completion.state is State.SPLIT],
        )
        if rest := [
            completion
            for _, completion in completions
            if (completion.queue_id, completion.number) not in after
        ]:
            rows = self._sql.run(
                connection,
                _AFTER,
                completions=json.dumps([_completion_row(completion) for completion in rest]),
            )
            after |= {(m, n): (c, State(state), bool(free)) for m, n, c, state, free in rows}
        for n, completion in completions:
            claims, state, free = after.get(
                (completion.queue_id, completion.number), (0, None, False)
            )
            if claims > completion.claim and completion.outcome is Outcome.DELIVERED:
                self._splitter.taken(connection, dashed(completion.queue_id), completion.number)
            mine = claims == completion.claim or state is State.DELIVERED
            results[n] = CompletionResult(state if mine else None, free and mine)

    def _cut(self, connection: Connection, completions: list[Completion]) -> None:
        """Cut in two what was just completed as `split`; what cannot be cut bounces."""
        for completion in completions:
            key, number = dashed(completion.queue_id), completion.number
            state = "SELECT state FROM deliveries WHERE queue_id = @id(:id) AND number = :number AND claim_count = :claim"
            rows = self._sql.run(
                connection, state, id=key, number=number, claim=completion.claim
            ).scalar()
            if rows != State.SPLIT:
                continue
            if completion.outcome is Outcome.UNSENDABLE:
                self._splitter.part(connection, key, number)
            elif not self._splitter.cut(connection, key, number, completion.reply):
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


def _completion_row(completion: Completion) -> dict[str, Any]:
    if completion.state not in successors(State.SENDING):
        raise ValueError(f"no transition from sending to {completion.state}")
    if completion.state is State.DELIVERED and completion.outcome is not Outcome.DELIVERED:
        raise ValueError(f"{completion.outcome} is no reason for delivered")
    return {
        "queue_id": dashed(completion.queue_id), "number": completion.number, "claim": completion.claim,
        "state": completion.state, "delay": completion.delay, "backoff_step": completion.backoff_step,
        "outcome": completion.outcome, "reply": completion.reply, "server": completion.server,
        "waiting_for": completion.waiting_for,
    }  # fmt: skip


def _attempt_row(completion: Completion, one: Attempt) -> dict[str, Any]:
    return {
        "queue_id": dashed(completion.queue_id), "delivery": completion.number, "claim": completion.claim,
        "attempt_index": one.attempt_index,
        "server": one.server, "started_ago": one.started_ago, "finished_ago": one.finished_ago,
        "outcome": one.outcome, "reply": one.reply, "bytes_sent": one.bytes_sent,
    }  # fmt: skip
