"""Some fifty messages in all states, with hostile text from peers, and a browser for the pages."""

import re
import socket
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import unescape
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

from commands.web import app as web
from relay.dsn.generator import DsnGenerator
from relay.queue.operations import OPERATIONS, QueueOperations
from relay.queue.outcome import Outcome
from relay.queue.states import State
from relay.report.filters import Filter
from relay.settings import SmtpdSettings, load
from relay.spool.store import Spool
from tests.integration.harness import QueueHarness
from tests.waiting import until

HOSTILE = "<script>alert('x')</script>\"'&amp;{{7*7}}"
TURNED = "\u202egpj.exe"  # shows what follows from right to left
LONG = f"{'long.' * 12}name@{'sub.' * 30}example.com"
SERVER = "qmqp.example.net:628"


@dataclass(slots=True)
class Scenario:
    """The created mail: recipients by the state of their delivery, ids by state, and other
    counts."""

    recipients: Counter[str] = field(default_factory=Counter)
    ids: dict[str, list[str]] = field(default_factory=dict)
    dsns_pending: int = 0
    possibly_delivered: list[str] = field(default_factory=list)  # ids with an uncertain attempt
    dsns: int = 0  # that were generated
    actions: Counter[str] = field(default_factory=Counter)  # by verb
    overdue: Counter[str] = field(default_factory=Counter)

    def add(self, state: str, *ids: str, recipients: int = 1) -> None:
        self.recipients[state] += recipients * len(ids)
        self.ids.setdefault(state, []).extend(ids)


def scenario(queue: QueueHarness, spool: Spool) -> Scenario:
    """Create it in an empty queue."""
    created, operations = Scenario(), QueueOperations(queue.database, sends_dsns=True)
    numbers = iter(range(1, 100))

    def accept(*addresses: str, **more: object) -> str:
        number = next(numbers)
        message = {
            "sender": f"sender{number}@example.com",
            "header_message_id": f"<{number}@example.com>",
        } | more
        queue_id = queue.accept(
            *(addresses or (f"r{number}@d{number % 3}.example.org",)), **message
        )
        spool.store(queue_id, [b"Subject: x\n\n" + b"x" * 88])
        return queue_id

    def tried(outcome: Outcome, **more: Any) -> str:
        queue_id = accept()
        queue.complete(queue.claim(queue_id)[0], outcome, **more)
        return queue_id

    created.add("delivered", *(tried(Outcome.DELIVERED) for _ in range(12)))
    late = [tried(Outcome.DEFERRED) for _ in range(3)]
    queue.pass_time(2000, only=late)  # older than the lifetime: the next failure expires them
    queue.rescuer.requeue_due(10)
    for claim in queue.claim(*late):
        queue.complete(claim, Outcome.DEFERRED, reply="451 still busy")
    created.add("expired", *late)
    created.add(
        "bounced", *(tried(Outcome.REJECTED, reply=f"550 5.1.1 {HOSTILE}") for _ in range(4))
    )
    generator = DsnGenerator(queue.database, spool, queue.settings, lambda _address: "notices")
    dsns = generator.generate(5)  # of seven: two stay pending
    created.dsns_pending, created.dsns = 2, len(dsns)
    created.add("queued", *dsns)
    created.add(
        "deferred", *(tried(Outcome.DEFERRED, reply="451 4.7.1 greylisted") for _ in range(4))
    )
    created.possibly_delivered = [
        tried(Outcome.UNCERTAIN, reply="connection closed") for _ in range(2)
    ]
    created.add("deferred", *created.possibly_delivered)
    created.add("deferred", tried(Outcome.UNREACHABLE, reply="connection refused"))
    created.add("held", tried(Outcome.UNSENDABLE, reply=f"no body file {TURNED}"))
    for verb, state in (("hold", "held"), ("drop", "dropped")):
        ids = [accept() for _ in range(3)]
        for queue_id in ids:
            operations.apply(
                OPERATIONS[verb], Filter(id=queue_id), actor=f"{HOSTILE}@here", reason=HOSTILE
            )
            created.actions[verb] += 1
        created.add(state, *ids)
    cut = accept("good@example.org", "bad@example.org", "fine@example.org")
    queue.complete(
        queue.claim(cut)[0], Outcome.REJECTED, state=State.SPLIT, reply="550 5.1.1 no such user"
    )
    for claim in queue.claim(cut):
        queue.complete(claim, Outcome.DELIVERED)
    created.add("delivered", cut, recipients=3)
    created.add(
        "queued",
        accept(
            f"{HOSTILE}@example.org", sender=HOSTILE, header_message_id=f"<{HOSTILE}>", helo=HOSTILE
        ),
    )
    created.add("queued", accept(LONG, sender=LONG), *(accept(sender="") for _ in range(2)))
    created.add("queued", accept("many1@example.org", "many2@example.org"), recipients=2)
    sending = [accept() for _ in range(4)]
    queue.claim(*sending)
    created.add("sending", *sending)
    for state, overdue in (
        ("deferred", created.ids["deferred"][:2]),
        ("queued", created.ids["queued"]),
    ):
        queue.pass_time(100, only=overdue)  # no worker has handled them since they were due
        created.overdue[state] = len(overdue)
    queue.pass_time(
        -10_000, only=created.ids["deferred"][2:]
    )  # however long the tests take, these are not
    return created


