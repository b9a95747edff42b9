"""`python -m bench.listing`: how long `qmqp-relay list` takes on a long queue, on both databases.

SQL fills the queue as it would look after a server was down for an hour: every row is deferred with
a reply of the server. Each form of the list is measured as a process from start to end: NDJSON and
text through a pipe that is read as fast as it fills, and a table on a terminal of 120 columns.
"""

import os
import pty
import statistics
import subprocess
import termios
import time
from contextlib import suppress

from bench.history import fill, on_each_database
from bench.machine import children_cpu_seconds
from bench.services import RELAY, clean_environment

FORMS = {
    "list --json | ...": (["list", "--json"], False),
    "list | ...": (["list"], False),
    "list on a terminal": (["list"], True),
}


def list_once(
    arguments: list[str], environ: dict[str, str], *, terminal: bool
) -> tuple[float, float, int]:
    """Run the command to its end: (seconds, seconds of CPU, lines)."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(writer, (40, 120))
    cpu = children_cpu_seconds()
    began = time.monotonic()
    lines = 0
    child = subprocess.Popen([*RELAY, *arguments], env=environ, stdout=writer)
    os.close(writer)
    with suppress(OSError):  # the end of a terminal
        while data := os.read(reader, 1 << 16):
            lines += data.count(b"\n")
    os.close(reader)
    if child.wait():
        raise SystemExit(f"{' '.join(arguments)} ended with {child.returncode}")
    return time.monotonic() - began, children_cpu_seconds() - cpu, lines


def measure(name: str, url: str, rows: int, runs: int) -> None:
    """Print a line for each form: the least and the median time, and the least CPU time."""
    fill(url, rows)
    environ = clean_environment() | {"RELAY_DATABASE_URL": url, "TERM": "xterm"}
    for form, (arguments, terminal) in FORMS.items():
        results = [list_once(arguments, environ, terminal=terminal) for _ in range(runs)]
        seconds, cpu, lines = zip(*results, strict=True)
        if min(lines) < rows:
            raise SystemExit(f"{name}, {form}: rows are missing")
        times = f"{min(seconds):7.2f} s{statistics.median(seconds):9.2f} s{min(cpu):9.2f} s"
        print(f"{name:12}{form:22}{times}", flush=True)


if __name__ == "__main__":
    heading = f"{'':34}{'least':>9}{'median':>11}{'CPU':>11}"
    on_each_database(measure, "bench.listing", heading, rows=100_000, runs=5)
