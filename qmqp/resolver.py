"""Looks up the addresses of a host name, once for all connections that ask at the same time.

A lookup takes as long as the resolver likes and cannot be cancelled. Each name is therefore looked
up in a thread of its own, and all connections to that name wait for the same result. The threads of
an event loop are few: with them, one name server that does not answer would block every other name.
Addresses are cached for CACHE_TTL, so that a busy client does not ask for every message and a
change of the DNS is soon seen.

What must stay true: a connection waits only for the name that it asked for; a failure is not
cached.
"""

import asyncio
import socket
import threading
from time import monotonic
from typing import Any

CACHE_TTL = 5.0  # seconds

type Address = tuple[int, Any]  # family, and the argument of connect()
type Lookup = list[Address] | Exception

cache: dict[tuple[str, int], tuple[float, list[Address]]] = {}
_pending: dict[tuple[asyncio.AbstractEventLoop, str, int], asyncio.Future[Lookup]] = {}


def lookup(host: str, port: int) -> asyncio.Future[Lookup]:
    """The addresses of a name in the resolver's order, or the OSError or UnicodeError instead.

    Several connections may wait for the same future: do not cancel it."""
    loop = asyncio.get_running_loop()
    result = _pending.get((loop, host, port))
    if result is None:
        result = loop.create_future()
        looked_up_at, addresses = cache.get((host, port), (0.0, []))
        if addresses and monotonic() - looked_up_at < CACHE_TTL:
            result.set_result(addresses)
        else:
            _pending[loop, host, port] = result
            threading.Thread(
                target=_look_up, args=(loop, host, port), name=f"resolver {host}", daemon=True
            ).start()
    return result


def _look_up(loop: asyncio.AbstractEventLoop, host: str, port: int) -> None:
    result: Lookup
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        result = list(dict.fromkeys((int(info[0]), info[4]) for info in infos))
        cache[host, port] = monotonic(), result
    except (OSError, UnicodeError) as error:
        result = error
    future = _pending.pop((loop, host, port))
    if not loop.is_closed():
        loop.call_soon_threadsafe(future.set_result, result)