def questions(database: str) -> list[list[str]]:
    """The statements of docs/inspect.md for each of its further questions, for that database."""
    page = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text()
    text = page.split("\n## More questions\n")[1]
    other = {"sqlite": "-- PostgreSQL", "postgresql": "-- SQLite"}[database]
    blocks = [block.split(";") for block in re.findall(r"```sql\n(.*?)```", text, re.DOTALL)]
    return [[query for query in block if query.strip() and other not in query] for block in blocks]


@dataclass(slots=True)
class Page:
    """A response: its status, headers and text, the address that answered, and the visible
    text."""

    status: int
    headers: dict[str, str]
    text: str
    url: str

    @property
    def visible_text(self) -> str:
        text = re.sub(r"<wbr>|</?span[^>]*>", "", self.text)  # they are inside words
        return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text)))


class Browser:
    """A client of the pages that keeps cookies and follows redirects. Over TLS it needs a
    context."""

    def __init__(self, root: str, context: ssl.SSLContext | None = None) -> None:
        self.root = root
        self.cookies = CookieJar()
        self._opener = urllib.request.build_opener(
            urllib.request.HTTPCookieProcessor(self.cookies),
            urllib.request.HTTPSHandler(context=context),
        )

    def get(self, path: str, method: str = "GET", **headers: str) -> Page:
        return self._ask(urllib.request.Request(self.root + path, method=method, headers=headers))

    def post(self, path: str, headers: Any = None, **form: str) -> Page:
        data = urllib.parse.urlencode(form).encode()
        return self._ask(urllib.request.Request(self.root + path, data, headers or {}))

    def log_in(self, name: str, password: str, path: str = "/") -> Page:
        """Ask for a page, and send the form of the login that comes instead."""
        form = self.get(path)
        assert 'action="/login"' in form.text
        return self.post("/login", name=name, password=password, next=hidden(form, "next"))

    def act(self, path: str, **given: str) -> Page:
        """Confirm the preview of an operation, with its hidden fields and what is given."""
        preview = self.get(path)
        assert preview.status == 200, preview.visible_text
        action = re.search(r'action="(/act/\w+)"', preview.text)
        assert action is not None, preview.visible_text
        fields = re.findall(r'type="hidden" name="([^"]*)" value="([^"]*)"', preview.text)
        data = [(name, unescape(value)) for name, value in fields if name not in given]
        body = urllib.parse.urlencode([*data, *given.items()]).encode()
        return self._ask(urllib.request.Request(self.root + action[1], body))

    def _ask(self, request: urllib.request.Request) -> Page:
        try:
            answer = self._opener.open(request, timeout=30)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            return Page(
                answer.status,
                {k.lower(): v for k, v in answer.headers.items()},
                answer.read().decode(),
                answer.url.removeprefix(self.root),
            )


def hidden(page: Page, name: str) -> str:
    """The value of a hidden field."""
    found = re.search(rf'type="hidden" name="{name}" value="([^"]*)"', page.text)
    assert found is not None, page.visible_text
    return unescape(found[1])


@contextmanager
def browsing(queue: QueueHarness) -> Iterator[Browser]:
    """The pages of a database, served by a real server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = web.server(queue.database, load(SmtpdSettings))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            until(lambda: server.started, what="the page is served")
            yield Browser(f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join(10)
