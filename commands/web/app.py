"""`qmqp-relay web`: pages that show the queue, read only, for a browser on this machine.

A page is one request, answered by a template from `relay.report.queries`. Graphs are SVG drawn
here. There is no script, cookie, password or file from another site. The overview scans tables, so
it is kept for some seconds, and for longer if it took long.

What must stay true: no request changes anything. Text of peers stays text: templates escape it and
characters that change the direction of writing, and the content security policy allows only our
style sheet. A page of another site can neither frame nor read these pages, nor reach them through a
name that it has pointed to this machine.
"""

import asyncio
import contextlib
import ipaddress
import re
import socket
import threading
import time
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
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from commands.errors import DONE, WRONG_USE, CommandError
from commands.ops.show import OUTCOMES, described, journal_rows, opened, report_on
from commands.output import ago, cut, due, plain, size, span, stamp
from commands.web import charts
from commands.web.timeline import timeline
from relay.db.engine import is_outage
from relay.listeners import is_loopback
from relay.log import first_line, get_logger
from relay.queue.states import UNFINISHED, State
from relay.report.filters import Filter, bracketed
from relay.report.queries import NoSuchMessage, QueueReader
from relay.report.rows import Row
from relay.report.statistics import Statistics
from relay.settings import Settings
from relay.tls import CertificatePair, certificate_pair

log = get_logger(__name__)
PAGES = Path(__file__).with_name("templates")
PAGE_ROWS = 50
OVERVIEW_AGE = 5.0  # seconds that an overview is kept
# Seconds for a request to arrive, and for the client to read the answer.
UNFINISHED_TIMEOUT = 10.0
STEP, STEPS = 300, 72  # seconds of a bar, and number of bars: six hours
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
FIELDS = ("id", "sender", "recipient", "header_message_id", "state", "reply")


