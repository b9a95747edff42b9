"""A session in a test: an SMTP client that talks to the relay with your plugins in it.

    from qmqp_relay.testing import plugin_session

    def test_spam_is_refused():
        with plugin_session("./plugins/spam.py limit=5") as client:
            assert client.send("Subject: spam\\n\\nbuy!\\n").startswith("550 5.7.1")
            assert client.message is None

The session, the receiver and the hooks are those of smtpd, over a real socket. What is missing is
what follows: a message that is accepted goes to no journal and to no queue, but to `messages`.
Needs no database and no broker. What a plugin logs goes to standard error.
"""

import asyncio
import json
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email import message_from_bytes, policy
from email.message import EmailMessage
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from plugins.loader import load
from plugins.runner import Plugins
from reception.hooks import HookHost
from reception.policy import Policy
from reception.receiver import DiskThreads, Receiver
from reception.server import Door, FrontEnd
from relay.listeners import Listener
from relay.settings import SmtpdSettings
from relay.settings import load as load_settings
from relay.spool.store import Spool
from smtpd.server import SmtpConnection

HOSTNAME = "relay.example"
TIMEOUT = 60.0
"""Seconds that the client waits for a reply."""


@dataclass(frozen=True)
class AcceptedMessage:
    """A message as it would be stored. `content` is what a QMQP server would get: it begins with
    the fields that plugins have added. `routes` are those of the recipients; `hold_reason` is None
    unless a plugin holds the message."""

    queue_id: str
    sender: str
    recipients: list[str]
    routes: list[str]
    content: bytes
    hold_reason: str | None

    @cached_property
    def header(self) -> EmailMessage:
        """The header, parsed."""
        return message_from_bytes(self.content, policy=policy.default)


class PluginClient:
    """The client of a session. A reply is its text: its lines without the CR LF at the end.

    `banner` is the reply to the connection; `messages` are those that were accepted, `message` the
    last of them.
    """

    def __init__(self, address: tuple[str, int], messages: list[AcceptedMessage]) -> None:
        self.messages = messages
        self._socket = socket.create_connection(address, timeout=TIMEOUT)
        self._file = self._socket.makefile("rb")
        self.banner = self._reply()

    @property
    def message(self) -> AcceptedMessage | None:
        """The last message that was accepted."""
        return self.messages[-1] if self.messages else None

    def helo(self, name: str = "client.example") -> str:
        """EHLO; its reply."""
        return self.command(f"EHLO {name}")

    def mail(self, sender: str = "ann@example.com", parameters: str = "") -> str:
        """MAIL; its reply."""
        return self.command(f"MAIL FROM:<{sender}> {parameters}".rstrip())

    def rcpt(self, recipient: str = "bob@example.org", parameters: str = "") -> str:
        """RCPT; its reply."""
        return self.command(f"RCPT TO:<{recipient}> {parameters}".rstrip())

    def data(self, content: str | bytes) -> str:
        """DATA, and after a 354 the content, with LF or CR LF line ends; the last reply."""
        reply = self.command("DATA")
        if not reply.startswith("354"):
            return reply
        octets = content.encode() if isinstance(content, str) else content
        lines = octets.replace(b"\r\n", b"\n").split(b"\n")
        if lines[-1] == b"":
            lines.pop()
        stuffed = [b"." + line if line.startswith(b".") else line for line in lines]
        self._socket.sendall(b"\r\n".join([*stuffed, b".", b""]))
        return self._reply()

    def send(
        self,
        content: str | bytes = "Subject: test\n\nhello\n",
        *,
        sender: str = "ann@example.com",
        recipients: tuple[str, ...] = ("bob@example.org",),
    ) -> str:
        """A whole message, from EHLO on; the reply to its content, or the first refusal."""
        steps: list[Callable[[], str]] = [self.helo, partial(self.mail, sender)]
        steps += [partial(self.rcpt, recipient) for recipient in recipients]
        reply = self.banner
        for step in steps:
            if not reply.startswith("2"):
                return reply
            reply = step()
        return self.data(content) if reply.startswith("2") else reply

    def command(self, line: str) -> str:
        """Any command; its reply."""
        self._socket.sendall(line.encode() + b"\r\n")
        return self._reply()

    def close(self) -> None:
        """Closes the connection, without QUIT."""
        self._file.close()
        self._socket.close()

    def _reply(self) -> str:
        lines = []
        while True:
            line = self._file.readline().decode("ascii").removesuffix("\r\n")
            if not line:
                raise ConnectionError("the server has closed the connection without a reply")
            lines.append(line)
            if line[3:4] != "-":
                return "\n".join(lines)


