"""Sockets that systemd passes to a front end (sd_listen_fds(3)): LISTEN_FDS, LISTEN_FDNAMES.

systemd opens the sockets of a `.socket` unit, also those below port 1024, and keeps them open while
the service restarts. Their name is FileDescriptorName= of the unit, or the name of the unit. A
listener takes all sockets of its name, with its own options.

What must stay true: child processes inherit neither the variables nor the sockets. A name without
sockets is an error, because the service would not listen where its operator believes it to.
"""

import os
import socket
from collections.abc import MutableMapping

from relay.settings import SettingsError

FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START


class SystemdSockets:
    """The sockets of this process by name; none if systemd did not start it."""

    def __init__(
        self, environ: MutableMapping[str, str] = os.environ, first: int = FIRST_DESCRIPTOR
    ) -> None:
        pid, count, names = (
            environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
        )
        self._by_name: dict[str, list[socket.socket]] = {}
        if pid != str(os.getpid()) or not count.isdigit():
            return
        known = names.split(":") if names else []
        for number in range(int(count)):
            name = known[number] if number < len(known) else "unknown"
            passed = socket.socket(fileno=first + number)
            passed.set_inheritable(False)
            self._by_name.setdefault(name, []).append(passed)

    def take(self, name: str) -> list[socket.socket]:
        """The sockets of this name, once; raises SettingsError that names what systemd passed."""
        sockets = self._by_name.pop(name, [])
        if not sockets:
            others = ", ".join(sorted(self._by_name)) or "none"
            raise SettingsError(
                f"systemd passed no socket {name!r} to this process (others: {others}); its name"
                " is FileDescriptorName= of the socket unit"
            )
        if not all(map(_accepts_tcp, sockets)):
            for each in sockets:
                each.close()
            raise SettingsError(
                f"the socket {name!r} of systemd is not a TCP socket that listens: write an address"
                " and a port in ListenStream="
            )
        return sockets

    @property
    def names(self) -> list[str]:
        """The names that no listener has taken."""
        return sorted(self._by_name)


def _accepts_tcp(passed: socket.socket) -> bool:
    internet = passed.family in (socket.AF_INET, socket.AF_INET6)
    return internet and bool(passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
