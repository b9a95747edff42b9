"""Names that the shell offers for `--route` and `--server`: those that workers published, those
that are paused, and servers that were tried in the last hour.

A person waits for the completion, so it ends within TIMEOUT. It prints no error, because it would
appear in the command line that is being typed.
"""

import contextlib
import threading

from commands.ops.database import opened
from relay.report.queries import QueueReader
from relay.settings import Settings, load

TIMEOUT = 1.0  # seconds


def offered(kind: str, incomplete: str) -> list[str]:
    """Names of the kind `route` or `server` that begin with `incomplete`."""
    names = set[str]()

    def read() -> None:
        with contextlib.suppress(Exception):
            names.update(_known(kind))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    return sorted(name for name in tuple(names) if name.startswith(incomplete))


def _known(kind: str) -> set[str]:
    with opened(load(Settings)) as engine:
        queue = QueueReader(engine)
        routes = [worker.routes or {} for worker in queue.workers() if worker.alive]
        subjects = [pause.subject.partition(":") for pause in queue.pauses()]
        paused = {name for subject_kind, _, name in subjects if subject_kind == kind}
        if kind == "route":
            return paused.union(*routes)
        tried = {row["server"] for row in queue.read("servers")}
        return paused.union(tried, *(servers for known in routes for servers in known.values()))
