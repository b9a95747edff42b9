"""Logging in to the page, and out.

The authenticator of smtpd verifies the password: it limits the failures of a client, and answers a
wrong password late. What must stay true: the cookie is unreadable for scripts, is not sent by other
sites, and over TLS never without it; the form leads back only to a page of ours.
"""

from http import HTTPStatus
from urllib.parse import quote, urlencode

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from commands.web.access import COOKIE, Access, LoginNeeded, Visitor
from commands.web.forms import read_form
from commands.web.pages import Pages
from reception.login import Login
from relay.log import get_logger

# The status and the text for the reply of SMTP that refuses a login, by its first digits.
_REFUSALS = {
    "535": (HTTPStatus.FORBIDDEN, "The user or the password is wrong, or the user may not use"),
    "421": (HTTPStatus.TOO_MANY_REQUESTS, "Too many logins have failed from your address."),
    "454": (HTTPStatus.SERVICE_UNAVAILABLE, "Logins cannot be verified now. Try again later."),
}
_AFTER = {"535": " this page.", "421": " Try again in a minute."}

log = get_logger(__name__)


class Sessions:
    """The form of the login, and what it does."""

    def __init__(self, access: Access, pages: Pages) -> None:
        self._access, self._pages = access, pages

    def address_for(self, request: Request) -> str:
        """The login that leads back to this page."""
        asked = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return "/login" if asked == "/" else f"/login?{urlencode({'next': asked})}"

    def form(self, request: Request) -> Response:
        """The form."""
        return self._form(request, request.query_params.get("next", "/"))

    async def log_in(self, request: Request) -> Response:
        """Begin a session, or show the form again."""
        form = dict(await read_form(request))
        name, back = form.get("name", "").strip(), form.get("next", "/")
        if not self._access.takes_passwords(request):
            return self._form(request, back, status=HTTPStatus.FORBIDDEN)
        login = await self._access.log_in(request, name, form.get("password", ""))
        if not isinstance(login, Login):
            status, text = _REFUSALS[login[:3]]
            fault = text + _AFTER.get(login[:3], "")
            return self._form(request, back, name=name, fault=fault, status=status)
        log.info("page login", user=login.name)
        response = RedirectResponse(_local(back), HTTPStatus.SEE_OTHER)
        response.set_cookie(
            COOKIE,
            self._access.begin_session(login),
            path="/",
            secure=self._access.is_secure(request),
            httponly=True,
            samesite="strict",
        )
        return response

    async def log_out(self, request: Request) -> Response:
        """End the session."""
        form = dict(await read_form(request))
        try:
            visitor = await run_in_threadpool(self._access.visitor, request)
        except LoginNeeded:
            visitor = Visitor()
        if visitor.session:
            self._access.check_token(visitor, form.get("token", ""))
            self._access.end_session(visitor)
            log.info("page logout", user=visitor.name)
        elif visitor.name:
            raise HTTPException(403, "The proxy logs you in: log out there.")
        response = RedirectResponse("/login", HTTPStatus.SEE_OTHER)
        response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
        return response

    def _form(
        self,
        request: Request,
        back: str,
        *,
        name: str = "",
        fault: str = "",
        status: int = HTTPStatus.OK,
    ) -> Response:
        return self._pages.page(
            "login.html",
            Visitor(),
            status=status,
            takes_passwords=self._access.takes_passwords(request),
            next=_local(back),
            name=name,
            fault=fault,
        )


def _local(address: str) -> str:
    """The address if it is one of ours, else that of the queue."""
    is_ours = address.startswith("/") and not address.startswith(("//", "/\\", "/login"))
    return quote(address, safe="/?=&%*+:@#,.-_~") if is_ours and address.isprintable() else "/"
