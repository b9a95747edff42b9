"""smtpd behind a real HAProxy, which sends PROXY headers of version 1 or 2."""

import shutil
import signal
import smtplib
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from relay.db.engine import connect, reading
from tests.acceptance.stack import command, relay_environ
from tests.acceptance.test_health import check
from tests.certificates import Authority
from tests.services import end, free_port
from tests.waiting import until

HAPROXY = """\
defaults
  mode tcp
  timeout connect 5s
  timeout client 60s
  timeout server 60s
listen smtp
  bind 127.0.0.1:{front}
  server relay 127.0.0.1:{port} {option} check check-send-proxy inter 100
listen smtps
  bind 127.0.0.1:{tls_front}
  server relay 127.0.0.1:{tls_port} {option}
"""
CLIENT, STRANGER = "127.0.0.2", "127.0.0.3"


class Balanced:
    """smtpd, and HAProxy before it: `front` in plain text, `tls_front` for implicit TLS."""

    def __init__(self, option: str, directory: Path, spawn: Callable[..., Any]) -> None:
        program = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin")
        if program is None:
            pytest.skip("no haproxy on this machine")
        self.port, self.tls_port, self.front, self.tls_front = (free_port() for _ in range(4))
        self.authority = Authority(directory)
        certificate, key = self.authority.sign("localhost").write(directory / "tls")
        self.listen = f"127.0.0.1:{self.port}/proxy, 127.0.0.1:{self.tls_port}/proxy/tls"
        settings = {
            "STATE_DIR": str(directory / "var"),
            "SMTP_LISTEN": self.listen,
            "PROXY_NETWORKS": "127.0.0.1",
            "CLIENT_NETWORKS": CLIENT,
            "TLS_CERTIFICATE": str(certificate),
            "TLS_KEY": str(key),
            "LOG_FORMAT": "json",
        }
        assert command("migrate", **settings).returncode == 0
        self.log = directory / "log"
        with self.log.open("wb") as output:
            self.smtpd = spawn(
                [sys.executable, "-m", "commands.cli.start", "smtpd"],
                env=relay_environ(**settings),
                stderr=output,
            )
        until(lambda: "listening" in self.log.read_text(), 60, what=self.log.read_text)
        configuration = directory / "haproxy.cfg"
        configuration.write_text(HAPROXY.format_map({**vars(self), "option": option}))
        spawn([program, "-db", "-f", configuration])
        until(lambda: _accepts(self.front), 20, what="haproxy listens")
        self.database = f"sqlite:///{directory}/var/relay.db"

    def rows(self) -> list[Any]:
        engine = connect(self.database)
        with reading(engine) as connection:
            query = "SELECT client_address, protocol, client_trusted FROM messages ORDER BY id"
            rows = [tuple(row) for row in connection.execute(text(query))]
        engine.dispose()
        return rows


def _accepts(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(params=["send-proxy", "send-proxy-v2"])
def balanced(
    request: pytest.FixtureRequest, tmp_path: Path, spawn: Callable[..., subprocess.Popen[Any]]
) -> Balanced:
    return Balanced(request.param, tmp_path, spawn)


def test_clients_behind_haproxy_keep_their_addresses(balanced: Balanced) -> None:
    for _ in range(3):
        with smtplib.SMTP("127.0.0.1", balanced.front, source_address=(CLIENT, 0)) as client:
            client.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\n")
    with smtplib.SMTP_SSL(
        "localhost",
        balanced.tls_front,
        context=balanced.authority.client_context(),
        source_address=(CLIENT, 0),
    ) as client:
        client.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\n")
    with smtplib.SMTP("127.0.0.1", balanced.front, source_address=(STRANGER, 0)) as client:
        with pytest.raises(smtplib.SMTPRecipientsRefused) as refused:
            client.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\n")
        assert refused.value.recipients["b@example.org"][0] == 554
    until(lambda: len(balanced.rows()) >= 4, what="their rows")
    assert balanced.rows() == [(CLIENT, "ESMTP", 1)] * 3 + [(CLIENT, "ESMTPS", 1)]
    assert '"accepted"' in balanced.log.read_text()
    assert f'"client": "{CLIENT}"' in balanced.log.read_text()
    healthy = check("smtp", RELAY_SMTP_LISTEN=balanced.listen)
    assert healthy.returncode == 0, healthy.stdout
    with socket.create_connection(
        ("127.0.0.1", balanced.port), timeout=10, source_address=(CLIENT, 0)
    ) as direct:
        assert direct.recv(100) == b"", "only the balancer may connect"
    assert end(balanced.smtpd, signal.SIGTERM) == 0
