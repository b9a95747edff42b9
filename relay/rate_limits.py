"""RELAY_RATE_LIMITS: how many messages, recipients or connections a minute, and of whom.

A limit is written `SUBJECT-WHAT=NUMBER`: `client-messages=60`, `sender-recipients=500`,
`user-messages=100`, `client-connections=30`. A client is an IPv4 address or a /64 of IPv6.
"""

import re
from typing import NamedTuple

SUBJECTS = ("client", "sender", "user")
COUNTED = ("messages", "recipients", "connections")
_LIMIT = re.compile(r"([a-z]+)-([a-z]+)=([1-9]\d{0,8})")


class RateLimit(NamedTuple):
    """At most `number` of `what` a minute for each `subject`."""

    subject: str
    what: str
    number: int

    def __str__(self) -> str:
        return f"{self.subject}-{self.what}={self.number}"


def parse_rate_limit(text: str) -> RateLimit:
    """`client-messages=60` and the like; raises ValueError."""
    match = _LIMIT.fullmatch(text)
    if match is None or match[1] not in SUBJECTS or match[2] not in COUNTED:
        raise ValueError(
            f"{text!r} is no limit: write client-messages=60 (client, sender or user;"
            " messages, recipients or connections; a number for a minute)"
        )
    if match[2] == "connections" and match[1] != "client":
        raise ValueError(f"{text!r}: a connection has a client and no {match[1]} yet")
    return RateLimit(match[1], match[2], int(match[3]))