class TimedProtocol(H11Protocol):
    """A connection that ends when a request does not arrive, or its answer is not read, in time.

    uvicorn limits only the silence after an answer, and accepts no more than 100 connections.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._restart_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._restart_timer()

    def _restart_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(UNFINISHED_TIMEOUT, self._on_timeout)

    def _on_timeout(self) -> None:
        # The client waits for us when its request is complete and its answer is not: the database
        # has time limits of its own. There is no cycle before the first request.
        cycle = self.cycle
        complete = cycle is not None and not cycle.more_body  # type: ignore[redundant-expr]
        if complete and not cycle.response_complete and not self.flow.write_paused:
            self._restart_timer()
        else:
            self.transport.abort()


class Guard:
    """Adds HEADERS to every answer, and refuses a request for a host name that is not ours (DNS
    rebinding).

    It is the outermost layer: Starlette raises an exception again after `Pages.failed` has
    answered, and it is logged here.
    """

    def __init__(self, app: ASGIApp, hostname: str) -> None:
        self._app = app
        self._names = {"localhost", hostname.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        app = (
            self._app
            if self._ours(host)
            else Response("This host name is not one of this relay.\n", 421)
        )
        try:
            await app(scope, receive, send_with_headers)
        except Exception as error:
            if is_outage(error):
                log.warning(
                    "page unavailable", reason=first_line(getattr(error, "orig", None) or error)
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
    """The pages; one object for each process."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._queue = QueueReader(engine)
        self._settings = settings
        self._templates = Environment(
            loader=FileSystemLoader(PAGES),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=lambda value: plain(value) if type(value) is str else value,
        )
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
        self._overview: dict[str, Any] = {}
        self._overview_expires_at = 0.0
        self._lock = threading.Lock()

    def overview(self, _request: Request) -> Response:
        """The whole queue at a glance."""
        with self._lock:  # requests that arrive meanwhile get the same overview
            began = time.monotonic()
            if began >= self._overview_expires_at:
                self._overview = self._read_overview()
                took = time.monotonic() - began
                self._overview_expires_at = began + took + max(OVERVIEW_AGE, 20 * took)
        return self._page("overview.html", **self._overview)

    def _read_overview(self) -> dict[str, Any]:
        summary = self._queue.read("summary")
        order = {str(state): n for n, state in enumerate(State)}
        counts = {
            state: sum(row["deliveries"] for row in summary if row["state"] == state)
            for state in State
        }
        waiting = [row for row in summary if row["state"] in UNFINISHED]
        now, steps = Statistics(self._engine).history(STEP * STEPS, STEP)
        return {
            "summary": sorted(summary, key=lambda row: (order[row["state"]], row["route"])),
            "counts": {
                str(state): count for state, count in counts.items() if count or state in UNFINISHED
            },
            "oldest": max((row["oldest_seconds"] for row in waiting), default=None),
            "overdue": sum(row["overdue"] for row in waiting),
            "paused": sum(row["paused"] for row in waiting),
            "servers": self._queue.read("servers"),
            "workers": [row for row in self._queue.workers() if row.ended_at is None],
            "pauses": self._queue.read("paused"),
            "journal": journal_rows(self._settings, self._queue),
            "rate": charts.rate(now, steps, STEP, STEPS),
            "latency": charts.latency(now, steps, STEP, STEPS),
            "hours": charts.hourly(now, steps, STEP, STEPS),
            "at": stamp(now),
        }

    def search(self, request: Request) -> Response:
        """Mail that matches, newest first, a page at a time. Without an index a page covers a
        bounded number of messages."""
        fields = {name: request.query_params.get(name, "").strip() for name in FIELDS}
        after = request.query_params.get("after", "")
        fault, older, rows, horizon = "", "", list[Row](), None
        try:
            filter_, last = self._filter(fields), self._last_row(after)
            horizon = self._queue.horizon(filter_, last)
            matching = self._queue.rows(
                filter_,
                finished=True,
                newest=True,
                after=last,
                down_to=horizon,
                limit=PAGE_ROWS + 1,
            )
            rows = list(matching)
        except (NoSuchMessage, ValueError) as error:
            fault = str(error)
        if len(rows) > PAGE_ROWS:
            horizon = None
            older = f"{rows[PAGE_ROWS - 1]['queue_id']}.{rows[PAGE_ROWS - 1]['position']}"
        elif horizon:
            older = f"{horizon}.0"
        values = {name: value for name, value in fields.items() if value}
        return self._page(
            "search.html",
            fields=fields,
            rows=rows[:PAGE_ROWS],
            more=urlencode(values | {"after": older}) if older else "",
            fault=fault,
            later=after,
            until=_received(horizon) if horizon else "",
        )

    def _last_row(self, after: str) -> tuple[str, int] | None:
        """The last row of the page before; raises NoSuchMessage, and ValueError for a link that is
        not ours."""
        if not after:
            return None
        # A position is an integer of 32 bits.
        row = re.fullmatch(r"([0-9a-f]{32})\.([0-9]{1,9})", after)
        if row is None:
            raise ValueError("this link to older mail is not complete")
        return self._queue.resolve(row[1]), int(row[2])

    def _filter(self, fields: dict[str, str]) -> Filter:
        """The filter that the fields mean; raises NoSuchMessage and ValueError."""
        if any("\0" in value for value in fields.values()):
            raise ValueError("no mail has a zero byte in this field")  # PostgreSQL accepts none
        if fields["state"] and fields["state"] not in list(State):
            raise ValueError(f"there is no state {fields['state']}")
        queue_id, header = fields["id"], fields["header_message_id"]
        return Filter(
            states=(fields["state"],) if fields["state"] else (),
            sender="" if fields["sender"] == "<>" else fields["sender"] or None,
            recipient=fields["recipient"] or None,
            id=self._queue.resolve(queue_id) if queue_id else None,
            reply=fields["reply"] or None,
            header_message_id=bracketed(header) if header else None,
        )

    def message(self, request: Request) -> Response:
        """Everything about one message."""
        try:
            report = report_on(self._queue, self._settings, request.path_params["queue_id"])
        except NoSuchMessage as error:
            raise HTTPException(404, str(error)) from None
        lines = [
            (name, text)
            for name, text in described(report)
            if name not in ("id", "why") and not name.startswith("delivery")
        ]
        operations = self._queue.operations_on(report.message.queue_id)
        return self._page(
            "message.html",
            message=report.message,
            why=report.why,
            lines=lines,
            timeline=timeline(report.message, report.dsns, operations),
        )

    def failed(self, _request: Request, error: Exception) -> Response:
        """The page for an error. It says of a fault of our own only that it is in the log."""
        status = 500
        text = "This page failed. Read the log of `qmqp-relay web`. No mail is affected."
        if isinstance(error, HTTPException):
            status, text = error.status_code, error.detail
        elif is_outage(error):
            status, text = 503, "The database does not answer in time. Run `qmqp-relay check`."
        return self._page("failed.html", status=status, text=text)

    def _page(self, name: str, *, status: int = 200, **values: Any) -> Response:
        text = self._templates.get_template(name).render(
            page=name.removesuffix(".html"), status=status, **values
        )
        return HTMLResponse(text, status)


