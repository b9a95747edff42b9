"""Postfix' own QMQP programs for tests: `qmqp-sink`, and a qmqpd under a private master.

The private Postfix has its configuration, its queue and its data in a temporary directory. It runs
qmqpd, cleanup and the address rewriter only, so accepted mail stays in its `incoming` queue, where
`queued` reads it. It needs root, as Postfix does. `PostfixClient` is the other side: Postfix'
`sendmail`, queue and SMTP client.
"""

import grp
import os
import pwd
import shutil
import subprocess
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.services import ServerProcess, ServiceError, free_port, temporary_directory

_MAIN = """\
compatibility_level = 3.6
queue_directory = {directory}/queue
data_directory = {directory}/data
daemon_directory = {daemons}
mail_owner = postfix
setgid_group = postdrop
myhostname = postfix.test
mydestination =
alias_maps =
local_recipient_maps =
inet_interfaces = loopback-only
inet_protocols = ipv4
smtputf8_enable = no
message_size_limit = {size_limit}
qmqpd_authorized_clients = 127.0.0.1
qmqpd_error_delay = 0
in_flow_delay = 0
header_checks = regexp:{{ {{/^Subject: refuse/ REJECT go away}}
  {{/^Subject: later/ REJECT 4.7.1 not now}} }}
body_checks = regexp:{{ {{/^Subject: refuse/ REJECT not even enclosed}} }}
"""

# service type private unprivileged chroot wakeup limit command
_MASTER = """\
127.0.0.1:{port} inet n - n - - qmqpd
127.0.0.1:{closed_port} inet n - n - - qmqpd -o qmqpd_authorized_clients=
127.0.0.1:{soft_port} inet n - n - - qmqpd -o soft_bounce=yes
cleanup unix n - n - 0 cleanup
rewrite unix - - n - - trivial-rewrite
"""

_CLIENT_MAIN = """\
compatibility_level = 3.6
queue_directory = {directory}/queue
data_directory = {directory}/data
daemon_directory = {daemons}
mail_owner = postfix
setgid_group = postdrop
myhostname = client.test
mydestination =
alias_maps =
local_recipient_maps =
inet_interfaces = loopback-only
inet_protocols = ipv4
relayhost = [127.0.0.1]:{relay_port}
smtp_dns_support_level = disabled
{tls}
"""

_CLIENT_MASTER = """\
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
smtp unix - - n - - smtp
tlsmgr unix - - n 1000? 1 tlsmgr
"""


def program(name: str) -> str:
    """A Postfix program; ServiceError if this machine has none."""
    places = os.pathsep.join(
        [os.environ.get("PATH", ""), "/usr/sbin", "/usr/lib/postfix/sbin", "/usr/libexec/postfix"]
    )
    found = shutil.which(name, path=places)
    if found is None:
        raise ServiceError(f"no {name} on this machine")
    return found


class QmqpSink(ServerProcess):
    """`qmqp-sink`: accepts everything and replies `3:KOk,`. Loads are measured with it; it listens
    on `port` of the loopback."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.port = free_port()

    def _command(self) -> list[str]:
        return [program("qmqp-sink"), f"127.0.0.1:{self.port}", "1024"]

    def _answers(self) -> bool:
        return _listens(self.port)


class Postfix(ServerProcess):
    """A qmqpd on `port`, one on `closed_port` that authorizes no client, one on `soft_port`
    that never says D."""

    main, master = _MAIN, _MASTER

    def __init__(self, size_limit: int = 200_000) -> None:
        self.size_limit = size_limit
        try:
            self._owner = pwd.getpwnam("postfix")
            self._group = grp.getgrnam("postdrop").gr_gid
        except KeyError as error:
            raise ServiceError(f"Postfix is not installed: {error}") from None
        if os.geteuid() != 0:
            raise ServiceError("Postfix runs as root only")
        self.port, self.closed_port, self.soft_port = free_port(), free_port(), free_port()
        super().__init__(temporary_directory(self._owner))

    @cached_property
    def _configuration(self) -> Path:
        """Make the directories and the configuration; where it is."""
        daemons = Path(program("master")).parent
        queue = self.directory / "queue"
        self.directory.chmod(0o755)
        for name in (
            "active",
            "bounce",
            "corrupt",
            "defer",
            "deferred",
            "flush",
            "hold",
            "incoming",
            "maildrop",
            "pid",
            "private",
            "public",
            "saved",
            "trace",
        ):
            self._make(queue / name, 0o700)
        os.chown(queue, 0, 0)
        os.chown(queue / "pid", 0, 0)
        os.chown(queue / "public", self._owner.pw_uid, self._group)
        (queue / "public").chmod(0o710)
        self._make(self.directory / "data", 0o700)
        configuration = self.directory / "etc"
        configuration.mkdir()
        values: dict[str, Any] = vars(self) | {"directory": self.directory, "daemons": daemons}
        (configuration / "main.cf").write_text(self.main.format_map(values))
        (configuration / "master.cf").write_text(self.master.format_map(values))
        return configuration

    def _make(self, directory: Path, mode: int) -> None:
        directory.mkdir(parents=True)
        directory.chmod(mode)
        os.chown(directory, self._owner.pw_uid, self._owner.pw_gid)

    def _command(self) -> list[str]:
        return [program("master"), "-c", str(self._configuration), "-d"]

    def _answers(self) -> bool:
        return all(map(_listens, (self.port, self.closed_port, self.soft_port)))

    def queued(self, queue_id: str) -> bytes:
        """A message in the queue as `postcat` shows it: its envelope and its content."""
        command = [
            program("postcat"),
            "-c",
            str(self._configuration),
            str(self.directory / "queue/incoming" / queue_id),
        ]
        return subprocess.run(command, check=True, capture_output=True, timeout=20).stdout


class PostfixClient(Postfix):
    """A Postfix that takes mail from its own `sendmail` alone and relays it to `relay_port`."""

    main, master = _CLIENT_MAIN, _CLIENT_MASTER

    def __init__(self, relay_port: int, tls: str = "smtp_tls_security_level = none") -> None:
        super().__init__()
        self.relay_port, self.tls = relay_port, tls

    def _answers(self) -> bool:
        return all(
            (self.directory / "queue/public" / name).exists()
            for name in ("pickup", "cleanup", "qmgr")
        )

    def sendmail(self, sender: str, recipient: str, content: bytes) -> None:
        command = [program("sendmail"), "-C", str(self._configuration), "-f", sender, recipient]
        subprocess.run(command, input=content, check=True, capture_output=True, timeout=20)


def _listens(port: int) -> bool:
    """Whether a program listens on `port`, without connecting: qmqp-sink and qmqpd would take that
    for a client."""
    listening = f"0100007F:{port:04X} 00000000:0000 0A"
    return listening in Path("/proc/net/tcp").read_text()
