"""A broker that lies: it listens where the broker did and answers with nonsense."""

import random
import socket
from pathlib import Path
from threading import Thread

_LIES = (
    b"+OK\r\n",
    b"-ERR I do not feel like it\r\n",
    b":99999999\r\n",
    b"$5\r\nab",
    b"*3\r\n$3\r\nabc\r\n:1\r\n",
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"*2\r\n$18\r\nqmqp-relay:fresh\r\n$4\r\nnull\r\n",
    b"",
)


class LyingBroker:
    """Answers each request on the Unix socket `path` with a lie, or closes. `count`: its lies."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.count = 0
        self._rng = rng
        path.unlink(missing_ok=True)
        self._listener = socket.create_server(str(path), family=socket.AF_UNIX)
        self._path = path
        self._clients: list[socket.socket] = []
        self._threads = [Thread(target=self._accept, name="liar", daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for client in self._clients:
            with client:
                _shut(client)
        for thread in self._threads:
            thread.join()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            self._clients.append(client)
            thread = Thread(target=self._lie, args=(client,), name="liar", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _lie(self, client: socket.socket) -> None:
        try:
            while client.recv(65536):
                lie = self._rng.choice((*_LIES, self._rng.randbytes(20)))
                self.count += 1
                if not lie:
                    break
                client.sendall(lie)
        except OSError:  # the client has gone
            return
        _shut(client)


def _shut(client: socket.socket) -> None:
    try:
        client.shutdown(socket.SHUT_RDWR)
    except OSError:  # it is closed already
        return
