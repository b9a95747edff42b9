"""`python -m bench.pages`: how long the page takes to answer over a million messages, on both
databases.

Nine of ten are finished, a tenth waits (`bench.history`). `qmqp-relay web` runs as people run it,
and each look is one HTTP request, from its first byte to its last.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from bench.history import fill, on_each
from relay.db.engine import connect, reading
from relay.db.sql import dialect_of

SEARCHES = (
    "sender=sender77@example.com", "sender=*77@example.com", "recipient=recipient5000@d53.example.org",
    "recipient=*@d53.example.org", "header_message_id=5000@client.example.com", "reply=greylisted", "reply=never+said",
    "state=deferred", "state=delivered", "state=bounced", "state=held", "state=expired", "state=deferred&reply=never",
)  # fmt: skip


def answered(url: str) -> float:
    """Seconds until the whole page is there."""
    began = time.monotonic()
    with urllib.request.urlopen(url, timeout=120) as answer:
        answer.read()
    return time.monotonic() - began


def serve(url: str, port: int, state: Path) -> subprocess.Popen[bytes]:
    """The page of that database, ready."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    environ |= {
        "RELAY_DATABASE_URL": url,
        "RELAY_WEB_LISTEN": f"127.0.0.1:{port}",
        "RELAY_STATE_DIR": str(state),
    }
    child = subprocess.Popen(
        [sys.executable, "-m", "commands.cli.main", "web"], env=environ, stderr=subprocess.DEVNULL
    )
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return child
        except OSError:
            if child.poll() is not None:
                raise SystemExit(f"the page ended with {child.returncode}") from None
            time.sleep(0.05)


def measure(name: str, url: str, rows: int, runs: int) -> None:
    """Print a line for each page: the first look and the median of some; the overview is kept for a
    moment."""
    began = time.monotonic()
    fill(url, rows, finished=90, seconds=3 * 86400)
    print(f"{name}: {rows} messages, filled in {time.monotonic() - began:.0f} s", flush=True)
    engine = connect(url)
    with reading(engine) as connection:
        middle = dialect_of(engine)(
            f"SELECT @hex(id) FROM messages ORDER BY id DESC LIMIT 1 OFFSET {rows // 2}"
        )
        queue_id = connection.exec_driver_sql(middle).scalar()
    engine.dispose()
    with socket.create_server(("127.0.0.1", 0)) as free, tempfile.TemporaryDirectory() as state:
        port = free.getsockname()[1]
        free.close()
        child = serve(url, port, Path(state))
        try:
            for path in (
                "",
                *(f"search?{words}" for words in SEARCHES),
                f"search?id={queue_id}",
                f"message/{queue_id}",
            ):
                found = [answered(f"http://127.0.0.1:{port}/{path}") for _ in range(runs)]
                print(f"  {found[0]:7.3f} s {statistics.median(found):7.3f} s  /{path}", flush=True)
        finally:
            child.terminate()
            child.wait(20)


def main() -> None:
    """Both databases, one after the other."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.pages", description="Measure the page on a long history."
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}; the first of {given.runs} looks, and their median")
    on_each(lambda name, url: measure(name, url, given.rows, given.runs))


if __name__ == "__main__":
    main()
