"""`qmqp-relay web`: pages that show the queue, and where operators act.

A page is one request, answered by a template from `relay.report.queries`. Graphs are SVG drawn
here. Without users of the relay in the roles viewer and operator the pages are read only;
`commands.web.access` says who a visitor is. A script keeps open pages live, and nothing needs it.

What must stay true: a GET changes nothing; a POST changes something only with the token of its
session. Text of peers stays text: templates escape it and characters that change the direction of
writing, and the content security policy allows only our style sheet and our script. A page of
another site can neither frame nor read these pages, nor reach them through a name that it has
pointed to this machine.
"""

import contextlib
import socket
from collections.abc import Awaitable, Callable

import uvicorn
from sqlalchemy import Engine
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import Route

from commands.errors import DONE, WRONG_USE, CommandError
from commands.ops.database import opened
from commands.web.access import Access, LoginNeeded, Visitor
from commands.web.acting import NAMES
from commands.web.connection import TimedProtocol
from commands.web.forms import read_form
from commands.web.guard import Guard
from commands.web.live import LiveStreams
from commands.web.pages import TEMPLATES, Pages
from commands.web.sessions import Sessions
from relay.listeners import is_loopback
from relay.log import get_logger
from relay.settings import SmtpdSettings
from relay.tls import CertificatePair, certificate_pair

log = get_logger(__name__)

type ShownPage = Callable[[Request, Visitor], Response]
type Endpoint = Callable[[Request], Response | Awaitable[Response]]


class PageServer(uvicorn.Server):
    """The server of the pages; its `run` takes the listening sockets."""

    def __init__(self, config: uvicorn.Config, streams: LiveStreams, access: Access) -> None:
        super().__init__(config)
        self._streams, self._access = streams, access

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._streams.stop()
        await super().shutdown(sockets)
        await self._access.close()


def server(
    engine: Engine, settings: SmtpdSettings, certificate: CertificatePair | None = None
) -> PageServer:
    """The server of the pages, over TLS with a certificate."""
    access, pages = Access(engine, settings), Pages(engine, settings)
    streams = LiveStreams(pages.overview, access)
    sessions = Sessions(access, pages)

    def shown(page: ShownPage, *, operator: bool = False) -> Endpoint:
        """A page for visitors, or for operators alone. It runs in a thread."""

        def respond(request: Request) -> Response:
            visitor = access.visitor(request)
            if operator and not visitor.acts:
                raise HTTPException(403, "This needs a user with the role operator.")
            return page(request, visitor)

        return respond

    async def act(request: Request) -> Response:
        form = await read_form(request)

        def respond() -> Response:
            visitor = access.visitor(request)
            if not visitor.acts:
                raise HTTPException(403, "This needs a user with the role operator.")
            access.check_token(visitor, dict(form).get("token", ""))
            return pages.act(request, visitor, form)

        return await run_in_threadpool(respond)

    def no_session(request: Request, _error: Exception) -> Response:
        if request.method == "GET" and not request.url.path.startswith("/events"):
            return RedirectResponse(sessions.address_for(request), 303)
        return pages.failed(request, HTTPException(403, "Your session has ended. Log in again."))

    def file(name: str) -> Route:
        return Route(f"/{name}", lambda _request: FileResponse(TEMPLATES / name))

    app = Starlette(
        routes=[
            Route("/", shown(pages.queue)),
            Route("/search", shown(pages.listing)),
            Route("/search.csv", shown(pages.as_csv)),
            Route("/operators", shown(pages.operators)),
            Route("/message/{queue_id}", shown(pages.message)),
            Route("/message/{queue_id}/header", shown(pages.header, operator=True)),
            *(Route(f"/act/{name}", shown(pages.preview, operator=True)) for name in NAMES),
            *(Route(f"/act/{name}", act, methods=["POST"]) for name in NAMES),
            Route("/login", sessions.form),
            Route("/login", sessions.log_in, methods=["POST"]),
            Route("/logout", sessions.log_out, methods=["POST"]),
            Route("/events", streams.stream),
            file("style.css"),
            file("live.js"),
        ],
        exception_handlers={
            LoginNeeded: no_session,
            HTTPException: pages.failed,
            Exception: pages.failed,
        },
    )
    config = uvicorn.Config(
        Guard(app, settings.hostname),
        http=TimedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # `Access` reads them, from trusted proxies only
        limit_concurrency=100,
        timeout_graceful_shutdown=3,
        ssl_context_factory=(lambda *_: certificate.server_context()) if certificate else None,
    )
    return PageServer(config, streams, access)


def run(settings: SmtpdSettings) -> int:
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
