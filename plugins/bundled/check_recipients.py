"""Refuses recipients that a file does not name, in the domains that it names.

    RELAY_PLUGINS=check_recipients /etc/qmqp-relay/recipients

Each line of the file is an address; `@example.org` stands for all addresses of a domain, and a line
that begins with `#` is a comment. Capitals do not count. With `delimiter=+` an address without its
extension is enough: `ann` for `ann+lists`. The plugin has no opinion about a domain that the file
does not name. It reads the file again when it has changed; if it cannot, it goes on with what it
has read before.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from qmqp_relay import Address, Deny, PluginArguments, PluginLog, Relay, hookimpl


@dataclass
class RecipientFile:
    """The known recipients; any thread may ask."""

    path: Path
    delimiter: str
    addresses: frozenset[str] = frozenset()
    domains: frozenset[str] = frozenset()
    _version: tuple[int, int, int] | None = None
    _lock: Lock = field(default_factory=Lock)

    def load(self) -> None:
        """Reads the file if it has changed. Raises OSError and UnicodeDecodeError."""
        with self._lock:
            status = os.stat(self.path)  # noqa: PTH116 - one call for a name that may change
            version = (status.st_ino, status.st_size, status.st_mtime_ns)
            if version == self._version:
                return
            lines = [line.strip().lower() for line in self.path.read_text().splitlines()]
            addresses = frozenset(line for line in lines if line and not line.startswith("#"))
            self.domains = frozenset(one.rpartition("@")[2] for one in addresses)
            self.addresses, self._version = addresses, version
            log.info("recipients read", file=str(self.path), count=len(addresses))

    def knows(self, recipient: Address) -> bool:
        """Whether the file names the recipient, or does not name its domain."""
        try:
            self.load()
        except (OSError, UnicodeDecodeError) as error:
            log.error("recipients not read", file=str(self.path), error=str(error))
        local, domain = recipient.local.lower(), recipient.domain.lower()
        plain = local.partition(self.delimiter)[0] if self.delimiter else local
        names = {f"@{domain}", f"{local}@{domain}", f"{plain}@{domain}"}
        return domain not in self.domains or not names.isdisjoint(self.addresses)


log: PluginLog
recipients: RecipientFile


@hookimpl
def register(relay: Relay, args: PluginArguments) -> None:
    """Reads the arguments, and the file for the first time. Raises OSError."""
    global log, recipients
    args.check_known("delimiter", words=1)
    log = relay.log
    recipients = RecipientFile(relay.path(args.word(0)), args.option("delimiter", ""))
    recipients.load()


@hookimpl
def rcpt(recipient: Address) -> Deny | None:
    """Refuses an unknown recipient."""
    if recipients.knows(recipient):
        return None
    return Deny("No such recipient here", enhanced="5.1.1")
