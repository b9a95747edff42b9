"""A receiver of webhooks for tests: it verifies each request with the library, and answers as told.

It serves HTTP/1.1 on a thread, keeps connections, and remembers what it got. `answer` is asked
before each reply: status and headers, or None to close the connection without one.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from standardwebhooks.webhooks import Webhook as Verifier

SECRET = "whsec_" + "c2VjcmV0IG9mIHRoZSB0ZXN0cyBvZiBldmVudHM="
OTHER_SECRET = "whsec_" + "YW5vdGhlciBzZWNyZXQgb2YgdGhlIHRlc3RzIG8="
OK: Mapping[str, str] = {}
type Reply = tuple[int, Mapping[str, str]]


@dataclass(slots=True)
class ReceivedEvent:
    """One request whose signature is valid."""

    id: str
    type: str
    data: dict[str, Any]
    status: int | None


@dataclass
class WebhookReceiver:
    """What came, and what is answered."""

    port: int = 0
    secret: str = SECRET
    answer: Callable[[str, dict[str, Any]], Reply | None] = lambda _id, _data: (200, OK)
    received: list[ReceivedEvent] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)
    connections: int = 0
    most_at_once: int = 0
    overlapping: list[str] = field(default_factory=list)
    _busy: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/events"

    def write_file(self, directory: Path, extra: str = "", *, name: str = "billing") -> Path:
        """A RELAY_WEBHOOKS file with this receiver."""
        secret = directory / "webhook.secret"
        secret.write_text(f"{self.secret}\n")
        file = directory / "webhooks.toml"
        file.write_text(
            f'[[webhook]]\nname = "{name}"\nurl = "{self.url}"\nsecret_file = "{secret}"\n{extra}'
        )
        return file

    def begin(self, queue_id: str) -> None:
        with self._lock:
            if queue_id in self._busy:
                self.overlapping.append(queue_id)
            self._busy.append(queue_id)
            self.most_at_once = max(self.most_at_once, len(self._busy))

    def end(self, queue_id: str) -> None:
        with self._lock:
            self._busy.remove(queue_id)

    def firsts(self) -> list[ReceivedEvent]:
        """What arrived, each event once: the first time that it was answered by 2xx."""
        seen: dict[str, ReceivedEvent] = {}
        for one in self.received:
            if one.status is not None and one.status < 300:
                seen.setdefault(one.id, one)
        return list(seen.values())


@contextmanager
def running_receiver(port: int = 0, **given: Any) -> Iterator[WebhookReceiver]:
    """A receiver that runs meanwhile."""
    receiver = WebhookReceiver(**given)

    class ReceiverHandler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            receiver.connections += 1

        def do_POST(self) -> None:
            size = int(self.headers["content-length"])
            body = self.rfile.read(size)
            if len(body) < size:  # its sender was killed while it sent
                self.close_connection = True
                return
            try:
                event = Verifier(receiver.secret).verify(body, dict(self.headers))
            except Exception as error:
                receiver.invalid.append(repr(error))
                self.send_error(400)
                return
            data, event_id = event["data"], self.headers["webhook-id"]
            assert json.loads(body) == event
            receiver.begin(data.get("queue_id", ""))
            try:
                reply = receiver.answer(event_id, data | {"type": event["type"]})
            finally:
                receiver.end(data.get("queue_id", ""))
            receiver.received.append(
                ReceivedEvent(event_id, event["type"], data, reply[0] if reply else None)
            )
            if reply is None:
                self.close_connection = True
                return
            status, headers = reply
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_: Any) -> None:
            """Nothing: pytest shows what fails."""

    class ReceiverServer(ThreadingHTTPServer):
        request_queue_size = 64
        daemon_threads = True

    server = ReceiverServer(("127.0.0.1", port), ReceiverHandler)
    receiver.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
