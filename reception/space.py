"""Free space on the spool's file system, and the claims of unfinished messages.

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

from relay.spool.journal.supply import MIN_FREE

UNTRUSTED_SHARE = 4
"""One part in so many is the limit of one untrusted network, and the part of trusted clients."""


class FreeSpace:
    """The free space below a directory. A `network` is that of an untrusted client, else ''."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._measured_until = 0.0
        self._free = 0  # octets, as measured
        self._total = 0  # octets that would be free without unfinished messages
        self._by_network: Counter[str] = Counter()  # octets of unfinished messages
        self.taken = 0  # octets of the free ones
        self.stored = 0  # octets of unfinished messages in files
        self.claimed = 0  # octets of unfinished messages
        self.untrusted = 0  # of those, octets of untrusted clients
        self.measurements = 0

    def has(self, size: int, network: str = "") -> bool:
        """Whether `size` octets and a file fit.

        True also if the space cannot be measured: writing the file then reports the error.
        """
        now = time.monotonic()
        if now >= self._measured_until:
            self._measured_until = now + 1.0
            self._measure()
        if self._free - self.taken < size + MIN_FREE:
            return False
        part = self._total // UNTRUSTED_SHARE
        return not network or (
            self._by_network[network] + size <= part and self.untrusted + size <= self._total - part
        )

    def take(self, size: int, network: str) -> None:
        """Adds to the claimed octets; a negative `size` gives them back."""
        self.claimed += size
        self.taken += size
        if network:
            self.untrusted += size
            self._by_network[network] += size
            if not self._by_network[network]:
                del self._by_network[network]

    def _measure(self) -> None:
        self.measurements += 1
        try:
            status = os.statvfs(self._directory)
        except OSError:
            self._free = 1 << 62
        else:
            no_inodes = status.f_files > 0 and status.f_favail == 0
            self._free = 0 if no_inodes else status.f_bavail * status.f_frsize
        self.taken = self.claimed - self.stored
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

    def reserve(self, size: int) -> bool:
        """Claims octets, if they fit."""
        fits = self.space.has(size, self.network)
        if fits:
            self.space.take(size, self.network)
            self.octets += size
        return fits

    def grow(self, size: int) -> bool:
        """Adds octets that have arrived; False if there is no space for them."""
        self.arrived += size
        return self.arrived <= self.octets or self.reserve(self.arrived - self.octets)

    def store(self, size: int) -> None:
        """Adds octets that were written to a file."""
        self._update()
        self.stored += size
        self.space.stored += size

    def end(self, *, kept: bool = False) -> None:
        """The message is finished and `kept`, or discarded. A second call changes nothing."""
        self._update()
        self.space.take(-self.octets, self.network)
        self.space.taken += self.arrived if kept else self.measured
        self.space.stored -= self.stored
        self.octets = self.stored = self.arrived = self.measured = 0

    def _update(self) -> None:
        if self.measurement != self.space.measurements:
            self.measured = self.stored
            self.measurement = self.space.measurements
