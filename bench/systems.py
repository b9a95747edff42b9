"""What is measured: everything between an SMTP port and a sink."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tests.services import end, free_port, spawn

ROOT = Path(__file__).parent.parent
CONCURRENCY = 50
"""Deliveries to one server at once: RELAY_SERVER_CONNECTIONS' default, and Postfix gets as many."""


class System(Protocol):
    """A relay that is running. `name` is its column; `comparable` systems take part where a peer
    can."""

    name: str
    smtp_port: int
    directory: Path

    def start(self) -> None: ...
    def stop(self) -> None: ...

    def arrange(self, workers: int = 1, *, slow: bool = False) -> bool:
        """Deliver by so many workers, to the sink that answers at once or to the slow one; False:
        it cannot do that."""

    def processes(self) -> Mapping[str, list[int]]:
        """The processes of each role, for the cost table."""

    def delivered(self) -> int:
        """How many messages the sink has acknowledged since it was started."""

    def empty(self) -> bool:
        """Whether nothing is left in the queue, its records included."""

    def hold(self) -> None:
        """Accept and do not deliver."""

    def release(self) -> None: ...

    def rest(self) -> None:
        """Write out what is to be written some time, so that it does not fall into a
        measurement."""

    def facts(self) -> dict[str, str]:
        """Versions and durability settings."""


def program(name: str) -> str | None:
    """Where a mail server's tool is; they are not on everybody's PATH."""
    return shutil.which(name) or shutil.which(
        name, path="/usr/sbin:/sbin:/usr/local/sbin:/usr/libexec/postfix"
    )


class SinkProcess:
    """A sink in a process of its own that writes a running counter, read from its file without
    disturbing it.

    Postfix's tools where they are (they cost least), else, or with a `delay` (seconds), our own.
    """

    def __init__(self, kind: str, directory: Path, delay: float = 0.0) -> None:
        self.port = free_port()
        where = f"127.0.0.1:{self.port}"
        self._file = directory / f"{kind}-{self.port}.count"
        tool = None if delay else program(kind)
        if tool:
            # As root smtp-sink wants to know whom to become.
            user = ["-u", "nobody"] if kind == "smtp-sink" and os.geteuid() == 0 else []
            command = [tool, "-c", *user, where, "1000"]
        elif kind == "qmqp-sink":
            command = [sys.executable, "-m", "bench.sink", where, str(delay)]
        else:
            raise FileNotFoundError(f"{kind} is not installed")
        with self._file.open("wb") as counter:
            self._child: subprocess.Popen[Any] = spawn(command, stdout=counter, cwd=ROOT)

    @property
    def pid(self) -> int:
        return self._child.pid

    def count(self) -> int:
        """Messages acknowledged so far: the last number written."""
        with self._file.open("rb") as counter:
            size = counter.seek(0, 2)
            counter.seek(max(0, size - 100))
            found = re.findall(rb"(\d+)[\r\n]", counter.read())
        return int(found[-1]) if found else 0

    def stop(self) -> None:
        end(self._child)
