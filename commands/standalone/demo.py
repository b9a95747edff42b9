"""`make demo`: the whole relay on free ports in a temporary directory, with real mail, in about a
minute.

It starts `qmqp-relay up --demo` as anybody would, hands it messages over SMTP, shows their states
as SQL tells them, and compares what the sink got with what was sent. The exit status is 0 only if
every message reached the state that it should, after as many tries as it should, once, and byte by
byte. Nothing is left behind.
"""

import os
import re
import smtplib
import subprocess
import sys
import tempfile
import time
from base64 import encodebytes
from collections.abc import Iterator
from pathlib import Path

import typer
from sqlalchemy.exc import DBAPIError

from commands.standalone.supervisor import die_with_parent
from commands.standalone.up import ROOT, free_port, smtp_answers
from relay.db import engine as database
from relay.report.filters import Filter
from relay.report.queries import QueueReader

PATIENCE = 100.0  # seconds for the whole of it
LARGE = (25 << 20) - 4096  # bytes: just below MAX_MESSAGE_SIZE with the trace header
RECEIVED = re.compile(rb"Received:[^\n]*\n(?:[ \t][^\n]*\n)*")
SETTINGS = {
    "RELAY_RETRY_MIN": "1s",
    "RELAY_RETRY_MAX": "2s",
    "RELAY_GRACE": "1s",
    "RELAY_UNSAFE_DURABILITY": "1",  # the temporary directory may be in memory
}
# What it is, sender, recipients, and the state and the number of tries that it must come to.
TRIALS = (
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
    ("refused", "me@example.com", ("reject@example.org",), ("bounced", 1)),
)


def run() -> int:
    """Play it; the exit status."""
    with tempfile.TemporaryDirectory(
        prefix="qmqp-relay-demo-", ignore_cleanup_errors=True
    ) as scratch:
        log, port = Path(scratch, "log"), free_port()
        environ = {
            name: value for name, value in os.environ.items() if not name.startswith("RELAY_")
        } | SETTINGS
        environ |= {
            "RELAY_STATE_DIR": scratch,
            "RELAY_SMTP_LISTEN": f"127.0.0.1:{port}",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-P", "-m", "commands.cli.main", "up", "--demo"]
        with log.open("wb") as output:
            up = subprocess.Popen(command, env=environ, stdout=output, stderr=output, start_new_session=True,
                                  preexec_fn=die_with_parent())  # fmt: skip
        try:
            wrong = list(_play(port, Path(scratch)))
        except (OSError, smtplib.SMTPException, DBAPIError) as error:
            wrong = [f"{type(error).__name__}: {error}"]
        finally:
            up.terminate()
            status = up.wait()
        wrong += [f"up ended with status {status}"] if status else []
        last = [
            "The relay's last words:",
            *log.read_text(errors="replace").splitlines()[-40:],
            "FAILED",
        ]
        good = ["Every message reached the state that it should, byte by byte."]
        typer.echo("\n".join([*(f"WRONG  {fault}" for fault in wrong), *(last if wrong else good)]))
        return 1 if wrong else 0


def _play(port: int, state_dir: Path) -> Iterator[str]:
    """Send everything and watch it; what is wrong, a line each."""
    began = time.monotonic()
    while not (state_dir / "relay.db").exists() or not smtp_answers("127.0.0.1", port):
        if time.monotonic() > began + PATIENCE:
            yield "the relay did not start"
            return
        time.sleep(0.1)
    typer.echo(f"{time.monotonic() - began:5.1f}s  the relay is up in {state_dir}")
    bodies = {name: _body(name) for name, *_ in TRIALS}
    for name, sender, recipients, _ in TRIALS:
        with smtplib.SMTP("127.0.0.1", port, "demo.example.com", timeout=60) as client:
            client.sendmail(sender, recipients, bodies[name], ["BODY=8BITMIME"])
    names = {recipient: name for name, _, recipients, _ in TRIALS for recipient in recipients}
    wanted = {recipient: end for _, _, recipients, end in TRIALS for recipient in recipients}
    engine = database.connect(f"sqlite:///{state_dir}/relay.db")
    seen: dict[str, tuple[str, int]] = {}
    while seen != wanted and time.monotonic() < began + PATIENCE:
        for row in QueueReader(engine).rows(Filter(recipient="*@example.org"), finished=True):
            whom, now = row["recipient"], (row["state"], row["attempts"])
            if seen.get(whom) != now:
                seen[whom] = now
                line = f"{names[whom]:12} {whom:20} {now[0]:10} try {now[1]}  {row['reason'] or ''}"
                typer.echo(f"{time.monotonic() - began:5.1f}s  {line.rstrip()}")
        time.sleep(0.05)
    engine.dispose()
    yield from (
        f"{whom} is {seen.get(whom)}, not {end}"
        for whom, end in wanted.items()
        if seen.get(whom) != end
    )
    got = [
        RECEIVED.sub(b"", file.read_bytes(), count=1) for file in (state_dir / "sink").glob("*.eml")
    ]
    for name, _, _, (state, tries) in TRIALS:
        times, due = (
            got.count(bodies[name].replace(b"\r\n", b"\n")),
            tries if state == "delivered" else 1,
        )
        if times != due:
            yield f"{name}: the sink got these bytes {times} times, not {due}"


def _body(name: str) -> bytes:
    """A message, which says what it is."""
    head = f"From: me@example.com\r\nSubject: {name}\r\n\r\n".encode()
    if name == "8-bit, dots":
        return head + b".\r\n..\r\n.dot\r\n" + bytes(range(128, 256)) + b"\r\n"
    if name != "25 MB":
        return head + b"Hello.\r\n"
    lines = encodebytes(os.urandom(LARGE * 57 // 78)).replace(b"\n", b"\r\n")
    return head + lines[: (LARGE - len(head)) // 78 * 78]
