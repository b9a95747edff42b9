"""Loads: many messages at once, and one message at a time with its times.

`python -m bench.load PORT MESSAGES BYTES SESSIONS REUSE` does what smtp-source does for the
benchmark, for machines without Postfix. REUSE is 0 or 1: send all messages of a session on one
connection. It uses several times the CPU of smtp-source, so only runs with the same source can be
compared.
"""

import smtplib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from bench.machine import children_cpu_seconds
from bench.services import ROOT, find_program

SENDER = "a@example.com"
RECIPIENT = "b@example.org"


def send(
    port: int, messages: int, size: int, *, sessions: int, reuse: bool
) -> tuple[float, float, float]:
    """Send so many messages of `size` bytes in `sessions` at once; `reuse`: on kept connections.

    Return when it began (time.perf_counter), and the seconds and the CPU seconds that it took.
    smtp-source sends if it is installed, else our own source. Raises CalledProcessError when a
    message was not accepted.
    """
    command = [
        sys.executable,
        "-m",
        "bench.load",
        *map(str, (port, messages, size, sessions, int(reuse))),
    ]
    if tool := find_program("smtp-source"):
        command = [
            tool,
            "-s",
            str(sessions),
            "-m",
            str(messages),
            "-l",
            str(size),
            *["-d"] * reuse,
            "-f",
            SENDER,
            "-t",
            RECIPIENT,
            f"127.0.0.1:{port}",
        ]
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
    client.mail(SENDER)
    client.rcpt(RECIPIENT)
    client.docmd("DATA")
    client.send(text + b"\r\n.\r\n")
    sent = time.perf_counter()
    code, reply = client.getreply()
    if code != 250:  # also after a refusal of the sender or the recipient
        raise smtplib.SMTPResponseException(code, reply)
    return sent, time.perf_counter()


def text_of(size: int) -> bytes:
    """A message of about `size` bytes in lines of 80, without its end."""
    head = f"From: <{SENDER}>\r\nTo: <{RECIPIENT}>\r\nSubject: test\r\n\r\n".encode()
    return head + (b"x" * 78 + b"\r\n") * max(1, (size - len(head)) // 80) + b"end"


def _send_all(port: int, text: bytes, messages: Iterator[int], *, reuse: bool) -> None:
    """Send messages until the iterator, which all sessions share, is empty."""
    for _ in messages:
        with connect(port) as client:
            deliver(client, text)
            for _ in messages if reuse else ():
                deliver(client, text)


if __name__ == "__main__":
    port, messages, size, sessions, reuse = map(int, sys.argv[1:])
    share = partial(_send_all, port, text_of(size), iter(range(messages)), reuse=bool(reuse))
    with ThreadPoolExecutor(sessions) as pool:
        started = [pool.submit(share) for _ in range(sessions)]
    for session in started:
        session.result()
