"""File descriptors: how many this process may have, and what they are for.

Each connection takes one, and so does each large message on its way in. When they run out libuv
accepts and closes what waits, and a client is dropped without a word. So it must not come to that:
the limit is raised at start to what MAX_CONNECTIONS needs; where it cannot be raised so far, fewer
large messages are taken at a time, and smtpd stops accepting in time. Clients then wait in the
listen queue of the kernel.
"""

import resource
from typing import NamedTuple

from relay.log import get_logger

SPARE = 64
"""For all the rest: database, keeper, broker, metrics, listeners, directories that are synced."""
LEAST_BODIES = 32
"""Large messages at a time that the limit must carry in any case."""

log = get_logger(__name__)


class Descriptors(NamedTuple):
    """`last`: a connection with this number, or a higher one, is the last for now, since a new
    descriptor has the least number that is free. `bodies`: how many large messages may be open."""

    last: int
    bodies: int


def provide(connections: int) -> Descriptors:
    """Raise RLIMIT_NOFILE, if need be, to what `connections` (MAX_CONNECTIONS) need; warn if that
    cannot be had."""
    needed = 2 * connections + SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = needed if hard == resource.RLIM_INFINITY else hard
    limit = needed if soft == resource.RLIM_INFINITY else soft
    if limit < min(needed, most):
        limit = min(needed, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit < needed:
        told = {"limit": limit, "needed": needed, "max_connections": connections}
        log.warning("RLIMIT_NOFILE too low for RELAY_MAX_CONNECTIONS", **told)
    bodies = max(LEAST_BODIES, min(connections, limit - SPARE - connections))
    return Descriptors(limit - SPARE - bodies, bodies)
