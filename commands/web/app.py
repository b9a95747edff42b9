"""`qmqp-relay web`: the queue on a page, read only, for a browser on this machine.

How it works: every page is one request, answered from `relay.report.queries` by a template; graphs
are SVG that is drawn here. There is no script, no cookie, no password and nothing from elsewhere.
What costs a scan (the overview) is kept for some seconds, and for longer where it took long.

What must stay true: nothing is changed, whoever asks; whatever peers wrote is text (templates
escape everything, characters that turn the direction of ours too, and the policy that is sent along
allows a style sheet of ours and nothing else); a page of another site can neither frame nor read
this one, nor reach it by a name that it has pointed here.
"""

import asyncio
import ipaddress
import re
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import uvicorn
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from sqlalchemy import Engine
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from commands.errors import DONE, OUT_OF_REACH, say
from commands.ops.show import described, message_with_reasons, opened
from commands.output import ago, cut, plain, size, span, stamp
from commands.web import charts
from commands.web.timeline import timeline
from relay.db.engine import is_outage
from relay.db.schema import UNFINISHED, State
from relay.log import first_line, get_logger
from relay.report.filters import Filter, bracketed
from relay.report.queries import NoSuchMessage, QueueReader, Row
from relay.report.statistics import Statistics
from relay.settings import Settings

log = get_logger(__name__)
PAGES = Path(__file__).with_name("templates")
A_PAGE = 50  # rows
FRESH = 5.0  # seconds that an overview is shown again
UNFINISHED_TIMEOUT = 10.0  # seconds for a request to come, and for the visitor to take its answer
STEP, STEPS = 300, 72  # seconds of a bar, and bars: six hours
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none';"
    " frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
FIELDS = ("id", "sender", "recipient", "header_message_id", "state", "reply")
OUTCOMES = ("delivered", "deferred", "rejected", "unreachable", "interrupted", "uncertain")