def _received(queue_id: str) -> str:
    """The time in a queue id (UUIDv7: its first 48 bits are milliseconds)."""
    return stamp(datetime.fromtimestamp(int(queue_id[:12], 16) / 1000, UTC))


def unbroken(text: str) -> Markup:
    """Text in which no line ends at a hyphen or colon: an address that is cut there looks like
    another one."""
    # A run matches only from its beginning and only as a whole, so the time is linear in the length
    # of what peers wrote.
    joined = re.sub(
        r"(?<![-:])[-:]++(&[#\w]+;|[^\s&:-])",
        r'<span class="joined">\g<0></span>',
        escape(plain(text)),
    )
    return Markup(joined)  # noqa: S704 - it was escaped


def address(text: str) -> Markup:
    """The same, with line breaks allowed before the @ and before dots."""
    return Markup(re.sub(r"[@.]", r"<wbr>\g<0>", unbroken(text)))  # noqa: S704 - it was escaped


def server(
    engine: Engine, settings: Settings, certificate: CertificatePair | None = None
) -> uvicorn.Server:
    """The server of the pages, over TLS with a certificate; its `run` takes the listening
    sockets."""
    pages = Pages(engine, settings)
    app = Starlette(
        routes=[
            Route("/", pages.overview),
            Route("/search", pages.search),
            Route("/message/{queue_id}", pages.message),
            Route("/style.css", lambda _request: FileResponse(PAGES / "style.css")),
        ],
        exception_handlers={HTTPException: pages.failed, Exception: pages.failed},
    )
    config = uvicorn.Config(
        Guard(app, settings.hostname),
        http=TimedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=100,
        timeout_graceful_shutdown=3,
        ssl_context_factory=(lambda *_: certificate.server_context()) if certificate else None,
    )
    return uvicorn.Server(config)


def run(settings: Settings) -> int:
    """Serve until a signal stops it; the exit status."""
    sockets = []
    for host, port in settings.web_listen:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sockets.append(socket.create_server((host, port), family=family))
        except OSError as error:
            text = f"RELAY_WEB_LISTEN: cannot listen on {host}:{port}: {error.strerror}"
            raise CommandError(WRONG_USE, text) from None
    beyond = not all(is_loopback(host) for host, _port in settings.web_listen)
    certificate = certificate_pair(settings) if beyond else None
    with opened(settings) as engine:
        for host, port in settings.web_listen:
            log.info("web pages served", host=host, port=port, tls=certificate is not None)
        with contextlib.suppress(KeyboardInterrupt):
            server(engine, settings, certificate).run(sockets)
    return DONE
