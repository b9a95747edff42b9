"""`python -m tests.picture FILE`: a picture of the page for README, taken by Chromium.

The page is that of a relay on an afternoon when one of its servers is down. The messages are made
as for the tests, on SQLite in a temporary directory. The picture is a PNG in light colours.
"""

import base64
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

from relay.db.engine import migrate
from relay.ids import new_id
from relay.queue.model import Attempt
from relay.queue.operations import QueueOperations
from relay.queue.outcome import Outcome
from relay.spool.store import Spool
from tests.acceptance.console import browsing
from tests.acceptance.test_page_in_chromium import PROGRAMS, Chromium
from tests.integration.harness import QueueHarness, opened
from tests.integration.typed import typed_at
from tests.services import end

WIDTH, HEIGHT = 1280, 900  # the height of the tests' browser
HOURS = 6
SERVERS = {"default": ["10.0.0.7:628", "10.0.0.8:628"], "lists": ["10.0.0.9:628"]}
BUSY = "451 4.3.2 the queue of this server is full, try again later"
UNKNOWN = "550 5.1.1 no such mailbox"
DOWN = "connect: Connection refused"
AWAY = SERVERS["lists"][0]


def fill(queue: QueueHarness) -> None:
    """Some hours of mail: most is delivered, some is deferred, one server is down."""
    chance = random.Random(628)
    queue.rescuer.publish_routes(queue.worker, SERVERS)
    for minute in range(HOURS * 60, 1, -1):
        for _ in range(chance.choice((0, 1, 1, 2, 3))):
            age = minute * 60 - chance.randrange(60)
            sender = f"{chance.choice(('shop', 'billing', 'news'))}@example.com"
            domain = chance.choice(("example.org", "example.net", "mail.example.com"))
            address = f"{chance.choice(('ann', 'bob', 'cid', 'dan'))}@{domain}"
            server, luck = chance.choice(SERVERS["default"]), chance.random()
            if luck < 0.93:
                send(queue, age, sender, address, Outcome.DELIVERED, "Ok: queued", server)
            elif luck < 0.98 and age < 3600:
                send(queue, age, sender, address, Outcome.DEFERRED, BUSY, server)
            else:
                send(queue, age, sender, address, Outcome.REJECTED, UNKNOWN, server)
    for age in range(2400, 60, -60):
        address = f"lists:member{age}@lists.example.net"
        send(queue, age, "news@example.com", address, Outcome.UNREACHABLE, DOWN, AWAY)
    queue.change("UPDATE deliveries SET expires_at = @later(400000) WHERE finished_at IS NULL")
    queue.rescuer.publish_open_circuits(queue.worker, {AWAY: DOWN})
    operations = QueueOperations(queue.database, sends_dsns=True)
    operations.pause("server:10.0.0.8:628", actor="ann@relay", reason="ticket 812: new disk")


def send(
    queue: QueueHarness,
    age: int,
    sender: str,
    address: str,
    outcome: Outcome,
    reply: str,
    server: str,
) -> None:
    """A message that was accepted and tried so many seconds ago."""
    began = f"{int((time.time() - age) * 1000):012x}{new_id()[12:]}"
    queue_id = queue.accept(address, sender=sender, queue_id=began)
    (claim,) = queue.claim(queue_id, capacity=dict.fromkeys(SERVERS, 10))
    attempt = Attempt(1, server, outcome, reply, 4096, 0.05, 0.0)
    queue.complete(claim, outcome, reply=reply, server=server, attempts=[attempt], delay=1800.0)
    for table, key, columns in (
        ("messages", "id", ("received_at",)),
        ("attempts", "queue_id", ("started_at", "finished_at")),
    ):
        earlier = ", ".join(f"{column} = {column} - :age * 1000000" for column in columns)
        queue.change(f"UPDATE {table} SET {earlier} WHERE {key} = @id(:id)", id=queue_id, age=age)


def take(file: Path) -> None:
    """Make the mail, serve the page, and write its picture to a file."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        sys.exit("no Chromium on this machine")
    with (
        tempfile.TemporaryDirectory() as directory,
        pytest.MonkeyPatch.context() as settings,
    ):
        url = f"sqlite:///{directory}/relay.db"
        migrate(url)
        spool = Path(directory, "spool")
        spool.mkdir(mode=0o700)
        (spool / "spool-id").write_text(f"{new_id()}\n")
        with opened(url) as queue:
            typed_at(queue, Spool(spool), settings)
            fill(queue)
            with browsing(queue) as browser:
                _photograph(program, directory, browser.root, file)


def _photograph(program: str, directory: str, address: str, file: Path) -> None:
    chromium = Chromium(program, f"{directory}/chromium")
    try:
        chromium.call("Emulation.setScrollbarsHidden", hidden=True)
        chromium.look(f"{address}/", WIDTH, "light")
        shot = chromium.call(
            "Page.captureScreenshot",
            clip={"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT, "scale": 1},
        )
    finally:
        end(chromium.child)
    file.write_bytes(base64.b64decode(shot["data"]))


if __name__ == "__main__":
    take(Path(sys.argv[1]))
