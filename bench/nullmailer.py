"""A private nullmailer of Debian's package: nullmailer-smtpd -> queue -> nullmailer-send -> QMQP.

The package conflicts with every other mail server, so it is not installed: apt-get downloads it,
and tcpserver (ucspi-tcp), which runs a nullmailer-smtpd for each connection, and dpkg unpacks both
into a directory of the run. nullmailer has its paths compiled in, so the directory gets copies of
the shared libraries too, and the programs run below it with chroot. Each message starts a
nullmailer-queue, which syncs the file and its directory before the 250, and then a protocol
program, one at a time, as for every user of nullmailer.
"""

import os
import re
import signal
import stat
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from shutil import copy

from bench import services
from bench.services import find_program, free_port, listens, not_installed, running
from bench.systems import Arrangement

_PACKAGES = ("nullmailer", "ucspi-tcp")
_DOWNLOAD = ("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *_PACKAGES)
_PROGRAMS = ("usr/sbin/nullmailer-*", "usr/lib/nullmailer/qmqp", "usr/bin/nullmailer-smtpd")
# Up to 1,100 connections at once, without look-ups in the DNS or by ident.
_SERVER = ("/usr/bin/tcpserver", "-H", "-R", "-l0", "-c1100", "-b1000", "127.0.0.1")
_LIBRARY = re.compile(r"(/\S+) \(0x")
_SPOOL = "var/spool/nullmailer"


def missing() -> str:
    """The reason why nullmailer cannot be measured here; empty if it can."""
    if reason := not_installed("apt-get", "dpkg", "ldd", "chroot"):
        return reason
    if subprocess.run([*_DOWNLOAD, "--print-uris"], capture_output=True, check=False).returncode:
        return f"apt-get does not know {' and '.join(_PACKAGES)}; apt-get update may help"
    return "" if os.geteuid() == 0 else "only root may use chroot"


def unpack(root: Path) -> str:
    """Put the programs and their libraries below `root`; return the version of nullmailer."""
    root.mkdir()
    _run(*_DOWNLOAD, cwd=root)
    packages = sorted(root.glob("*.deb"))
    for package in packages:
        _run("dpkg", "-x", package, root)
    programs = [file for pattern in _PROGRAMS for file in root.glob(pattern)]
    for library in set(_LIBRARY.findall(_run("ldd", root / "usr/bin/tcpserver", *programs))):
        copied = root / library.lstrip("/")
        copied.parent.mkdir(parents=True, exist_ok=True)
        copy(library, copied)
    return _run("dpkg-deb", "-f", packages[0], "Version").strip()


def configure(root: Path, port: int) -> None:
    """Deliver over QMQP to a port of this machine, and make what an installation makes."""
    for name in ("etc/nullmailer", "dev"):
        (root / name).mkdir(exist_ok=True)
    (root / "etc/nullmailer/remotes").write_text(f"127.0.0.1 qmqp port={port}\n")
    (root / "etc/mailname").write_text("nullmailer.example.net\n")
    os.mknod(root / "dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    trigger = root / _SPOOL / "trigger"
    os.mkfifo(trigger)
    # nullmailer-queue runs as the owner of the spool, and opens this to wake nullmailer-send.
    os.chown(trigger, trigger.parent.stat().st_uid, -1)


class NullmailerSystem:
    """A nullmailer in a directory of its own, with the methods of RelaySystem."""

    name = "nullmailer"

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory / "nullmailer"
        version = unpack(self.directory)
        self.smtp_port = free_port()
        self.sink = stack.enter_context(services.sink("qmqp-sink", self.directory))
        configure(self.directory, self.sink.port)
        log = self.directory / "send.log"
        command = "/usr/sbin/nullmailer-send"
        self._send = self._start(stack, log, lambda: "Rescanning" in log.read_text(), command)
        stack.callback(self.release)
        server = self._start(
            stack,
            self.directory / "smtpd.log",
            lambda: listens(self.smtp_port),
            *(*_SERVER, str(self.smtp_port), "/usr/bin/nullmailer-smtpd"),
        )
        self.roles = {"smtpd": [server], "worker": [self._send], "sink": [self.sink.pid]}
        self.facts = {"nullmailer": f"{version}, fsync of each file and directory before the 250"}

    def _start(self, stack: ExitStack, log: Path, ready: Callable[[], bool], *command: str) -> int:
        chroot = (find_program("chroot"), self.directory)
        return stack.enter_context(running((*chroot, *command), log, ready)).pid

    def arrange(self, arrangement: Arrangement) -> bool:
        return arrangement == Arrangement()

    def empty(self) -> bool:
        spool = self.directory / _SPOOL
        return not any(files for name in ("tmp", "queue") for _, _, files in os.walk(spool / name))

    def hold(self) -> None:
        os.kill(self._send, signal.SIGSTOP)

    def release(self) -> None:
        os.kill(self._send, signal.SIGCONT)

    def flush(self) -> None:
        """Do nothing: all that it has written is synced."""


def _run(*command: object, cwd: Path | None = None) -> str:
    return subprocess.run(
        [*map(str, command)], cwd=cwd, check=True, text=True, stdout=subprocess.PIPE
    ).stdout
