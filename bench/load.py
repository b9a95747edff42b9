"""Loads: many messages as smtp-source sends them, one at a time with a clock in hand, connections
that do nothing."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from bench.systems import ROOT, program

SENDER, RECIPIENT = "a@example.com", "b@example.org"


@dataclass(frozen=True, slots=True)
class Sent:
    """When sending began and ended (time.perf_counter), and the CPU seconds of who sent."""

    began: float
    ended: float
    cpu: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


def send(port: int, messages: int, size: int, *, sessions: int = 20, reuse: bool = False) -> Sent:
    """Send so many messages of so many bytes, `sessions` at once, on a connection each or on kept
    ones.

    By smtp-source if it is installed, else by our own; raises CalledProcessError when a message was
    not accepted.
    """
    where, counts = f"127.0.0.1:{port}", ["-s", str(sessions), "-m", str(messages), "-l", str(size)]
    tool = program("smtp-source")
    command = [tool] if tool else [sys.executable, "-m", "bench.source"]
    command += [*counts, *(["-d"] if reuse else []), "-f", SENDER, "-t", RECIPIENT, where]
    began = time.perf_counter()
    child = subprocess.Popen(command, cwd=ROOT)
    _, status, used = os.wait4(child.pid, 0)
    ended = time.perf_counter()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return Sent(began, ended, used.ru_utime + used.ru_stime)


class SmtpClient:
    """One SMTP connection, used one command at a time."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._replies = self._socket.makefile("rb")
        self._expect(b"2")
        self.say(b"EHLO client.example.com", b"2")

    def say(self, command: bytes, code: bytes) -> None:
        self._socket.sendall(command + b"\r\n")
        self._expect(code)

    def _expect(self, code: bytes) -> None:
        while (line := self._replies.readline())[3:4] == b"-":
            pass
        if not line.startswith(code):
            raise RuntimeError(f"expected {code!r}, heard {line!r}")

    def message(self, text: bytes) -> tuple[float, float]:
        """Send a message; when its last byte was sent and when the 250 was there
        (time.perf_counter)."""
        self.say(f"MAIL FROM:<{SENDER}>".encode(), b"2")
        self.say(f"RCPT TO:<{RECIPIENT}>".encode(), b"2")
        self.say(b"DATA", b"354")
        self._socket.sendall(text + b"\r\n.\r\n")
        sent = time.perf_counter()
        self._expect(b"2")
        return sent, time.perf_counter()

    def close(self) -> None:
        with suppress(OSError):
            self._socket.sendall(b"QUIT\r\n")
        self._replies.close()
        self._socket.close()


@contextmanager
def connected(port: int, count: int) -> Iterator[list[SmtpClient]]:
    """So many sessions that have said EHLO and nothing more."""
    clients: list[SmtpClient] = []
    try:
        while len(clients) < count:
            clients.append(SmtpClient(port))
        yield clients
    finally:
        for client in clients:
            client.close()


def text_of(size: int) -> bytes:
    """A message of about so many bytes in lines of 80, without its end."""
    head = f"From: <{SENDER}>\r\nTo: <{RECIPIENT}>\r\nSubject: test\r\n\r\n".encode()
    line = b"x" * 78 + b"\r\n"
    return head + line * max(1, (size - len(head)) // len(line)) + b"end"
