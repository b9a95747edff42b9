"""`python -m tests.picture FILE`: a picture of the page for README, taken by Chromium.

The page is that of a relay on an afternoon when one of its servers is down. The messages are made
as for the tests, on SQLite in a temporary directory. The picture is a PNG in light colours.
"""

import base64
import random
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from relay.db.engine import migrate
from relay.ids import new_id
from relay.queue.operations import QueueOperations
from relay.queue.outcome import Outcome
from relay.spool.store import Spool
from tests.acceptance.console import browsing
from tests.acceptance.test_page_in_chromium import PROGRAMS, Chromium
from tests.integration.harness import QueueHarness, opened
from tests.integration.typed import typed_at
from tests.services import end

WIDTH, HEIGHT = 1280, 1000
HOURS = 6
SERVERS = {"default": ["10.0.0.7:628", "10.0.0.8:628"], "lists": ["10.0.0.9:628"]}
BUSY = "451 4.3.2 the queue of this server is full, try again later"
DOWN = "connect: Connection refused"


def fill(queue: QueueHarness) -> None:
    """Some hours of mail: most is delivered, some is deferred, one server is down."""
    chance = random.Random(628)
    queue.rescuer.publish_routes(queue.worker, SERVERS)
    for _ in range(HOURS * 4):
        queue.pass_time(900)
        queue.renew(queue.worker)
        for _ in range(chance.randrange(10, 22)):
            shop = chance.choice(("shop", "billing", "news"))
            domain = chance.choice(("example.org", "example.net", "mail.example.com"))
            queue_id = queue.accept(
                f"{chance.choice(('ann', 'bob', 'cid', 'dan'))}@{domain}",
                sender=f"{shop}@example.com",
            )
            server = chance.choice(SERVERS["default"])
            (claim,) = queue.claim(queue_id)
            if chance.random() < 0.9:
                queue.complete(claim, Outcome.DELIVERED, reply="Ok: queued", server=server)
            elif chance.random() < 0.8:
                queue.complete(claim, Outcome.DEFERRED, reply=BUSY, server=server)
            else:
                reply = "550 5.1.1 no such mailbox"
                queue.complete(claim, Outcome.REJECTED, reply=reply, server=server)
    for _ in range(40):
        queue_id = queue.accept("lists:members@lists.example.net", sender="news@example.com")
        (claim,) = queue.claim(queue_id)
        queue.complete(claim, Outcome.UNREACHABLE, reply=DOWN, server=SERVERS["lists"][0])
    queue.pass_time(400)
    queue.renew(queue.worker)
    queue.rescuer.publish_open_circuits(queue.worker, {SERVERS["lists"][0]: DOWN})
    operations = QueueOperations(queue.database, sends_dsns=True)
    operations.pause("server:10.0.0.8:628", actor="ann@relay", reason="ticket 812: new disk")


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
