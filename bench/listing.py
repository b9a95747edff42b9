"""`python -m bench.listing`: how long `qmqp-relay list` takes over a long queue, on both databases.

The queue is filled by SQL, as it would look when a server was down for an hour: every row deferred, with words of the
server. Each way to look is a process of its own from its start to its end: NDJSON and text into a pipe that is read as
quickly as it fills, and a table on a terminal of 120 columns.
"""

import argparse
import fcntl
import os
import pty
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from relay.database import connect, migrate, writing
from tests.services import Postgres

WAYS = {
    "list --json | ...": (["list", "--json"], False),
    "list | ...": (["list"], False),
    "list on a terminal": (["list"], True),
}
_SQLITE = """WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {rows}) {insert} FROM n"""
_POSTGRESQL = """{insert} FROM generate_series(1, {rows}) AS n(n)"""


def _statements(rows: int, *, postgresql: bool) -> list[str]:
    """What fills the queue with so many messages of one recipient each, a millisecond apart."""
    if postgresql:
        hexed = "lpad(to_hex(1795000000000 + n), 12, '0')"
        now, soon = "now() - interval '1 hour'", "now() + interval '1 hour'"
        key = f"CAST({hexed} || '7abc' || '8def' || lpad(to_hex(n), 12, '0') AS uuid)"
    else:
        hexed = "printf('%012x', 1795000000000 + n)"
        now, soon = "strftime('%s', 'now') * 1000000 - 3600000000", "strftime('%s', 'now') * 1000000 + 3600000000"
        key = f"substr({hexed}, 1, 8) || '-' || substr({hexed}, 9, 4) || '-7abc-8def-' || printf('%012x', n)"
    inserts = [
        f"""INSERT INTO messages (id, sender, size, received_at, client_address, helo, protocol, header_message_id)
            SELECT {key}, 'sender' || n % 1000 || '@example.com', 4096, {now}, '192.0.2.1', 'client.example.com',
            'ESMTP', '<' || n || '@client.example.com>'""",
        f"""INSERT INTO recipients (message_id, position, address, delivery)
            SELECT {key}, 1, 'recipient' || n || '@example.org', 1""",
        f"""INSERT INTO deliveries (message_id, number, route, state, due_at, expires_at, claims, last_outcome,
            last_reply, last_server) SELECT {key}, 1, 'default', 'deferred', {soon}, {soon}, 3, 'deferred',
            '451 4.7.1 recipient' || n || '@example.org is greylisted, come back later', '192.0.2.7:628'""",
    ]
    return [(_POSTGRESQL if postgresql else _SQLITE).format(rows=rows, insert=insert) for insert in inserts]


def fill(url: str, rows: int) -> None:
    """A database with a long queue."""
    migrate(url)
    engine = connect(url)
    with writing(engine) as connection:
        for statement in _statements(rows, postgresql=engine.dialect.name == "postgresql"):
            connection.exec_driver_sql(statement.replace("%", "%%") if engine.dialect.name != "sqlite" else statement)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")
    engine.dispose()


def look(words: list[str], environ: dict[str, str], *, terminal: bool) -> tuple[float, float, int]:
    """Run the command to its end: (seconds, seconds of CPU, lines that came)."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    began, lines = time.monotonic(), 0
    child = subprocess.Popen([sys.executable, "-m", "commands.cli", *words], env=environ, stdout=theirs)
    os.close(theirs)
    with suppress(OSError):  # the end of a terminal
        while data := os.read(ours, 1 << 16):
            lines += data.count(b"\n")
    os.close(ours)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {child.returncode}")
    return time.monotonic() - began, used.ru_utime + used.ru_stime, lines


def measure(name: str, url: str, rows: int, runs: int) -> None:
    """Print a line for each way: the least and the median of some runs."""
    fill(url, rows)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    environ |= {"RELAY_DATABASE_URL": url, "TERM": "xterm"}
    for words, (command, terminal) in WAYS.items():
        found = [look(command, environ, terminal=terminal) for _ in range(runs)]
        if any(lines < rows for _, _, lines in found):
            raise SystemExit(f"{name}, {words}: rows are missing")
        seconds, cpu = ([run[n] for run in found] for n in (0, 1))
        middle = statistics.median(seconds)
        print(f"{name:12}{words:22}{min(seconds):7.2f} s{middle:9.2f} s{min(cpu):9.2f} s", flush=True)


def main() -> None:
    """Both databases, each filled anew below a directory that goes with it."""
    parser = argparse.ArgumentParser(prog="python -m bench.listing", description="Measure `list` on a long queue.")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()

    def on_sqlite() -> None:
        with tempfile.TemporaryDirectory() as directory:
            measure("sqlite", f"sqlite:///{Path(directory).resolve()}/relay.db", given.rows, given.runs)

    def on_postgresql() -> None:
        server = Postgres()
        server.start()
        try:
            measure("postgresql", server.url(), given.rows, given.runs)
        finally:
            server.stop()

    print(f"{given.rows} rows, load {os.getloadavg()[0]:.1f}\n{'':34}{'least':>9}{'median':>11}{'CPU':>11}")
    systems: list[Callable[[], None]] = [on_postgresql, on_sqlite]
    for system in systems:
        system()


if __name__ == "__main__":
    main()
