"""Masks what differs between the reasons of one cause, so that they can be counted together.

A word with an @ is an address, and a word with a digit is a number, an id or a host. Status codes
stay, because they say what happened: `451 4.7.1 try again in 300 seconds` becomes `451 4.7.1 try
again in # seconds`. Callers do not mask the reason of a pause, because it names an operator. What
must stay true: the view `reason_summary` masks in the same way on both databases.
"""

import re

ADDRESS_MASK, NUMBER_MASK = "<address>", "#"
_ADDRESS = re.compile(r"[^ ]*@[^ ]*")
# A word with a digit that is neither a status code of RFC 5321 nor one of RFC 3463.
_NUMBER = re.compile(
    r"(?<![^ ])(?!(?:[245][0-9][0-9]|[245]\.[0-9]+\.[0-9]+)(?![^ ]))[^ ]*[0-9][^ ]*", re.ASCII
)


def masked(reason: str) -> str:
    """The reason with each address as `<address>`, and each other word with a digit as `#`."""
    return _NUMBER.sub(NUMBER_MASK, _ADDRESS.sub(ADDRESS_MASK, reason))
