"""`make demo`: a relay on free ports in a temporary directory delivers real mail in a minute.

The demo starts `qmqp-relay up --demo` as a user would, sends messages over SMTP, prints their
states from the database, and compares what the sink received with what was sent. The exit status
is 0 only if every message reached the expected state after the expected number of tries, and was
received once, byte for byte. No file is left behind.
"""

import os
import re
import smtplib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import typer
from sqlalchemy.exc import DBAPIError

from commands.standalone.supervisor import die_with_parent
from commands.standalone.up import ROOT, free_port, smtp_answers
from relay.db import engine as database
from relay.report.filters import Filter
from relay.report.queries import QueueReader

TIMEOUT = 100.0  # seconds for the whole demo
LARGE = (25 << 20) - 4096  # bytes: just below MAX_MESSAGE_SIZE with the trace header
RECEIVED = re.compile(rb"Received:[^\n]*\n(?:[ \t][^\n]*\n)*")
SETTINGS = {
    "RELAY_RETRY_MIN": "1s",
    "RELAY_RETRY_MAX": "2s",
    "RELAY_GRACE": "1s",
    "RELAY_UNSAFE_DURABILITY": "1",  # the temporary directory may be in memory
}
# Name, sender, recipients, and the expected end: state and number of tries.
MESSAGES = (
    ("ordinary", "me@example.com", ("you@example.org",), ("delivered", 1)),
    ("8-bit, dots", "me@example.com", ("dots@example.org",), ("delivered", 1)),
    ("25 MB", "me@example.com", ("large@example.org",), ("delivered", 1)),
    (
        "several",
        "me@example.com",
        ("ann@example.org", "bob@example.org", "cid@example.org"),
        ("delivered", 1),
    ),
    ("null sender", "", ("bounces@example.org",), ("delivered", 1)),
    ("deferred", "me@example.com", ("defer-2@example.org",), ("delivered", 3)),
    ("rejected", "me@example.com", ("reject@example.org",), ("bounced", 1)),
)
# The texts of the messages that say more than hello. No two lines of the large one are equal.
TEXTS = {
    "8-bit, dots": b".\r\n..\r\n.dot\r\n" + bytes(range(128, 256)) + b"\r\n",
    "25 MB": b"".join(b"%076d\r\n" % number for number in range(LARGE // 78 - 1)),
}


def run() -> int:
    """Run the demo; the exit status."""
    with tempfile.TemporaryDirectory(
        prefix="qmqp-relay-demo-", ignore_cleanup_errors=True
    ) as scratch:
        log, port = Path(scratch, "log"), free_port()
        environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RELAY_")},
            **SETTINGS,
            "RELAY_STATE_DIR": scratch,
            "RELAY_SMTP_LISTEN": f"127.0.0.1:{port}",
            "PYTHONPATH": str(ROOT),
        }
        with log.open("wb") as output:
            up = subprocess.Popen(
                [sys.executable, "-P", "-m", "commands.cli.start", "up", "--demo"],
                env=environ,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        try:
            faults = list(_play(port, Path(scratch)))
        except (OSError, smtplib.SMTPException, DBAPIError) as error:
            faults = [f"{type(error).__name__}: {error}"]
        finally:
            up.terminate()
            status = up.wait()
        if status:
            faults.append(f"`qmqp-relay up` ended with status {status}")
        if not faults:
            typer.echo("Every message reached the expected state, byte for byte.")
            return 0
        lines = log.read_text(errors="replace").splitlines()[-40:]
        faults = [f"WRONG  {fault}" for fault in faults]
        typer.echo("\n".join([*faults, "The last lines of the relay's log:", *lines, "FAILED"]))
        return 1


def _play(port: int, state_dir: Path) -> Iterator[str]:
    """Send every message and watch it; yields a line for each fault."""
    began = time.monotonic()
    while not (state_dir / "relay.db").exists() or not smtp_answers("127.0.0.1", port):
        if time.monotonic() > began + TIMEOUT:
            yield "the relay did not start"
            return
        time.sleep(0.1)
    typer.echo(f"{time.monotonic() - began:5.1f}s  the relay runs in {state_dir}")
    bodies = {
        name: f"From: me@example.com\r\nSubject: {name}\r\n\r\n".encode()
        + TEXTS.get(name, b"Hello.\r\n")
        for name, *_ in MESSAGES
    }
    for name, sender, recipients, _ in MESSAGES:
        with smtplib.SMTP("127.0.0.1", port, "demo.example.com", timeout=60) as client:
            client.sendmail(sender, recipients, bodies[name], ["BODY=8BITMIME"])
    expected = {address: end for _, _, recipients, end in MESSAGES for address in recipients}
    actual = _watch(state_dir, expected, began)
    for address, end in expected.items():
        if actual.get(address) != end:
            yield f"{address} is {actual.get(address)}, not {end}"
    received = [
        RECEIVED.sub(b"", file.read_bytes(), count=1) for file in (state_dir / "sink").glob("*.eml")
    ]
    for name, _, _, (state, tries) in MESSAGES:
        count = received.count(bodies[name].replace(b"\r\n", b"\n"))
        due = tries if state == "delivered" else 1
        if count != due:
            yield f"{name}: the sink received these bytes {count} times, not {due}"


def _watch(
    state_dir: Path, expected: Mapping[str, tuple[str, int]], began: float
) -> dict[str, tuple[str, int]]:
    """Print each change of state until all are as expected or time is up; state and tries by
    recipient."""
    names = {address: name for name, _, recipients, _ in MESSAGES for address in recipients}
    engine = database.connect(f"sqlite:///{state_dir}/relay.db")
    actual: dict[str, tuple[str, int]] = {}
    while actual != expected and time.monotonic() < began + TIMEOUT:
        for row in QueueReader(engine).rows(Filter(recipient="*@example.org"), finished=True):
            address, now = row["recipient"], (row["state"], row["attempts"])
            if actual.get(address) != now:
                actual[address] = now
                line = f"{names[address]:12} {address:20} {now[0]:10} try {now[1]}"
                reason = f"  {row['reason']}" if row["reason"] else ""
                typer.echo(f"{time.monotonic() - began:5.1f}s  {line}{reason}")
        time.sleep(0.05)
    engine.dispose()
    return actual