class Visit(H11Protocol):
    """A connection that ends when a request does not come whole in time, or its answer is not
    taken.

    uvicorn times out a connection only that is silent behind an answer, and has no more than 100 of
    them.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(UNFINISHED_TIMEOUT, self._look)

    def _look(self) -> None:
        if self._answering():
            self._wait()
        else:
            self.transport.abort()

    def _answering(self) -> bool:
        """The request is whole, and what is late is ours: the database has time-outs of its own."""
        cycle = self.cycle
        if cycle is None or cycle.more_body:  # type: ignore[redundant-expr]  # there is none before the first request
            return False
        return not cycle.response_complete and not self.flow.write_paused


class Guard:
    """Adds HEADERS to every answer, and answers nobody who came by a name that is not ours (DNS
    rebinding).

    It stands around all else: what could not be answered comes through here as an exception, after
    `Pages.failed` has told the visitor, and is logged.
    """

    def __init__(self, app: ASGIApp, hostname: str) -> None:
        self._app, self._names = app, {"localhost", hostname.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *given]}
            await send(message)

        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        app = self._app if self._ours(host) else Response("Not a name of this relay.\n", 421)
        try:
            await app(scope, receive, sent)
        except Exception as error:
            if is_outage(error):
                log.warning(
                    "page not answered", reason=first_line(getattr(error, "orig", None) or error)
                )
            else:
                log.exception("page failed")

    def _ours(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name.lower() in self._names
        return True


class Pages:
    """What is served; one for each process."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._queue, self._settings = QueueReader(engine), settings
        self._templates = Environment(
            loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True, finalize=lambda value: plain(value) if type(value) is str else value,
        )  # fmt: skip
        self._templates.globals |= {
            "ago": ago,
            "cut": cut,
            "due": due,
            "size": size,
            "span": span,
            "stamp": stamp,
            "states": list(State),
            "outcomes": OUTCOMES,
        }
        self._templates.filters |= {"unbroken": unbroken, "address": address}
        self._kept: dict[str, Any] = {}
        self._until, self._lock = 0.0, threading.Lock()

    def overview(self, _request: Request) -> Response:
        """The whole queue at a glance."""
        with self._lock:  # who comes meanwhile gets the same
            began = time.monotonic()
            if began >= self._until:
                self._kept = self._look()
                took = time.monotonic() - began
                self._until = began + took + max(FRESH, 20 * took)
        return self._page("overview.html", **self._kept)

    def _look(self) -> dict[str, Any]:
        summary = self._queue.summary()
        order = {str(state): n for n, state in enumerate(State)}
        counts = {
            state: sum(row["deliveries"] for row in summary if row["state"] == state)
            for state in State
        }
        waiting = [row for row in summary if row["state"] in UNFINISHED]
        now, steps = Statistics(self._queue).history(STEP * STEPS, STEP)
        return {
            "summary": sorted(summary, key=lambda row: (order[row["state"]], row["route"])),
            "counts": {
                str(state): count for state, count in counts.items() if count or state in UNFINISHED
            },
            "oldest": max((row["oldest_seconds"] for row in waiting), default=None),
            "overdue": sum(row["overdue"] for row in waiting),
            "servers": self._queue.servers(),
            "workers": [row for row in self._queue.workers() if row["ended_at"] is None],
            "pauses": self._queue.pauses(),
            "rate": charts.rate(now, steps, STEP, STEPS),
            "latency": charts.latency(now, steps, STEP, STEPS),
            "hours": charts.hourly(now, steps, STEP, STEPS),
            "at": time.strftime("%H:%M:%S"),
        }

    def search(self, request: Request) -> Response:
        """Mail that is looked for, newest first, a page at a time, and what no index finds in so
        many messages."""
        given = {name: request.query_params.get(name, "").strip() for name in FIELDS}
        after = request.query_params.get("after", "")
        trouble, rows, more, horizon = "", list[Row](), "", None
        try:
            wanted = self._filter(given)
            behind = self._behind(after)
            horizon = self._queue.horizon(wanted, behind)
            found = self._queue.rows(
                wanted, finished=True, newest=True, after=behind, down_to=horizon, limit=A_PAGE + 1
            )
            rows = list(found)
        except (NoSuchMessage, ValueError) as error:
            trouble = str(error)
        if len(rows) > A_PAGE:
            more, horizon = f"{rows[A_PAGE - 1]['queue_id']}.{rows[A_PAGE - 1]['position']}", None
        elif horizon:
            more = f"{horizon}.0"
        query = (
            urlencode({name: value for name, value in given.items() if value} | {"after": more})
            if more
            else ""
        )
        return self._page(
            "search.html", given=given, rows=rows[:A_PAGE], more=query, trouble=trouble, later=after,
            until=stamp(datetime.fromtimestamp(int(horizon[:12], 16) / 1000, UTC)) if horizon else "",
        )  # fmt: skip

    def _behind(self, after: str) -> tuple[str, int] | None:
        """The row behind which to go on; raises NoSuchMessage, and ValueError for what no link of
        ours says."""
        if not after:
            return None
        named = re.fullmatch(
            r"([0-9a-f]{32})\.([0-9]{1,9})", after
        )  # a position is an integer of 32 bits
        if named is None:
            raise ValueError("the link to older ones is not whole")
        return self._queue.resolve(named[1]), int(named[2])

    def _filter(self, given: dict[str, str]) -> Filter:
        if any("\0" in value for value in given.values()):
            raise ValueError("no mail has a zero byte there")  # PostgreSQL takes none in a text
        if given["state"] and given["state"] not in list(State):
            raise ValueError(f"there is no state {given['state']}")
        sender = "" if given["sender"] == "<>" else given["sender"] or None
        return Filter(
            states=(given["state"],) if given["state"] else (), sender=sender, recipient=given["recipient"] or None,
            id=self._queue.resolve(given["id"]) if given["id"] else None, reply=given["reply"] or None,
            header_message_id=bracketed(given["header_message_id"]) if given["header_message_id"] else None,
        )  # fmt: skip

    def message(self, request: Request) -> Response:
        """Everything about one message."""
        try:
            found = message_with_reasons(
                self._queue, self._settings, request.path_params["queue_id"]
            )
        except NoSuchMessage as error:
            raise HTTPException(404, str(error)) from None
        known = [
            line
            for line in described(found)
            if line[0] not in ("id", "why") and not line[0].startswith("delivery")
        ]
        notices, actions = (
            self._queue.notices(found["queue_id"]),
            self._queue.actions_on(found["queue_id"]),
        )
        return self._page(
            "message.html", message=found, facts=known, timeline=timeline(found, notices, actions)
        )

    def style(self, _request: Request) -> Response:
        """The one style sheet."""
        return Response((PAGES / "style.css").read_text(), media_type="text/css")

    def failed(self, _request: Request, error: Exception) -> Response:
        """What could not be answered, and why; a fault of ours in no more than a sentence."""
        if isinstance(error, HTTPException):
            return self._page("failed.html", status=error.status_code, words=error.detail)
        if is_outage(error):
            words = "The database does not answer, or not in time. `qmqp-relay check` looks closer."
            return self._page("failed.html", status=503, words=words)
        words = "This page has a fault, which the log of `qmqp-relay web` tells of. No mail is touched by it."
        return self._page("failed.html", status=500, words=words)

    def _page(self, name: str, *, status: int = 200, **values: Any) -> Response:
        text = self._templates.get_template(name).render(
            page=name.removesuffix(".html"), status=status, **values
        )
        return HTMLResponse(text, status)


