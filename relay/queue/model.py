"""Commands of a worker to the queue, and their results (`relay.queue.claim` executes them).

A worker asks for deliveries (`ClaimRequest`), reports the outcome of a claim (`Completion`) and
renews its lease (`Renewal`). It gets the claims, the state that a delivery has now
(`CompletionResult`), or whether it still holds its lease. Commands wait in a batch and are executed
together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from relay.queue.outcome import Outcome
from relay.queue.states import State
from relay.spool.journal.format import Place


@dataclass(frozen=True, slots=True)
class Claim:
    """A delivery that this worker may send, with its envelope. `claim` is the number of the claim;
    `received_ago` is in seconds; `place` is that of the body in the journal (None: a file);
    `prefix` has the fields that plugins have added, which leave before the body."""

    queue_id: str
    number: int
    claim: int
    route: str
    sender: str
    size: int
    recipients: tuple[str, ...]
    deferrals: int
    crash_count: int
    received_ago: float
    place: Place | None = None
    prefix: bytes = b""


class Attempt(NamedTuple):
    """One attempt at one server, as a row of `attempts`.

    `attempt_index` counts from 1 within the claim; times are seconds before now.
    """

    attempt_index: int
    server: str
    outcome: Outcome
    reply: str
    bytes_sent: int
    started_ago: float
    finished_ago: float


@dataclass(slots=True)
class Completion:
    """The outcome of a claim: the next state of the delivery, due after `delay` seconds.

    `in_journal`: a body there is not deleted by itself, so the database need not say whether it can
    be.
    """

    worker: str
    queue_id: str
    number: int
    claim: int
    state: State
    outcome: Outcome | None
    reply: str
    server: str | None = None
    delay: float = 0.0
    deferrals: int = 0
    attempts: list[Attempt] = field(default_factory=list)
    waiting_for: str | None = None  # the delivery becomes due when this works again
    in_journal: bool = False

    @property
    def key(self) -> tuple[str, int]:
        """The key of the delivery."""
        return self.queue_id, self.number


@dataclass(slots=True)
class ClaimRequest:
    """Claim at most `capacity` deliveries of each route, of these messages or (ids None) overdue
    ones. `early`: the rows of the one message may be under way."""

    worker: str
    ids: Sequence[str] | None
    capacity: Mapping[str, int]
    early: bool = False


@dataclass(slots=True)
class Renewal:
    """Renew the lease of a worker."""

    worker: str


@dataclass(frozen=True, slots=True)
class CompletionResult:
    """The state that a delivery has now (None: a later claim has it), and whether its body can be
    deleted."""

    state: State | None
    body_deletable: bool


def waits_for(route: str) -> str:
    """The value of `waiting_for` for a delivery that waits for a server of its route."""
    return f"route:{route}"


type Command = Completion | ClaimRequest | Renewal
type CommandResult = CompletionResult | list[Claim] | bool
