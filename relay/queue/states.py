"""The states of a delivery, and every way from one state to another.

`TRANSITIONS` is the one table that decides: a row is an event, the state before and the state
after. A statement that changes `deliveries.state` names its events in a comment (`-- event:`)
beside the assignment. A test checks the states that such a statement writes against the rows of its
events, and in tests a trigger on both databases refuses every change that is not a row. The diagram
in docs/design.md is made from the table.

What must stay true: only `queued` can be claimed. A recorded K makes a delivery `delivered` from
every state (`LATE_K`), and no event leads away from `delivered`.
"""

from enum import Enum, StrEnum, auto
from functools import cache
from typing import NamedTuple

from relay.queue.outcome import Outcome


class State(StrEnum):
    """Where a delivery is."""

    QUEUED = "queued"
    SENDING = "sending"
    DEFERRED = "deferred"
    HELD = "held"
    SPLIT = "split"
    DELIVERED = "delivered"
    BOUNCED = "bounced"
    EXPIRED = "expired"
    DROPPED = "dropped"


class Wait(Enum):
    """How long a deferred delivery waits."""

    NONE = auto()
    BACKOFF = auto()  # longer every time
    SERVER = auto()  # for a server; it never grows, because the cause is not the mail
    UNCERTAIN = auto()  # long enough for a duplicate to be seen downstream


class ReasonSource(StrEnum):
    """Where the text in `deliveries.last_reply` comes from (`deliveries.reason_source`)."""

    SERVER = "server"
    RELAY = "relay"
    OPERATOR = "operator"  # an operator, or a command that an operator ran


class Transition(NamedTuple):
    """One way between two states. `before` is None when the event inserts the row."""

    event: str
    before: State | None
    after: State


UNFINISHED = (State.QUEUED, State.SENDING, State.DEFERRED, State.HELD)
FINAL = (State.DELIVERED, State.BOUNCED, State.EXPIRED, State.DROPPED)
_WAITING = (State.QUEUED, State.DEFERRED, State.HELD)

# The state after an operation: the event of a delivery that waits, or the pending
# operation of one that is being sent. A release only ends a pending hold.
PENDING_STATES = {
    "retry": State.QUEUED,
    "hold": State.HELD,
    "bounce": State.BOUNCED,
    "drop": State.DROPPED,
}
# The next state of a delivery after an attempt, and the kind of its wait.
OUTCOME_POLICY: dict[Outcome, tuple[State, Wait]] = {
    Outcome.DELIVERED: (State.DELIVERED, Wait.NONE),
    Outcome.DEFERRED: (State.DEFERRED, Wait.BACKOFF),
    Outcome.REJECTED: (State.BOUNCED, Wait.NONE),
    Outcome.UNREACHABLE: (State.DEFERRED, Wait.SERVER),
    Outcome.INTERRUPTED: (State.DEFERRED, Wait.BACKOFF),
    Outcome.UNCERTAIN: (State.DEFERRED, Wait.UNCERTAIN),
    Outcome.MALFORMED: (State.DEFERRED, Wait.UNCERTAIN),
    Outcome.UNSENDABLE: (State.HELD, Wait.NONE),
}
# The event that no row limits: a server's K for an earlier claim.
LATE_K = "late K"
TRANSITIONS = tuple(
    Transition(event, before, after)
    for event, sources, targets in (
        # smtpd and the DSN generator insert a message, or `fsck --rebuild` does, which holds it.
        ("accepted", (None,), (State.QUEUED,)),
        ("accepted on hold", (None,), (State.HELD,)),
        # A worker claims a delivery, or gives back a claim that it may not know of.
        ("claimed", (State.QUEUED,), (State.SENDING,)),
        ("claim returned", (State.SENDING,), (State.QUEUED,)),
        # A worker records the outcome of its claim.
        (
            "completed",
            (State.SENDING,),
            (
                State.DELIVERED,
                State.DEFERRED,
                State.QUEUED,
                State.BOUNCED,
                State.EXPIRED,
                State.HELD,
                State.SPLIT,
            ),
        ),
        # An operator requested it while the delivery was being sent.
        (
            "pending operation",
            (State.SENDING,),
            tuple(PENDING_STATES.values()),
        ),
        # The worker died, or its transfer took too long.
        (
            "worker lost",
            (State.SENDING,),
            (State.DEFERRED, State.HELD, State.EXPIRED),
        ),
        # A rejected delivery is split: the children are inserted in the same transaction. A
        # delivery that cannot be split bounces there, and so do the remaining parts of a sibling
        # that was rejected with the same text.
        ("child inserted", (None,), (State.QUEUED,)),
        ("split rejected", (State.SPLIT,), (State.BOUNCED,)),
        ("sibling rejected", (State.QUEUED, State.DEFERRED), (State.BOUNCED,)),
        # A sweeper requeues due deliveries, and deliveries that wait for a route that works again.
        ("due", (State.DEFERRED,), (State.QUEUED,)),
        ("route available", (State.DEFERRED,), (State.QUEUED,)),
        # A server did not authorize the relay; the D was not about the mail.
        ("reclassified", (State.BOUNCED,), (State.DEFERRED,)),
        # An operator changes a delivery that is not being sent.
        ("retry", (State.DEFERRED,), (PENDING_STATES["retry"],)),
        ("hold", (State.QUEUED, State.DEFERRED), (PENDING_STATES["hold"],)),
        ("release", (State.HELD,), (State.QUEUED,)),
        ("bounce", _WAITING, (PENDING_STATES["bounce"],)),
        ("drop", _WAITING, (PENDING_STATES["drop"],)),
        ("reroute", (State.DEFERRED,), (State.QUEUED,)),
        # A rerouted delivery is queued or held before it is divided.
        ("divided by route", (State.QUEUED, State.HELD), (State.SPLIT,)),
        ("divided by route", (None,), (State.QUEUED, State.HELD)),
        ("fsck", (State.QUEUED, State.DEFERRED), (State.HELD,)),
        ("fsck", (None,), (State.HELD,)),
        # The database was restored from a backup: the DSN may have been sent.
        ("fsck with a pending DSN", (State.BOUNCED, State.EXPIRED), (State.HELD,)),
    )
    for before in sources
    for after in targets
)


@cache
def successors(state: State) -> frozenset[State]:
    """The states that an event leads to from this one; a late K is no row, and not among them."""
    return frozenset(row.after for row in TRANSITIONS if row.before is state)