def due(when: datetime | None) -> str:
    """How long until then, or how late it is."""
    return ago(when) + (" late" if when is not None and when < datetime.now(UTC) else "")


def unbroken(text: str) -> Markup:
    """Text in which no line ends at a hyphen or colon: an address that does looks like another
    one."""
    # A run is tried from its beginning only, and in its whole length only: the time is linear in
    # what peers write.
    joined = re.sub(
        r"(?<![-:])[-:]++(&[#\w]+;|[^\s&:-])",
        r'<span class="joined">\g<0></span>',
        escape(plain(text)),
    )
    return Markup(joined)  # noqa: S704 - it was escaped


def address(text: str) -> Markup:
    """The same, which is broken before its @ or a dot if it must be."""
    return Markup(re.sub(r"[@.]", r"<wbr>\g<0>", unbroken(text)))  # noqa: S704 - it was escaped


def application(engine: Engine, settings: Settings) -> ASGIApp:
    """The ASGI application."""
    pages = Pages(engine, settings)
    routes: list[tuple[str, Callable[[Request], Response]]] = [
        ("/", pages.overview), ("/search", pages.search), ("/message/{queue_id}", pages.message),
        ("/style.css", pages.style),
    ]  # fmt: skip
    served = Starlette(
        routes=[Route(path, endpoint) for path, endpoint in routes],
        exception_handlers={HTTPException: pages.failed, Exception: pages.failed},
    )
    return Guard(served, settings.hostname)


def server(engine: Engine, settings: Settings) -> uvicorn.Server:
    """The server, which serves on sockets that it is given."""
    config = uvicorn.Config(
        application(engine, settings), http=Visit, ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, limit_concurrency=100, timeout_graceful_shutdown=3,
    )  # fmt: skip
    return uvicorn.Server(config)


def run(settings: Settings) -> int:
    """Serve until told to stop; the exit status."""
    sockets = []
    for host, port in settings.web_listen:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sockets.append(socket.create_server((host, port), family=family))
        except OSError as error:
            say(f"RELAY_WEB_LISTEN: cannot listen on {host}:{port}: {error.strerror}")
            return OUT_OF_REACH
    with opened(settings) as engine:
        for host, port in settings.web_listen:
            log.info("web", host=host, port=port)
        try:
            server(engine, settings).run(sockets)
        except KeyboardInterrupt:
            return DONE
    return DONE
