"""The systems that are measured: each is everything between an SMTP port and a sink.

The relay has a database and a broker of its own, smtpd, workers and QMQP sinks. Postfix is a
private instance, smtpd -> queue -> smtp -> smtp-sink, on loopback ports. It has good conditions:
its defaults for durability (each queue file is synced before the 250), no DNS, no rewriting by
tables, no count of clients (anvil), no brake on incoming mail (in_flow_delay), and enough processes
(250, and an smtpd for each connection). Its own postlogd logs to a file, as the relay does. It
needs root, because Postfix changes to the user `postfix` itself. An installed Postfix lends its
programs and is not changed.
"""

import itertools
import os
import pwd
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial, partialmethod
from pathlib import Path

from bench import services
from bench.machine import each_process
from bench.services import find_program, free_port, listens, running
from relay.db.engine import connect, migrate, reading

# Deliveries to one server at once: the default of RELAY_SERVER_CONNECTIONS, for Postfix too.
CONCURRENCY = 50
SLOW = 0.1  # seconds that the slow sink takes for a message
_DURABILITY = {
    "sqlite": {name: f"PRAGMA {name}" for name in ("journal_mode", "synchronous")},
    "postgresql": {
        name: f"SHOW {name}"
        for name in (
            "server_version",
            "fsync",
            "synchronous_commit",
            "full_page_writes",
            "wal_sync_method",
        )
    },
}
_CHECKPOINT = {"sqlite": "PRAGMA wal_checkpoint(PASSIVE)", "postgresql": "CHECKPOINT"}
# All deliveries that are not finished, each part by an index of its own.
_UNFINISHED = """SELECT 1 FROM deliveries WHERE state = 'queued'
UNION ALL SELECT 1 FROM deliveries WHERE state = 'sending'
UNION ALL SELECT 1 FROM deliveries WHERE state = 'deferred'
UNION ALL SELECT 1 FROM deliveries WHERE state IN ('bounced', 'expired') AND due_at IS NOT NULL
LIMIT 1"""
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


class RelaySystem:
    """smtpd and workers on one database, `sqlite` or `postgresql`, until `stack` is closed.

    `name` is its column in the tables; `roles` are the process ids of each role; `sink` is the sink
    of the current arrangement; `facts` are versions and durability settings.
    """

    def __init__(self, kind: str, directory: Path, stack: ExitStack) -> None:
        self._kind = kind
        self.name = "relay, PostgreSQL" if kind == "postgresql" else "relay, SQLite"
        self.directory = directory / kind
        self.directory.mkdir(mode=0o700)
        self.smtp_port = free_port()
        broker, broker_url, broker_version = stack.enter_context(services.broker(self.directory))
        self.roles = {"broker": [broker]}
        url = f"sqlite:///{self.directory}/relay.db"
        if kind == "postgresql":
            database, url = stack.enter_context(services.postgresql(directory / "postgres"))
            self.roles["database"] = [database]
        migrate(url)
        self._engine = connect(url, timeout=300.0)
        stack.callback(self._engine.dispose)
        self._sinks = {
            slow: stack.enter_context(services.sink("qmqp-sink", self.directory, SLOW * slow))
            for slow in (False, True)
        }
        self._environment = services.clean_environment() | {
            "PYTHONPATH": str(services.ROOT),
            "RELAY_STATE_DIR": str(self.directory),
            "RELAY_DATABASE_URL": url,
            "RELAY_BROKER_URL": broker_url,
            "RELAY_SMTP_LISTEN": f"127.0.0.1:{self.smtp_port}",
            "RELAY_HOSTNAME": "relay.example.net",
            "RELAY_MAX_CONNECTIONS_PER_CLIENT": "1000",
            "RELAY_LOG_FORMAT": "json",
            "RELAY_SERVER_CONNECTIONS": str(CONCURRENCY),
        }
        self._log_numbers = itertools.count(1)
        self._start("smtpd", self.directory / "smtpd.log", lambda: listens(self.smtp_port), stack)
        self._workers = stack.enter_context(ExitStack())
        self._arranged = (0, False)
        with reading(self._engine) as connection:
            settings = [
                f"{name} {connection.exec_driver_sql(statement).scalar()}"
                for name, statement in _DURABILITY[kind].items()
            ]
        self.facts = {
            "bodies": "fdatasync of the file, fsync of its directory",
            "broker": f"{broker_version}, nothing on disk",
            self.name.removeprefix("relay, "): ", ".join(settings),
        }

    def _start(self, role: str, log: Path, ready: Callable[[], bool], stack: ExitStack) -> None:
        command = (*services.RELAY, role)
        child = running(command, log, ready, env=self._environment, cwd=services.ROOT)
        self.roles.setdefault(role, []).append(stack.enter_context(child).pid)

    def arrange(self, workers: int, *, slow: bool) -> bool:
        """Deliver with so many workers to the fast or the slow sink; False: not supported."""
        if self._arranged != (workers, slow):
            self.hold()
            self._arranged = (workers, slow)
            self.sink = self._sinks[slow]
            self.roles["sink"] = [self.sink.pid]
            self._environment["RELAY_QMQP_SERVERS"] = f"127.0.0.1:{self.sink.port}"
            self.release()
        return True

    def empty(self) -> bool:
        """Whether the queue is empty and all outcomes are committed."""
        with reading(self._engine) as connection:
            return connection.exec_driver_sql(_UNFINISHED).scalar() is None

    def hold(self) -> None:
        """Accept messages without delivering them."""
        # Not by SIGSTOP: on SQLite, a worker that is stopped while it writes would stop smtpd too.
        self._workers.close()
        self.roles["worker"] = []

    def release(self) -> None:
        """Deliver again."""
        logs = [
            self.directory / f"worker-{next(self._log_numbers)}.log"
            for _ in range(self._arranged[0])
        ]
        for log in logs:
            # They start at the same time: the last one is ready when all are.
            waits_for = logs if log == logs[-1] else []
            self._start("worker", log, partial(_registered, waits_for), self._workers)

    def flush(self) -> None:
        """Write dirty pages to the disk, so that a later write-back is not part of a
        measurement."""
        # Without a transaction, which a checkpoint of SQLite would wait for.
        with closing(self._engine.raw_connection()) as connection:
            connection.cursor().execute(_CHECKPOINT[self._kind])


def _registered(logs: list[Path]) -> bool:
    return all("worker registered" in log.read_text() for log in logs)


def missing() -> str:
    """The reason why Postfix cannot be measured here; empty if it can."""
    needed = ("postfix", "postconf", "smtp-source", "smtp-sink")
    if absent := [name for name in needed if find_program(name) is None]:
        return f"not installed: {', '.join(absent)}"
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

    def arrange(self, workers: int, *, slow: bool) -> bool:
        return workers == 1 and not slow

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
