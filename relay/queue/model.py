"""What passes between a worker and the ledger, and waits in a round to be done with others
(`relay.queue.claim`).

A worker asks for claims (`ClaimRequest`), tells what became of them (`Completion`) and renews its
lease (`Renewal`); it gets claims, the state that each delivery has now (`CompletionResult`), or
whether it still has its lease.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from relay.db.schema import Outcome, State


@dataclass(frozen=True, slots=True)
class Claim:
    """A delivery that is ours to send, with its envelope. `claim` numbers the try; `received_ago`
    is in seconds."""

    queue_id: str
    number: int
    claim: int
    route: str
    sender: str
    size: int
    recipients: tuple[str, ...]
    backoff_step: int
    crash_count: int
    received_ago: float


@dataclass(slots=True)
class Attempt:
    """One try at one server; `attempt_index` counts from 1 within the claim, times are seconds
    before now."""

    attempt_index: int
    server: str
    outcome: Outcome
    reply: str
    bytes_sent: int
    started_ago: float
    finished_ago: float


@dataclass(slots=True)
class Completion:
    """What became of a claim: the state it should have next, due after `delay` seconds."""

    worker: str
    queue_id: str
    number: int
    claim: int
    state: State
    outcome: Outcome | None
    reply: str
    server: str | None = None
    delay: float = 0.0
    backoff_step: int = 0
    tries: list[Attempt] = field(default_factory=list)
    waiting_for: str | None = None  # what alone it is deferred for


@dataclass(slots=True)
class ClaimRequest:
    """Please claim, of these messages or (ids None) of what is overdue, at most `room` deliveries
    of each route, and of some routes `together` at most so many."""

    worker: str
    ids: Sequence[str] | None
    room: Mapping[str, int]
    together: Sequence[tuple[Collection[str], int]] = ()


@dataclass(slots=True)
class Renewal:
    """Please renew the lease of a worker."""

    worker: str


@dataclass(frozen=True, slots=True)
class CompletionResult:
    """The state that a delivery has now (None: a later claim has it), and whether nobody needs the
    body any more."""

    state: State | None
    body_deletable: bool


def waits_for(route: str) -> str:
    """What stands in `waiting_for` of a delivery that only its route keeps waiting."""
    return f"route:{route}"


type Command = Completion | ClaimRequest | Renewal
type CommandResult = CompletionResult | list[Claim] | bool
