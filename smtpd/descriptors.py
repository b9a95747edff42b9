"""File descriptors: raises their limit to what the settings need, and shares them out.

A connection needs one, and so does a large message while it arrives. Without a free descriptor
libuv accepts a connection and closes it, so the client gets no reply. To prevent that, the limit is
raised at start. Where it cannot be raised far enough, fewer large messages are received at a time,
and smtpd pauses accepting in time; clients then wait in the listen queue of the kernel.
"""

import resource

from relay.log import get_logger

RESERVE = 64
"""Descriptors for all else: database, spooler, broker, metrics, listeners, synced directories."""
MIN_BODIES = 32
"""Large messages at a time that the limit must allow in any case."""

log = get_logger(__name__)


def reserve_descriptors(connections: int) -> tuple[int, int]:
    """Raises RLIMIT_NOFILE to what `connections` (RELAY_MAX_CONNECTIONS) need. Logs a warning if
    that is not allowed.

    Returns the last descriptor and the number of large messages that may be open at a time. A
    connection with this descriptor or a higher one pauses accepting, because a new descriptor has
    the lowest free number.
    """
    needed = 2 * connections + RESERVE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    limit = needed if soft == resource.RLIM_INFINITY else soft
    if limit < allowed:
        limit = allowed
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit < needed:
        log.warning(
            "RLIMIT_NOFILE too low for RELAY_MAX_CONNECTIONS",
            limit=limit,
            needed=needed,
            max_connections=connections,
        )
    bodies = max(MIN_BODIES, min(connections, limit - RESERVE - connections))
    return limit - RESERVE - bodies, bodies
