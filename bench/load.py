"""Loads: many messages at once, and one message at a time with its times."""

import smtplib
import socket
import subprocess
import sys
import time

from bench.processes import children_cpu_seconds
from bench.services import ROOT, find_program

SENDER = "a@example.com"
RECIPIENT = "b@example.org"


def send(
    port: int, messages: int, size: int, *, sessions: int = 20, reuse: bool = False
) -> tuple[float, float, float]:
    """Send so many messages of `size` bytes in `sessions` at once; `reuse`: on kept connections.

    Return when it began (time.perf_counter), and the seconds and the CPU seconds that it took.
    smtp-source sends if it is installed, else our own source. Raises CalledProcessError when a
    message was not accepted.
    """
    command = [
        sys.executable, "-m", "bench.source",
        *map(str, (port, messages, size, sessions, int(reuse))),
    ]  # fmt: skip
    if tool := find_program("smtp-source"):
        command = [
            tool, "-s", str(sessions), "-m", str(messages), "-l", str(size), *["-d"] * reuse,
            "-f", SENDER, "-t", RECIPIENT, f"127.0.0.1:{port}",
        ]  # fmt: skip
    cpu = children_cpu_seconds()
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    return began, time.perf_counter() - began, children_cpu_seconds() - cpu


def connect(port: int) -> smtplib.SMTP:
    """A session after EHLO."""
    client = smtplib.SMTP("127.0.0.1", port, "client.example.com", 30)
    assert client.sock is not None
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.ehlo_or_helo_if_needed()
    return client


def deliver(client: smtplib.SMTP, text: bytes) -> tuple[float, float]:
    """Send a message; return when its last byte was sent and when the 250 came
    (time.perf_counter)."""
    _expect(250, client.docmd(f"MAIL FROM:<{SENDER}>"))
    _expect(250, client.docmd(f"RCPT TO:<{RECIPIENT}>"))
    _expect(354, client.docmd("DATA"))
    client.send(text + b"\r\n.\r\n")
    sent = time.perf_counter()
    _expect(250, client.getreply())
    return sent, time.perf_counter()


def _expect(code: int, reply: tuple[int, bytes]) -> None:
    if reply[0] != code:
        raise smtplib.SMTPResponseException(*reply)


def text_of(size: int) -> bytes:
    """A message of about `size` bytes in lines of 80, without its end."""
    head = f"From: <{SENDER}>\r\nTo: <{RECIPIENT}>\r\nSubject: test\r\n\r\n".encode()
    line = b"x" * 78 + b"\r\n"
    return head + line * max(1, (size - len(head)) // len(line)) + b"end"
