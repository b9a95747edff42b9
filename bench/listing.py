"""`python -m bench.listing`: how long `qmqp-relay list` takes over a long queue, on both databases.

The queue is filled by SQL, as it would look when a server was down for an hour: every row deferred,
with words of the server. Each way to look is a process of its own from its start to its end: NDJSON
and text into a pipe that is read as quickly as it fills, and a table on a terminal of 120 columns.
"""

import argparse
import fcntl
import os
import pty
import statistics
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress

from bench.history import fill, on_each

WAYS = {
    "list --json | ...": (["list", "--json"], False),
    "list | ...": (["list"], False),
    "list on a terminal": (["list"], True),
}


def look(words: list[str], environ: dict[str, str], *, terminal: bool) -> tuple[float, float, int]:
    """Run the command to its end: (seconds, seconds of CPU, lines that came)."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    began, lines = time.monotonic(), 0
    child = subprocess.Popen(
        [sys.executable, "-m", "commands.cli.main", *words], env=environ, stdout=theirs
    )
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
        print(
            f"{name:12}{words:22}{min(seconds):7.2f} s{middle:9.2f} s{min(cpu):9.2f} s", flush=True
        )


def main() -> None:
    """Both databases, each filled anew below a directory that goes with it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.listing", description="Measure `list` on a long queue."
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()

    print(
        f"{given.rows} rows, load {os.getloadavg()[0]:.1f}\n{'':34}{'least':>9}{'median':>11}{'CPU':>11}"
    )
    on_each(lambda name, url: measure(name, url, given.rows, given.runs))


if __name__ == "__main__":
    main()
