"""A QMQP server that keeps a request until the test lets it go on."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class GatedServer:
    """A QMQP server that reads `most` bytes of one request and replies K when the test opens it."""

    def __init__(self, most: int = 1 << 40) -> None:
        self._listener, self._most = socket.socket(), most
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.port = self._listener.getsockname()[1]
        self.reached, self.open = threading.Event(), threading.Event()
        self.taken = 0  # whole requests
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            while not self.reached.is_set():
                with self._listener.accept()[0] as connection:
                    self._reply(connection)

    def _reply(self, connection: socket.socket) -> None:
        """A connection on which nothing comes is not the request: its worker had no lease."""
        with suppress(ConnectionError):
            if not (data := connection.recv(4096)):
                return
            length = int(data.partition(b":")[0]) + len(data.partition(b":")[0]) + 2
            got = len(data)
            while got < min(length, self._most):
                if not (more := connection.recv(65536)):
                    return
                got += len(more)
            self.taken += got == length
            self.reached.set()
            self.open.wait()
            connection.sendall(b"3:KOk,")
            connection.recv(1)

    def close(self) -> None:
        self.open.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


@contextmanager
def gated_server() -> Iterator[GatedServer]:
    """A server that replies and ends with the test."""
    server = GatedServer()
    try:
        yield server
    finally:
        server.close()