@contextmanager
def plugin_session(plugins: str, **settings: Any) -> Iterator[PluginClient]:
    """A session with plugins, which are written as in RELAY_PLUGINS. `settings` are those of the
    relay, in small letters and without RELAY_. Raises SettingsError if a plugin cannot be
    loaded."""
    with tempfile.TemporaryDirectory() as directory:
        made = load_settings(
            SmtpdSettings,
            **{"hostname": HOSTNAME, "state_dir": Path(directory), "plugins": plugins} | settings,
        )
        loaded = load(made)
        server = _PluginServer(made, loaded)
        try:
            client = PluginClient(server.address, server.messages)
            try:
                yield client
            finally:
                client.close()
        finally:
            server.close()


class _Accepting:
    """Takes the place of the spooler: messages are accepted, and stay in memory."""

    def __init__(self, spool: Spool, messages: list[AcceptedMessage]) -> None:
        self._spool = spool
        self._messages = messages

    def store(
        self,
        queue_id: str,
        rows: bytes,
        _routes: tuple[str, ...],
        size: int,
        body: list[bytes] | None,
        done: Callable[[None], object],
    ) -> int:
        (message,), recipients, deliveries = (
            json.loads(f"[{line}]") for line in rows.decode().split("\n")
        )
        stored = self._spool.path(queue_id).read_bytes()[:size] if body is None else b"".join(body)
        routes = {one["number"]: one["route"] for one in deliveries}
        self._messages.append(
            AcceptedMessage(
                queue_id,
                message["sender"],
                [one["address"] for one in recipients],
                [routes[one["delivery"]] for one in recipients],
                message.get("prefix", "").encode() + stored,
                deliveries[0].get("hold_reason"),
            )
        )
        done(None)
        return 1

    def withdraw(self, _number: int) -> bool:
        return False

    def check_deadlines(self, _now: float) -> None:
        """A message is stored at once."""


class _PluginServer:
    """A front end in a thread."""

    def __init__(self, settings: SmtpdSettings, plugins: Plugins | None) -> None:
        self.messages: list[AcceptedMessage] = []
        self.address = ("", 0)
        self._settings, self._plugins = settings, plugins
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="plugin-session")
        self._thread.start()
        self._ready.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        settings = self._settings
        settings.spool_dir.mkdir(parents=True, exist_ok=True)
        spool = Spool(settings.spool_dir)
        spooler: Any = _Accepting(spool, self.messages)
        threads = DiskThreads(2)
        receiver = Receiver(
            spool, spooler, lambda _: "default", settings, threads, asyncio.Semaphore(8)
        )
        unused: Any = None  # there are no users
        hooks = HookHost(self._plugins, lambda: ("default",)) if self._plugins else None
        server = FrontEnd(
            self._loop, settings, receiver, lambda: settings.max_message_size, unused, hooks=hooks
        )
        door = Door("smtp", "RELAY_SMTP_LISTEN", Policy(settings), SmtpConnection)
        [address] = await server.listen(door, [Listener("127.0.0.1", 0)])
        host, _, port = address.rpartition(":")
        self.address = (host, int(port))
        self._ready.set()
        await self._stop.wait()
        await server.stop(0.0)
        if hooks is not None:
            await hooks.stop()
        await asyncio.to_thread(threads.close, TIMEOUT)
