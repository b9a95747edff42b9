"""What the shell offers for `--route` and `--server`: what workers, pauses and the last hour know.

Somebody waits with a finger on the key: who does not answer within PATIENCE is not waited for, and
whatever goes wrong is no news on a command line that is being typed.
"""

import contextlib
import threading

from commands.ops.show import opened
from relay.report.queries import QueueReader
from relay.settings import Settings, load

PATIENCE = 1.0  # seconds


def offered(kind: str, incomplete: str) -> list[str]:
    """Names of each `route` or `server` that begin like that."""
    found = set[str]()

    def look() -> None:
        with contextlib.suppress(Exception):
            found.update(_known(kind))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return sorted(name for name in tuple(found) if name.startswith(incomplete))


def _known(kind: str) -> set[str]:
    with opened(load(Settings)) as engine:
        queue = QueueReader(engine)
        routes = [
            routes for worker in queue.workers() if worker["alive"] and (routes := worker["routes"])
        ]
        paused = {
            row["subject"].removeprefix(f"{kind}:")
            for row in queue.pauses()
            if row["subject"].startswith(kind)
        }
        if kind == "route":
            return paused.union(*routes)
        tried = {row["server"] for row in queue.servers()}
        return (
            paused
            | tried
            | {server for known in routes for servers in known.values() for server in servers}
        )
