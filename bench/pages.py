"""`python -m bench.pages`: how long the web page takes to answer over a million messages, on both
databases.

Nine messages of ten are finished, one waits (`bench.history`). `qmqp-relay web` runs as in
production, and each measurement is one HTTP request, from its first byte to its last.
"""

import statistics
import tempfile
import time
import urllib.request
from pathlib import Path

from bench.history import fill, on_each_database
from bench.services import RELAY, clean_environment, free_port, listens, running
from relay.db.engine import connect, reading

_MIDDLE = "SELECT CAST(id AS text) FROM messages ORDER BY id DESC LIMIT 1 OFFSET {}"
SEARCHES = (
    "sender=sender77@example.com",
    "sender=*77@example.com",
    "recipient=recipient5000@d53.example.org",
    "recipient=*@d53.example.org",
    "header_message_id=5000@client.example.com",
    "reply=greylisted",
    "reply=never+said",
    "state=deferred",
    "state=delivered",
    "state=bounced",
    "state=held",
    "state=expired",
    "state=deferred&reply=never",
)


def fetch(url: str) -> float:
    """Seconds until the whole page has come."""
    began = time.monotonic()
    with urllib.request.urlopen(url, timeout=120) as response:
        response.read()
    return time.monotonic() - began


def measure(name: str, url: str, rows: int, runs: int) -> None:
    """Print a line for each page: the time of the first request and the median. (The overview is
    cached for a moment.)"""
    began = time.monotonic()
    fill(url, rows, finished=90, seconds=3 * 86400)
    print(f"{name}: {rows} messages, filled in {time.monotonic() - began:.0f} s", flush=True)
    engine = connect(url)
    with reading(engine) as connection:
        middle = connection.exec_driver_sql(_MIDDLE.format(rows // 2)).scalar_one()
    engine.dispose()
    queue_id = middle.replace("-", "")
    searches = [f"search?{query}" for query in (*SEARCHES, f"id={queue_id}")]
    port = free_port()
    address = f"127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as state_dir:
        environ = clean_environment() | {
            "RELAY_DATABASE_URL": url,
            "RELAY_WEB_LISTEN": address,
            "RELAY_STATE_DIR": state_dir,
        }
        log = Path(state_dir, "web.log")
        with running((*RELAY, "web"), log, lambda: listens(port), env=environ):
            for path in ("", *searches, f"message/{queue_id}"):
                seconds = [fetch(f"http://{address}/{path}") for _ in range(runs)]
                median = statistics.median(seconds)
                print(f"  {seconds[0]:7.3f} s {median:7.3f} s  /{path}", flush=True)


if __name__ == "__main__":
    heading = "the first request to each page, and the median"
    on_each_database(measure, "bench.pages", heading, rows=1_000_000, runs=5)
