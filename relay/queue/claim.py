"""A worker's side of the queue: claim, complete, renew.

One statement serves many rows (a `group_commit.CommitThread` runs `WorkerQueue.commit`). A claim
changes `queued` to `sending`, raises `claim_count` and returns the envelope. It takes deliveries
that hints name, or overdue ones: a worker should have claimed these by now. A completion inserts
the attempts of a claim and moves its delivery to the next state. The statements are in
`claim.postgresql.sql` and `claim.sqlite.sql`.

What must stay true:
- a completion is fenced by (worker, claim number): without the claim it changes nothing, except
  that a K makes the delivery `delivered` from any state, and no later completion undoes that;
- every statement may run again: a completion that is recorded returns the state that it made, and
  claims of a COMMIT of unknown outcome are returned before new ones (`_return_unknown_claims`);
- rows are locked in key order or skipped.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from relay.db.engine import writing
from relay.db.single import SingleTransactions
from relay.db.sql import Queries
from relay.hint_entry import EARLY_SEARCH
from relay.ids import dashed, lock_key
from relay.queue.model import (
    Claim,
    ClaimRequest,
    Command,
    CommandResult,
    Completion,
    CompletionResult,
    Renewal,
)
from relay.queue.outcome import Outcome
from relay.queue.split import Splitter
from relay.queue.states import State, successors
from relay.settings import WorkerSettings
from relay.spool.journal.format import Place
from relay.spool.retention import deletable_bodies
from relay.version import running_version

type Key = tuple[str, int]
# The other final states may have a DSN pending, which needs the body.
_WITHOUT_DSN = (State.DELIVERED, State.DROPPED)
_LOCK_NOT_AVAILABLE = "55P03"  # PostgreSQL, Appendix A


class _Recorded(NamedTuple):
    """The row of a delivery: `claim` is the number of its last claim."""

    claim: int
    state: State
    body_deletable: bool


_NO_ROW = _Recorded(0, State.DROPPED, False)  # the numbers of claims begin with 1


def longest_claim(settings: WorkerSettings) -> float:
    """From a claim to the `due_at` of its delivery: seconds, more than any session takes."""
    return 2 * settings.session_timeout + 2 * settings.lease


class WorkerQueue:
    """The queue as one worker process uses it. One thread calls `commit`."""

    def __init__(self, engine: Engine, settings: WorkerSettings) -> None:
        self.engine = engine
        self._far = longest_claim(settings)
        sends_dsns = settings.bounces == "dsn"
        self._queries = Queries(
            engine,
            __name__,
            grace=settings.grace,
            lease=settings.lease,
            sends_dsns=sends_dsns,
            far=self._far,
        )
        self._single = SingleTransactions(engine, self._queries)
        self._splitter = Splitter(engine, sends_dsns=sends_dsns)
        # Claims without a completion, by key; the value is the number of the claim.
        self._held: dict[Key, int] = {}
        self._commit_unknown = False
        # Routes whose overdue mail is claimed in two halves of an odd size: whether the larger one
        # was for fresh mail.
        self._odd: defaultdict[str, bool] = defaultdict(bool)

    def register(self, worker: str, host: str, pid: int) -> None:
        """Register a worker with a new lease and the longest time that it takes for a claim."""
        with writing(self.engine) as connection:
            self._queries.run(
                connection,
                "register_worker",
                worker=dashed(worker),
                host=host,
                pid=pid,
                claim_seconds=round(self._far),
                version=running_version(),
            )

    def retire(self, worker: str) -> None:
        """End a worker that stops in order. One that still holds claims stays for a sweeper."""
        with writing(self.engine) as connection:
            self._queries.run(connection, "retire_worker", worker=dashed(worker))

    def commit(self, items: Sequence[Command]) -> list[CommandResult]:
        """Complete, renew and claim in one transaction; the results in the order of the commands.

        Raises the database's errors. Then nothing changed, or the outcome of the COMMIT is unknown
        and the same call settles it.
        """
        commit_unknown, self._commit_unknown = self._commit_unknown, True
        results: list[CommandResult]
        match items:
            case [ClaimRequest() as request] if len(request.capacity) == 1 and not commit_unknown:
                results = [self._claim_alone(request)]
            case _:
                results = self._commit_together(items, commit_unknown=commit_unknown)
        self._commit_unknown = False  # not before the last statement that an outage may end
        for item, result in zip(items, results, strict=True):
            if isinstance(item, Completion) and self._held.get(item.key) == item.claim:
                del self._held[item.key]
            if isinstance(result, list):
                self._held |= {(claim.queue_id, claim.number): claim.claim for claim in result}
        return results

    def _commit_together(
        self, items: Sequence[Command], *, commit_unknown: bool
    ) -> list[CommandResult]:
        completions = [item for item in items if isinstance(item, Completion)]
        with writing(self.engine) as connection:
            # `Rescuer.expire_worker` locks the worker first and then its deliveries, as here.
            renewed = {
                worker: self._queries.run(connection, "renew_lease", worker=dashed(worker)).rowcount
                for worker in {item.worker for item in items if isinstance(item, Renewal)}
            }
            if commit_unknown:
                self._return_unknown_claims(connection, {item.worker for item in items})
            recorded = self._complete(connection, completions) if completions else []
            claims = [
                self._claim(connection, item) for item in items if isinstance(item, ClaimRequest)
            ]
        completed, claimed = iter(self._bodies_checked(completions, recorded)), iter(claims)
        results: list[CommandResult] = []
        for item in items:
            match item:
                case Renewal():
                    results.append(bool(renewed[item.worker]))
                case Completion():
                    results.append(next(completed))
                case ClaimRequest():
                    results.append(next(claimed))
        return results

    def _bodies_checked(
        self, completions: list[Completion], results: list[CompletionResult]
    ) -> list[CompletionResult]:
        """Check after the COMMIT whether bodies can be deleted.

        Two transactions that finish the last two deliveries of a message cannot see each other.
        """
        pairs = list(zip(completions, results, strict=True))
        unsure = {
            c.queue_id
            for c, r in pairs
            if r.state in _WITHOUT_DSN and not r.body_deletable and not c.in_journal
        }
        deletable = set(deletable_bodies(self.engine, unsure))
        return [
            replace(r, body_deletable=True)
            if c.queue_id in deletable and r.state in _WITHOUT_DSN
            else r
            for c, r in pairs
        ]

    def _return_unknown_claims(self, connection: Connection, workers: Iterable[str]) -> None:
        """Return the claims that a COMMIT of unknown outcome may have made."""
        held = [
            {"queue_id": dashed(queue_id), "number": number, "claim": claim}
            for (queue_id, number), claim in self._held.items()
        ]
        self._queries.run(
            connection,
            "return_unknown_claims",
            workers=json.dumps([dashed(worker) for worker in workers]),
            held=json.dumps(held),
        )

    def _claim_alone(self, request: ClaimRequest) -> list[Claim]:
        """A claim of one route that no other command accompanies: a message that comes alone waits
        for it. An early one waits, for EARLY_SEARCH at most, while a transaction inserts the
        message; SQLite has one writer at a time, so there it has waited already."""
        ((route, free),) = request.capacity.items()
        statements = [self._claim_statement(request, route, free)]
        if request.early and self.engine.dialect.name != "sqlite":
            (queue_id,) = request.ids or ()
            wait = {"announced": lock_key(queue_id), "patience": f"{EARLY_SEARCH:g}s"}
            statements.insert(0, ("wait_for_rows", wait))
        try:
            return _claims(self._single.run(*statements))
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
                raise
            return []

    def _claim(self, connection: Connection, request: ClaimRequest) -> list[Claim]:
        claims: list[Claim] = []
        for route, free in request.capacity.items():
            name, parameters = self._claim_statement(request, route, free)
            claims += _claims(self._queries.run(connection, name, **parameters))
        return claims

    def _claim_statement(
        self, request: ClaimRequest, route: str, free: int
    ) -> tuple[str, dict[str, Any]]:
        """The name and the parameters of the statement that claims so many of a route."""
        parameters = {"worker": dashed(request.worker), "route": route, "free": free}
        if request.ids is not None:
            ids = json.dumps([dashed(queue_id) for queue_id in request.ids])
            return "claim_hinted", parameters | {"ids": ids}
        self._odd[route] = odd = not self._odd[route]
        fresh = (free + odd) // 2
        return "claim_overdue", parameters | {"fresh": fresh, "retries": free - fresh}

    def _complete(
        self, connection: Connection, completions: list[Completion]
    ) -> list[CompletionResult]:
        # A K beats the completion of another claim of the same delivery, also in one batch: an
        # UPDATE may match a row only once.
        delivered = {r.key for r in completions if r.outcome is Outcome.DELIVERED}
        after = self._rows(
            connection,
            "complete",
            files=[dashed(r.queue_id) for r in completions if not r.in_journal],
            completions=[
                _completion_row(r)
                for r in completions
                if r.outcome is Outcome.DELIVERED or r.key not in delivered
            ],
            attempts=[
                {
                    "worker": dashed(r.worker),
                    "queue_id": dashed(r.queue_id),
                    "delivery": r.number,
                    "claim": r.claim,
                    **attempt._asdict(),
                }
                for r in completions
                for attempt in r.attempts
            ],
        )
        if missing := {r.key for r in completions} - after.keys():
            after |= self._rows(connection, "recorded_states", keys=_keys(missing))
        split = {
            r.key: r
            for r in completions
            if r.state is State.SPLIT and after.get(r.key, _NO_ROW)[:2] == (r.claim, State.SPLIT)
        }
        for completion in split.values():
            self._split(connection, completion)
        if split:
            # Another delivery of the message, completed in this batch, did not see the children:
            # its row may say that the body can be deleted.
            messages = {queue_id for queue_id, _ in split}
            again = [key for key in after if key[0] in messages]
            after |= self._rows(connection, "recorded_states", keys=_keys(again))
        for completion in completions:
            row = after.get(completion.key, _NO_ROW)
            if row.claim > completion.claim and completion.outcome is Outcome.DELIVERED:
                self._splitter.mark_parts_delivered(
                    connection, dashed(completion.queue_id), completion.number
                )
        return [_result(r, after.get(r.key, _NO_ROW)) for r in completions]

    def _rows(self, connection: Connection, name: str, **lists: list[Any]) -> dict[Key, _Recorded]:
        """The result of a statement by delivery; its parameters are lists of rows."""
        parameters = {parameter: json.dumps(rows) for parameter, rows in lists.items()}
        found = self._queries.run(connection, name, **parameters)
        return {(queue_id, number): _Recorded(*row) for queue_id, number, *row in found}

    def _split(self, connection: Connection, completion: Completion) -> None:
        """Split a delivery that was just completed as `split` (or see that it was done); one that
        cannot be split bounces."""
        key, number = dashed(completion.queue_id), completion.number
        if completion.outcome is Outcome.UNSENDABLE:
            self._splitter.split_unsendable(connection, key, number)
        elif not self._splitter.split_in_half(connection, key, number, completion.reply):
            self._queries.run(connection, "bounce_unsplittable", id=key, number=number)


def _claim(row: Any) -> Claim:
    """A row of a claim; SQLite has no arrays, so there the recipients are JSON."""
    *columns, segment, position, prefix = row
    listed = columns[6]
    columns[6] = tuple(json.loads(listed) if isinstance(listed, str) else listed or ())
    columns.append(Place(segment, position) if segment else None)
    columns.append(prefix.encode() if prefix else b"")
    return Claim(*columns)


def _claims(rows: Iterable[Any]) -> list[Claim]:
    return sorted(map(_claim, rows), key=lambda claim: claim.queue_id)


def _keys(keys: Iterable[Key]) -> list[dict[str, Any]]:
    return [{"queue_id": dashed(queue_id), "number": number} for queue_id, number in keys]


def _result(completion: Completion, row: _Recorded) -> CompletionResult:
    """A K holds for every claim; another state only for the claim that made it."""
    if row.claim == completion.claim or row.state == State.DELIVERED:
        deletable = bool(row.body_deletable) and not completion.in_journal
        return CompletionResult(State(row.state), deletable)
    return CompletionResult(None, body_deletable=False)


def _completion_row(completion: Completion) -> dict[str, Any]:
    if completion.state not in successors(State.SENDING):
        raise ValueError(f"no transition from sending to {completion.state}")
    if completion.state is State.DELIVERED and completion.outcome is not Outcome.DELIVERED:
        raise ValueError(f"{completion.outcome} is no reason for delivered")
    return {
        "worker": dashed(completion.worker),
        "queue_id": dashed(completion.queue_id),
        "number": completion.number,
        "claim": completion.claim,
        "state": completion.state,
        "delay": completion.delay,
        "deferrals": completion.deferrals,
        "outcome": completion.outcome,
        "reply": completion.reply,
        "server": completion.server,
        "waiting_for": completion.waiting_for,
    }
