"""The addresses of names, looked up once for all who ask at about the same time.

How it works. A look-up may take as long as the resolver likes and cannot be called off, so it runs
in a thread of its own: one for a name, however many transfers wait for it. Event loops have a few
threads for this and would let one name server that does not answer hold up every other name. What
was found is used for FRESH seconds, so that a busy client does not ask for each message, and a
change is seen at once for all that matters.

What must stay true: nothing waits for a look-up but those who asked for that name; a failure is not
remembered.
"""

import asyncio
import socket
import threading
from time import monotonic
from typing import Any

FRESH = 5.0  # seconds

type Address = tuple[int, Any]  # family, and what connect() wants
type Found = list[Address] | Exception

_known: dict[tuple[str, int], tuple[float, list[Address]]] = {}
_asked: dict[tuple[asyncio.AbstractEventLoop, str, int], asyncio.Future[Found]] = {}


def addresses(host: str, port: int) -> asyncio.Future[Found]:
    """The addresses of a name, in the resolver's order, or the OSError or UnicodeError that there
    are instead.

    Others wait for the same future: do not cancel it."""
    loop = asyncio.get_running_loop()
    answer = _asked.get((loop, host, port))
    if answer is None:
        answer = loop.create_future()
        moment, found = _known.get((host, port), (0.0, []))
        if found and monotonic() - moment < FRESH:
            answer.set_result(found)
        else:
            _asked[loop, host, port] = answer
            threading.Thread(
                target=_ask, args=(loop, host, port), name=f"resolver {host}", daemon=True
            ).start()
    return answer


def _ask(loop: asyncio.AbstractEventLoop, host: str, port: int) -> None:
    found: Found
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        found = list(dict.fromkeys((int(info[0]), info[4]) for info in infos))
        _known[host, port] = monotonic(), found
    except (OSError, UnicodeError) as error:
        found = error
    answer = _asked.pop((loop, host, port))
    if not loop.is_closed():
        loop.call_soon_threadsafe(answer.set_result, found)
