"""The HTTP server of the metrics, with a limit on its threads and on the time of a request.

Each request has a thread. A request that is not finished after TIMEOUT seconds, from its first byte
to the last byte of the response, is closed. While THREADS requests are open, others get 503.
Without these limits a peer that opens connections and sends nothing would start a thread for each
of them. With TLS the handshake is a part of the request, and others are closed without a response.
"""

import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from relay.log import first_line, get_logger

THREADS = 8
TIMEOUT = 10.0
_BUSY = b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"

log = get_logger(__name__)


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Log nothing: a scrape is not an event."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 64

    tls_context: Callable[[], ssl.SSLContext] | None = None

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self._deadlines: dict[socket.socket, float] = {}  # of the requests that have a thread
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._deadlines) < THREADS:
            self._deadlines[request] = time.monotonic() + TIMEOUT
            super().process_request(request, client_address)
            return
        with suppress(OSError):
            if self.tls_context is None:
                request.send(_BUSY)  # the buffer of a new connection is empty
        self.shutdown_request(request)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Runs in the thread of the request; an OSError of the handshake is one of the peer."""
        if self.tls_context is None:
            super().finish_request(request, client_address)
            return
        # `request` stays open, because the deadline and `shutdown_request` use it.
        with request.dup() as plain, self.tls_context().wrap_socket(plain, server_side=True) as tls:
            super().finish_request(tls, client_address)

    def shutdown_request(self, request: Any) -> None:
        """The request has ended."""
        self._deadlines.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Close requests that are past their deadline; called after each request, and twice a
        second."""
        now = time.monotonic()
        for request, deadline in self._deadlines.copy().items():
            if now > deadline:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The peer has disconnected, or took too long."""
        log.debug("scrape aborted", reason=first_line(sys.exception()))


def listen(
    host: str, port: int, tls_context: Callable[[], ssl.SSLContext] | None = None
) -> WSGIServer:
    """Serve the metrics on an address (an empty host: every IPv4 address), over TLS with the
    context that the function returns; raises OSError if it is in use."""
    host = host or "0.0.0.0"  # noqa: S104  (an empty host in RELAY_METRICS_LISTEN means every address)
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    server = make_server(str(addresses[0][4][0]), port, make_wsgi_app(), _Server, _Handler)
    server.tls_context = tls_context
    threading.Thread(target=server.serve_forever, name="metrics listener", daemon=True).start()
    return server
