"""The size limit that smtpd offers follows the routes, also while it runs, and a real Postfix obeys
it."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qmqp.client import SendOutcome
from reception.authentication import Authenticator
from reception.policy import Policy
from reception.server import Door, FrontEnd
from reception.spooler_client import SpoolerClient
from relay import routes as module
from relay.listeners import Listener, parse_listen
from relay.routes import Route, Routes
from relay.settings import SmtpdSettings, load
from smtpd.main import offered_size
from smtpd.server import SmtpConnection
from tests.integration.test_client_against_postfix import HEADER, Deliver, deliver
from tests.postfix import Postfix
from tests.services import ServiceError

__all__ = ["deliver"]  # a fixture
ROUTE = '[small]\nrecipients = ["small.example"]\nservers = ["a"]\nmax_size = "%s"\n'


async def never(_: object) -> None:
    """No spooler is launched here: no message comes."""


async def say(port: int, *lines: str) -> list[str]:
    """The replies of the server to each line, after the banner."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    replies = []
    for line in ("", *lines):
        writer.write(f"{line}\r\n".encode() if line else b"")
        reply = ""
        while not reply or reply.splitlines()[-1][3] == "-":
            reply += (await asyncio.wait_for(reader.readline(), 10)).decode()
        replies.append(reply)
    writer.close()
    return replies[1:]


def test_C13_SIZE_follows_the_routes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_INTERVAL", 0.0)
    monkeypatch.setattr(module, "STABLE_FOR", 0.0)
    file = tmp_path / "routes.toml"
    file.write_text(ROUTE % "1M")
    settings = load(
        SmtpdSettings,
        routes=file,
        spool_dir=tmp_path,
        max_message_size=1 << 30,
        hostname="relay.example",
        smtp_timeout=60.0,
    )
    routes = Routes.load(settings)
    offered = offered_size(settings.max_message_size, routes)
    assert offered == (1 << 20) - (1 << 20) // 20 - 4096

    async def scenario() -> None:
        smtp = Door("smtp", "RELAY_SMTP_LISTEN", Policy(settings), SmtpConnection)
        receiver = SimpleNamespace(
            spooler=SpoolerClient(never, lambda _ids, _route, _early: None, 60.0)
        )
        server = FrontEnd(
            asyncio.get_running_loop(),
            settings,
            cast(Any, receiver),
            lambda: offered_size(settings.max_message_size, routes),
            Authenticator(asyncio.get_running_loop(), settings.database_url),
        )
        [address] = await server.listen(smtp, [Listener("127.0.0.1", 0)])
        port = parse_listen(address)[1]
        hello, big, fits = await say(
            port,
            "EHLO client",
            f"MAIL FROM:<a@b.example> SIZE={offered + 1}",
            f"MAIL FROM:<a@b.example> SIZE={offered}",
        )
        assert f"SIZE {offered}\r\n" in hello
        assert (big[:3], fits[:3]) == ("552", "250")
        file.write_text(ROUTE % "2M")
        os.utime(file, ns=(1, 1))
        server.tick()
        (hello,) = await say(port, "EHLO client")
        assert f"SIZE {(2 << 20) - (2 << 20) // 20 - 4096}\r\n" in hello
        file.write_text("[broken")
        server.tick()
        (again,) = await say(port, "EHLO client")
        assert again == hello
        await server.stop(0.0)

    asyncio.run(scenario())


# Postfix' own default, and one so small that what each message costs counts as well.
@pytest.fixture(scope="module", params=[10_240_000, 200_000])
def postfix(request: pytest.FixtureRequest) -> Iterator[Postfix]:
    try:
        made = Postfix(size_limit=request.param)
        made.start()
    except ServiceError as error:
        pytest.skip(str(error))
    yield made
    made.stop()


@pytest.mark.parametrize("width", [20, 40, 60, 76, 998])
def test_Postfix_takes_what_is_offered(postfix: Postfix, deliver: Deliver, width: int) -> None:
    """Postfix counts more octets than the relay, for each line and recipient; a message above its
    limit bounces."""
    offered = offered_size(1 << 40, Routes([Route("r", (), max_size=postfix.size_limit)]))
    line = b"x" * width + b"\n"
    body = HEADER + b"\n" + line * ((offered - len(HEADER) - 1) // len(line))
    recipients = [b"recipient%d@example.org" % n for n in range(10)]
    result = deliver(postfix.port, body, *recipients)
    assert result.outcome is SendOutcome.DELIVERED, result.text
    over = deliver(
        postfix.port, body + line * ((postfix.size_limit - offered) // len(line)), *recipients
    )
    assert over.outcome is SendOutcome.REJECTED, "as it does with any larger one"
