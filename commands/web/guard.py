"""The outermost layer of the page: security headers on every answer, and the host names and origins
that requests may have.

A request for a host name that is not ours is refused, because another site may have pointed the
name to this machine (DNS rebinding). A request that changes something is refused if the browser
says that another site sends it. What must stay true: the content security policy allows our own
style sheet, our own script and nothing else.
"""

import ipaddress
from urllib.parse import urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from relay.db.engine import is_outage
from relay.log import first_line, get_logger

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self';"
    " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # `no-referrer` would hide the origin of our own forms
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
SAFE = ("GET", "HEAD")

log = get_logger(__name__)


class Guard:
    """Adds HEADERS, and refuses what does not come from a page of ours.

    It is the outermost layer: Starlette raises an exception again after it has answered with an
    error page, and it is logged here.
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

        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        app = self._app
        if not self._is_ours(headers.get(b"host", "")):
            app = Response("This host name is not one of this relay.\n", 421)
        elif scope["method"] not in SAFE and _is_foreign(headers):
            app = Response("This request comes from another site.\n", 403)
        try:
            await app(scope, receive, send_with_headers)
        except Exception as error:
            if is_outage(error):
                log.warning(
                    "page unavailable", reason=first_line(getattr(error, "orig", None) or error)
                )
            else:
                log.exception("page failed")

    def _is_ours(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name.lower() in self._names
        return True


def _is_foreign(headers: dict[bytes, str]) -> bool:
    """Whether a browser says that the page of another site made this request. Programs that are no
    browsers send neither header."""
    if (site := headers.get(b"sec-fetch-site")) is not None:
        return site not in ("same-origin", "none")
    origin = headers.get(b"origin")
    return origin is not None and urlsplit(origin).netloc != headers.get(b"host")
