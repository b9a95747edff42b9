"""The outcomes of an attempt as `attempts.outcome` and `deliveries.last_outcome` store them.

The client of a QMQP server reports how a request ended (`qmqp.client.SendOutcome`); the worker
records the same word. One outcome is the relay's own: `unsendable`, for a message that was not sent
because its body or its envelope cannot be. What must stay true: `Outcome(...)` takes every
`SendOutcome` (a test compares both).
"""

from enum import StrEnum

NO_REQUEST = "QMQP cannot carry the envelope"
"""The reason of an envelope that cannot be sent begins with this text."""


class Outcome(StrEnum):
    """How an attempt ended."""

    DELIVERED = "delivered"
    DEFERRED = "deferred"
    REJECTED = "rejected"
    UNREACHABLE = "unreachable"
    INTERRUPTED = "interrupted"
    UNCERTAIN = "uncertain"
    MALFORMED = "malformed"
    UNSENDABLE = "unsendable"
