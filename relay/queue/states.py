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
    SERVER = auto()  # for a server; the mail is not at fault, so it never grows
    UNCERTAIN = auto()  # long enough for a duplicate to be seen downstream


class ReasonSource(StrEnum):
    """Where the text in `deliveries.last_reply` comes from (`deliveries.reason_source`)."""

    SERVER = "server"
    RELAY = "relay"
    OPERATOR = "operator"


class Transition(NamedTuple):
    """One way between two states. `before` is None when the event inserts the row."""

    event: str
    before: State | None
    after: State


UNFINISHED = (State.QUEUED, State.SENDING, State.DEFERRED, State.HELD)
FINAL = (State.DELIVERED, State.BOUNCED, State.EXPIRED, State.DROPPED)
_WAITING = (State.QUEUED, State.DEFERRED, State.HELD)

# The next state of a delivery after an attempt, and what the wait depends on.
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
        # smtpd and the DSN generator insert a message.
        ("accepted", (None,), (State.QUEUED,)),
        # A worker claims a delivery, or gives back a claim that it may not know of.
        ("claimed", (State.QUEUED,), (State.SENDING,)),
        ("claim returned", (State.SENDING,), (State.QUEUED,)),
        # A worker records what became of its claim.
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
        # An operator asked for it while the delivery was being sent.
        (
            "pending operation",
            (State.SENDING,),
            (State.QUEUED, State.HELD, State.DROPPED, State.BOUNCED),
        ),
        # The worker died, or its transfer took too long.
        (
            "worker lost",
            (State.SENDING,),
            (State.DEFERRED, State.HELD, State.EXPIRED),
        ),
        # A refused delivery is cut: the children are inserted in the same transaction. What cannot
        # be cut bounces there, and so does what is left of a sibling that was refused alike.
        ("child inserted", (None,), (State.QUEUED,)),
        ("cut refused", (State.SPLIT,), (State.BOUNCED,)),
        ("sibling refused", (State.QUEUED, State.DEFERRED), (State.BOUNCED,)),
        # A sweeper wakes what is due, or what waits for a route that works again.
        ("due", (State.DEFERRED,), (State.QUEUED,)),
        ("route available", (State.DEFERRED,), (State.QUEUED,)),
        # A server refused the relay, not the mail.
        ("reclassified", (State.BOUNCED,), (State.DEFERRED,)),
        # An operator changes what is not being sent.
        ("retry", (State.DEFERRED,), (State.QUEUED,)),
        ("hold", (State.QUEUED, State.DEFERRED), (State.HELD,)),
        ("release", (State.HELD,), (State.QUEUED,)),
        ("bounce", _WAITING, (State.BOUNCED,)),
        ("drop", _WAITING, (State.DROPPED,)),
        ("reroute", (State.DEFERRED,), (State.QUEUED,)),
        ("divided by route", _WAITING, (State.SPLIT,)),
        ("divided by route", (None,), _WAITING),
        ("fsck", (State.QUEUED, State.DEFERRED), (State.HELD,)),
        ("fsck", (None,), (State.HELD,)),
    )
    for before in sources
    for after in targets
)


@cache
def successors(state: State) -> frozenset[State]:
    """The states that an event leads to from this one; a late K is no row, and not among them."""
    return frozenset(row.after for row in TRANSITIONS if row.before is state)
