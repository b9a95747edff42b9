"""Free space on the spool's file system, and what unfinished messages claim of it.

`statvfs` is called at most once a second. Between two calls the free space is what the last one
measured, less every octet that was claimed and was not in a file at that time. A finished message
stays counted until the next measurement, which sees its file. A discarded message is free at once,
unless it was in a file when the space was measured.

What must stay true: unfinished messages of untrusted clients never take all of the space. A network
gets a quarter of it, and a quarter is kept for trusted clients. Otherwise a few clients that begin
messages and never end them would fill the spool.
"""

import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

MIN_FREE = 4 * 1024 * 1024
"""Octets that must stay free on the file system beside a message."""
UNTRUSTED_SHARE = 4
"""One part in so many is the limit of one untrusted network, and the part of trusted clients."""


class FreeSpace:
    """The free space below a directory. A `network` is that of an untrusted client, else ''."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._measured_until = 0.0
        self._free = 0  # octets, as measured
        self._total = 0  # octets that would be free without unfinished messages
        self._taken = 0  # octets of the free ones
        self.stored = 0  # octets of unfinished messages in files
        self.claimed = 0  # octets of unfinished messages
        self.untrusted = 0  # of those, octets of untrusted clients
        self._by_network: Counter[str] = Counter()  # the same by network
        self.measurements = 0

    def has(self, size: int, network: str = "") -> bool:
        """Whether `size` octets and a file fit.

        True also if the space cannot be measured: writing the file then reports the error.
        """
        now = time.monotonic()
        if now >= self._measured_until:
            self._measured_until = now + 1.0
            self._measure()
        if self._free - self._taken < size + MIN_FREE:
            return False
        part = self._total // UNTRUSTED_SHARE
        return not network or (
            self._by_network[network] + size <= part and self.untrusted + size <= self._total - part
        )

    def claim(self, size: int, network: str) -> "SpaceClaim":
        """Begins a message. The `size` that its client declared is claimed at once, if it fits;
        what arrives is claimed in any case."""
        claim = SpaceClaim(self, network)
        if size and self.has(size, network):
            self.take(size, network)
            claim.octets = size
        return claim

    def take(self, size: int, network: str) -> None:
        """Adds to the claimed octets; a negative `size` gives them back."""
        self.claimed += size
        self._taken += size
        if network:
            self.untrusted += size
            self._by_network[network] += size
            if not self._by_network[network]:
                del self._by_network[network]

    def store(self, size: int, taken: int = 0) -> None:
        """Adds to the octets of unfinished messages in files, and to those taken of the free ones;
        both may be negative."""
        self.stored += size
        self._taken += taken

    def _measure(self) -> None:
        self.measurements += 1
        try:
            status = os.statvfs(self._directory)
        except OSError:
            self._free = 1 << 62
        else:
            no_inodes = status.f_files > 0 and status.f_favail == 0
            self._free = 0 if no_inodes else status.f_bavail * status.f_frsize
        self._taken = self.claimed - self.stored
        self._total = max(0, self._free + self.stored - MIN_FREE)


@dataclass(slots=True)
class SpaceClaim:
    """The space of one unfinished message: the octets that its client declared, or those that have
    arrived, if they are more."""

    space: FreeSpace
    network: str
    octets: int = 0
    arrived: int = 0
    stored: int = 0
    measured: int = 0  # of the stored octets, those that the last measurement has seen
    measurement: int = 0

    def grow(self, size: int) -> bool:
        """Adds octets that have arrived; False if there is no space for them."""
        self.arrived += size
        more = self.arrived - self.octets
        if more > 0:
            if not self.space.has(more, self.network):
                return False
            self.space.take(more, self.network)
            self.octets += more
        return True

    def store(self, size: int) -> None:
        """Adds octets that were written to a file."""
        self._update()
        self.stored += size
        self.space.store(size)

    def end(self, *, kept: bool = False) -> None:
        """The message is finished and `kept`, or discarded. A second call changes nothing."""
        self._update()
        self.space.take(-self.octets, self.network)
        self.space.store(-self.stored, self.arrived if kept else self.measured)
        self.octets = self.stored = self.arrived = self.measured = 0

    def _update(self) -> None:
        if self.measurement != self.space.measurements:
            self.measured = self.stored
            self.measurement = self.space.measurements
