"""`make demo`: the whole relay on free ports in a temporary directory, with real mail, in about a minute.

It starts `qmqp-relay up --demo` as anybody would, hands it messages over SMTP, shows their states as SQL tells them,
and compares what the sink got with what was sent. The exit status is 0 only if every message reached the state that it
should, after as many tries as it should, once, and byte by byte. Nothing is left behind.
"""

import json
import os
import re
import smtplib
import subprocess
import sys
import tempfile
import time
from base64 import encodebytes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import typer
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from commands.children import die_with_parent
from commands.up import ROOT, free_port, smtp_answers
from relay import database

PATIENCE = 100.0  # seconds for the whole of it
LARGE = (25 << 20) - 4096  # bytes: just below MAX_MESSAGE_SIZE with the trace header
RECEIVED = re.compile(rb"Received:[^\n]*\n(?:[ \t][^\n]*\n)*")
SETTINGS = {
    "RELAY_RETRY_MIN": "1s",
    "RELAY_RETRY_MAX": "2s",
    "RELAY_GRACE": "1s",
    "RELAY_UNSAFE_DURABILITY": "1",  # the temporary directory may be in memory
}


@dataclass(frozen=True, slots=True)
class Trial:
    """A message, and what must become of it."""

    name: str
    recipients: tuple[str, ...]
    body: bytes
    sender: str = "me@example.com"
    state: str = "delivered"
    tries: int = 1


def trials() -> Iterator[Trial]:
    """One of each kind."""
    head = b"From: me@example.com\r\nSubject: qmqp-relay demo\r\n\r\n"
    yield Trial("ordinary", ("you@example.org",), head + b"Hello.\r\n")
    yield Trial("8-bit, dots", ("dots@example.org",), head + b".\r\n..\r\n.dot\r\n" + bytes(range(128, 256)) + b"\r\n")
    lines = encodebytes(os.urandom(LARGE * 57 // 78)).replace(b"\n", b"\r\n")
    yield Trial("25 MB", ("large@example.org",), head + lines[: (LARGE - len(head)) // 78 * 78])
    yield Trial("several", tuple(f"{name}@example.org" for name in ("ann", "bob", "cid")), head + b"To all three.\r\n")
    yield Trial("null sender", ("bounces@example.org",), head + b"A notice.\r\n", sender="")
    yield Trial("deferred", ("defer-2@example.org",), head + b"Not now.\r\n", tries=3)
    yield Trial("refused", ("reject@example.org",), head + b"Never.\r\n", state="bounced")


def run() -> int:
    """Play it; the exit status."""
    with tempfile.TemporaryDirectory(prefix="qmqp-relay-demo-", ignore_cleanup_errors=True) as scratch:
        state_dir, log = Path(scratch), Path(scratch, "log")
        address = (host, port) = "127.0.0.1", free_port()
        environ = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")} | SETTINGS
        environ |= {"RELAY_STATE_DIR": scratch, "RELAY_SMTP_LISTEN": f"{host}:{port}", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-P", "-m", "commands.cli", "up", "--demo"]
        with log.open("wb") as output:
            up = subprocess.Popen(command, env=environ, stdout=output, stderr=output, start_new_session=True,
                                  preexec_fn=die_with_parent())  # fmt: skip
        try:
            wrong = _play(up, address, state_dir)
        except (OSError, smtplib.SMTPException, DBAPIError) as error:
            wrong = [f"{type(error).__name__}: {error}"]
        finally:
            up.terminate()
            status = up.wait()
        wrong += [f"up ended with status {status}"] if status else []
        for fault in wrong:
            typer.echo(f"WRONG  {fault}")
        if wrong:
            typer.echo("\n".join(["The relay's last words:", *log.read_text(errors="replace").splitlines()[-40:]]))
        typer.echo("FAILED" if wrong else "Every message reached the state that it should, byte by byte.")
        return 1 if wrong else 0


def _play(up: "subprocess.Popen[bytes]", address: tuple[str, int], state_dir: Path) -> list[str]:
    """Send everything and watch it; what is wrong, a line each."""
    started, everything = time.monotonic(), list(trials())
    while not (state_dir / "relay.db").exists() or not smtp_answers(*address):
        if up.poll() is not None or time.monotonic() > started + PATIENCE:
            return ["the relay did not start"]
        time.sleep(0.1)
    typer.echo(f"{time.monotonic() - started:5.1f}s  the relay is up in {state_dir}")
    ids = {_send(address, trial): trial for trial in everything}
    wanted = {(i, recipient): (t.state, t.tries) for i, t in ids.items() for recipient in t.recipients}
    engine = database.connect(f"sqlite:///{state_dir}/relay.db")
    seen: dict[tuple[str, str], tuple[str, int]] = {}
    while seen != wanted and time.monotonic() < started + PATIENCE:
        for key, now, reason in _states(engine):
            if key in wanted and seen.get(key) != now:
                seen[key] = now
                line = f"{ids[key[0]].name:12} {key[1]:20} {now[0]:10} try {now[1]}  {reason or ''}"
                typer.echo(f"{time.monotonic() - started:5.1f}s  {line.rstrip()}")
        time.sleep(0.05)
    engine.dispose()
    wrong = [f"{key[1]} is {seen.get(key)}, not {state}" for key, state in wanted.items() if seen.get(key) != state]
    return [*wrong, *_wrong_bytes(everything, state_dir / "sink")]


def _send(address: tuple[str, int], trial: Trial) -> str:
    """Hand a message over; its queue id."""
    with smtplib.SMTP(*address, timeout=60) as client:
        client.ehlo("demo.example.com")
        replies = [client.mail(trial.sender, ["BODY=8BITMIME", f"SIZE={len(trial.body)}"])]
        replies += [client.rcpt(recipient) for recipient in trial.recipients]
        if bad := [reply for reply in replies if reply[0] != 250]:
            raise smtplib.SMTPResponseException(*bad[0])
        code, words = client.data(trial.body)
    if not (found := re.search(rb"queued as ([0-9a-f]{32})", words)):
        raise smtplib.SMTPDataError(code, words)
    return found[1].decode()


def _states(engine: Engine) -> Iterator[tuple[tuple[str, str], tuple[str, int], str]]:
    with database.reading(engine) as connection:
        rows = connection.execute(text("SELECT queue_id, recipient, state, attempts, reason FROM mail_history"))
        for row in rows:
            yield (row.queue_id, row.recipient), (row.state, row.attempts), row.reason


def _wrong_bytes(everything: list[Trial], dump: Path) -> Iterator[str]:
    """Compare with what the sink accepted: LF line ends, and one Received header before it."""
    envelopes = [(path, json.loads(path.read_text())) for path in sorted(dump.glob("*.json"))]
    for trial in everything:
        got = [path.with_suffix(".eml").read_bytes() for path, envelope in envelopes
               if (envelope["sender"], *envelope["recipients"]) == (trial.sender, *trial.recipients)
               and envelope["reply"].startswith("K")]  # fmt: skip
        if len(got) != (trial.state == "delivered"):
            yield f"{trial.name}: the sink accepted it {len(got)} times"
        for body in got:
            header = RECEIVED.match(body)
            if not header or body[header.end() :] != trial.body.replace(b"\r\n", b"\n"):
                yield f"{trial.name}: the sink got other bytes than were sent"
