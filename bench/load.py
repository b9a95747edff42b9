"""Loads: many messages at once, one message at a time with its times, and idle connections."""

import os
import smtplib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from bench.systems import ROOT, find_program

SENDER = "a@example.com"
RECIPIENT = "b@example.org"


@dataclass(frozen=True, slots=True)
class Sent:
    """Begin and end of sending (time.perf_counter), and the CPU seconds of the sender."""

    began: float
    ended: float
    cpu: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


def send(port: int, messages: int, size: int, *, sessions: int = 20, reuse: bool = False) -> Sent:
    """Send so many messages of `size` bytes in `sessions` at once; `reuse`: on kept connections.

    smtp-source sends if it is installed, else our own source. Raises CalledProcessError when a
    message was not accepted.
    """
    tool = find_program("smtp-source")
    command = [tool] if tool else [sys.executable, "-m", "bench.source"]
    command += [
        "-s",
        str(sessions),
        "-m",
        str(messages),
        "-l",
        str(size),
        *(["-d"] if reuse else []),
    ]
    command += ["-f", SENDER, "-t", RECIPIENT, f"127.0.0.1:{port}"]
    began = time.perf_counter()
    child = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(child.pid, 0)
    ended = time.perf_counter()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return Sent(began, ended, usage.ru_utime + usage.ru_stime)


def connect(port: int) -> smtplib.SMTP:
    """A session after EHLO."""
    client = smtplib.SMTP("127.0.0.1", port, "client.example.com", 30)
    assert client.sock is not None
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _expect(250, client.ehlo())
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


@contextmanager
def idle_connections(port: int, count: int) -> Iterator[None]:
    """So many sessions that send nothing after EHLO."""
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(connect(port))
        yield


def text_of(size: int) -> bytes:
    """A message of about `size` bytes in lines of 80, without its end."""
    head = f"From: <{SENDER}>\r\nTo: <{RECIPIENT}>\r\nSubject: test\r\n\r\n".encode()
    line = b"x" * 78 + b"\r\n"
    return head + line * max(1, (size - len(head)) // len(line)) + b"end"
