"""A private Postfix on loopback ports: smtpd -> queue -> smtp -> smtp-sink.

It has good conditions: its defaults for durability (each queue file is synced before the 250), no
DNS, no rewriting by tables, no count of clients (anvil), no brake on incoming mail (in_flow_delay),
and enough processes (250, and an smtpd for each connection). Its own postlogd logs to a file, as
the relay does. It needs root, because Postfix changes to the user `postfix` itself. An installed
Postfix lends its programs and is not changed.
"""

import os
import pwd
import signal
import subprocess
from contextlib import ExitStack
from functools import partialmethod
from pathlib import Path

from bench import services
from bench.machine import each_process
from bench.services import find_program, free_port, listens, not_installed, running
from bench.systems import CONCURRENCY, Arrangement

_MAIN = """
compatibility_level = 3.6
queue_directory = {top}/queue
data_directory = {top}/data
maillog_file = {maillog}
maillog_file_prefixes = {top}
myhostname = postfix.example.net
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
mydestination =
local_recipient_maps =
alias_maps =
alias_database =
relayhost = [127.0.0.1]:{sink}
smtp_dns_support_level = disabled
smtpd_peername_lookup = no
smtpd_tls_security_level = none
smtp_tls_security_level = none
smtpd_client_connection_count_limit = 0
smtpd_client_connection_rate_limit = 0
in_flow_delay = 0
message_size_limit = 100000000
default_process_limit = 250
smtp_destination_concurrency_limit = {concurrency}
initial_destination_concurrency = {concurrency}
"""
_MASTER = """
127.0.0.1:{port} inet n - n - 1100 smtpd
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
proxywrite unix - - n - 1 proxymap
smtp unix - - n - - smtp
relay unix - - n - - smtp
showq unix n - n - - showq
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
local unix - n n - - local
virtual unix - n n - - virtual
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
"""
_QUEUES = ("incoming", "active", "deferred", "maildrop")


def missing() -> str:
    """The reason why Postfix cannot be measured here; empty if it can."""
    if reason := not_installed("postfix", "postconf", "smtp-source", "smtp-sink"):
        return reason
    return "" if os.geteuid() == 0 else "Postfix must be started by root"


class PostfixSystem:
    """A Postfix in a directory of its own, with the methods of RelaySystem."""

    name = "Postfix"

    def __init__(self, directory: Path, stack: ExitStack, *, log: bool) -> None:
        self.directory = directory / "postfix"
        self.smtp_port = free_port()
        config = self.directory / "config"
        for name in ("config", "queue", "data"):
            (self.directory / name).mkdir(mode=0o755, parents=True)
        os.chown(self.directory / "data", pwd.getpwnam("postfix").pw_uid, -1)
        self.sink = stack.enter_context(services.sink("smtp-sink", self.directory))
        main = _MAIN.format(
            top=self.directory,
            sink=self.sink.port,
            concurrency=CONCURRENCY,
            maillog=self.directory / "mail.log" if log else "",
        )
        (config / "main.cf").write_text(main)
        (config / "master.cf").write_text(_MASTER.format(port=self.smtp_port))
        subprocess.run([find_program("postfix") or "", "-c", config, "check"], check=True)
        command = (Path(_setting("daemon_directory")) / "master", "-d", "-c", config)
        output = self.directory / "master.out"
        master = running(command, output, lambda: listens(self.smtp_port))
        self._master = stack.enter_context(master).pid
        stack.callback(self.release)
        self.roles = {"Postfix": [self._master], "sink": [self.sink.pid]}
        self.facts = {
            "Postfix": f"{_setting('mail_version')}, fsync of each queue file before the 250"
        }

    def arrange(self, arrangement: Arrangement) -> bool:
        return arrangement == Arrangement()

    def empty(self) -> bool:
        queue = self.directory / "queue"
        return not any(files for name in _QUEUES for _, _, files in os.walk(queue / name))

    def _signal_qmgr(self, number: int) -> None:
        each_process(
            [self._master], lambda process: process.name() == "qmgr" and process.send_signal(number)
        )

    hold = partialmethod(_signal_qmgr, signal.SIGSTOP)
    release = partialmethod(_signal_qmgr, signal.SIGCONT)

    def flush(self) -> None:
        """Do nothing: all that it has written is synced or in the page cache."""


def _setting(name: str) -> str:
    command = [find_program("postconf") or "", "-dh", name]
    return subprocess.check_output(command, text=True).strip()
