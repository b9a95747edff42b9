"""`python -m bench.ledger_worker KIND URL`: a worker of a job queue, for the part `ledger`.

KIND is one of `job_queues.KINDS`. A line on standard input is a command in JSON: `enqueue` so many
jobs in batches, or `finish` jobs: fetch and finish them until none is left. The worker connects,
prints a line, waits for an empty line, and prints what it did: the moments (time.monotonic, which
all processes share), its CPU seconds, and the ids and the number of the jobs.
"""

import json
import sys
import time
from typing import Any

import uvloop

from bench.job_queues import KINDS


async def work(kind: str, url: str) -> None:
    """Execute the commands of standard input."""
    client = KINDS[kind](url)
    while line := sys.stdin.readline():
        command = json.loads(line)
        await client.connect()
        print("ready", flush=True)
        sys.stdin.readline()
        client.done = 0
        cpu, began = time.process_time(), time.monotonic()
        ids: list[str] = []
        if command["do"] == "enqueue":
            ids = await client.enqueue(command["count"], command["batch"])
        else:
            await client.finish(command["ids"], command["batch"])
        ended = time.monotonic()
        report: dict[str, Any] = {"began": began, "ended": ended, "ids": ids, "done": client.done}
        print(json.dumps(report | {"cpu": time.process_time() - cpu}), flush=True)


if __name__ == "__main__":
    uvloop.run(work(*sys.argv[1:]))
