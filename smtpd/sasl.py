"""SASL (RFC 4422) in SMTP AUTH (RFC 4954): the mechanisms as state machines without I/O.

An `Exchange` gets the client's responses and gives back challenges, and in the end the
credentials. A mechanism is a generator that yields challenges and is sent responses. PLAIN is RFC
4616; LOGIN is an expired draft that many programs still use. Both send the password itself, so the
session offers them only where no third party can read it.

What must stay true: a response that cannot be read ends the exchange with 501 and says nothing of
its content; no user acts as another.
"""

from base64 import b64decode, b64encode
from binascii import Error
from collections.abc import Callable, Generator, Mapping

from reception.envelope import Refused
from reception.login import Credentials

RESPONSE_LIMIT = 12288
"""Octets of a response with its CRLF (RFC 4954, 4)."""

_UNREADABLE = "501 5.5.2 Cannot decode the response"

type _Steps = Generator[str, str, Credentials]


def _plain() -> _Steps:
    response = yield ""
    acts_as, *rest = response.split("\0")
    if len(rest) != 2 or not all(rest):
        raise Refused(_UNREADABLE)
    name, password = rest
    if acts_as not in ("", name):
        raise Refused("535 5.7.8 A user cannot act as another one")
    return Credentials("PLAIN", name, password)


def _login() -> _Steps:
    name = yield "Username:"
    password = yield "Password:"
    if not name or not password or "\0" in name + password:
        raise Refused(_UNREADABLE)
    return Credentials("LOGIN", name, password)


MECHANISMS: Mapping[bytes, Callable[[], _Steps]] = {b"PLAIN": _plain, b"LOGIN": _login}


class Exchange:
    """One exchange of a client that named this mechanism; raises Refused for an unknown one."""

    def __init__(self, mechanism: bytes) -> None:
        begin = MECHANISMS.get(mechanism.upper())
        if begin is None:
            raise Refused("504 5.5.4 Mechanism not recognized")
        self._steps = begin()
        self._challenge = next(self._steps)

    def start(self, initial: bytes | None) -> str | Credentials:
        """The first reply 334, or the credentials if the initial response has them all; `=` is an
        empty one. Raises Refused."""
        if initial is None:
            return self._reply()
        return self._advance(b"" if initial == b"=" else initial)

    def respond(self, line: bytes) -> str | Credentials:
        """The next reply 334 after a response (without its CRLF), or the credentials. Raises
        Refused, also for `*`, by which a client cancels."""
        if line == b"*":
            raise Refused("501 5.7.0 Authentication cancelled")
        return self._advance(line)

    def _advance(self, response: bytes) -> str | Credentials:
        try:
            text = b64decode(response, validate=True).decode()
        except (Error, UnicodeDecodeError):
            raise Refused(_UNREADABLE) from None
        try:
            self._challenge = self._steps.send(text)
        except StopIteration as end:
            credentials: Credentials = end.value
            return credentials
        return self._reply()

    def _reply(self) -> str:
        return f"334 {b64encode(self._challenge.encode()).decode()}"
