"""The page and the metrics over TLS: smtpd, a worker and `web` as processes, beyond loopback."""

import ssl
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.acceptance.installation import Install
from tests.acceptance.stack import STARTING
from tests.certificates import Authority
from tests.services import free_port
from tests.waiting import until


def fetched(url: str, context: ssl.SSLContext | None = None) -> bytes:
    """The body, or empty while nothing listens."""
    try:
        with urllib.request.urlopen(url, timeout=10, context=context) as answer:
            return bytes(answer.read())
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionRefusedError):
            return b""
        raise


@pytest.mark.timeout(240)  # it starts five programs, one after the other
def test_page_and_metrics_have_the_certificate_of_smtpd(install: Install, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.sign("127.0.0.1").write(tmp_path / "tls")
    context = authority.client_context()
    first, second, page = (free_port() for _ in range(3))
    relay = install(
        "sqlite",
        TLS_CERTIFICATE=str(certificate),
        TLS_KEY=str(key),
        METRICS_LISTEN=f"0.0.0.0:{first} 0.0.0.0:{second}",
        WEB_LISTEN=f"0.0.0.0:{page}",
    )
    relay.smtpd()
    relay.worker()
    web = relay.begin("commands.cli.start", "web")
    addresses = {
        f"127.0.0.1:{first}/metrics": b"relay_tls_certificate_days",
        f"127.0.0.1:{second}/metrics": b"relay_tls_certificate_days",
        f"127.0.0.1:{page}/": b"<html",
    }
    for address, expected in addresses.items():
        body = until(
            lambda a=address: fetched(f"https://{a}", context),  # type: ignore[misc]
            STARTING,
            what=relay.log_text,
        )
        assert expected in body
        with pytest.raises(OSError, match=r"."):
            urllib.request.urlopen(f"http://{address}", timeout=10)
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            fetched(f"https://{address}")
    relay.end(web)
    port = free_port()
    relay.begin("commands.cli.start", "web", WEB_LISTEN=f"127.0.0.1:{port}")
    body = until(lambda: fetched(f"http://127.0.0.1:{port}/"), STARTING, what=relay.log_text)
    assert b"<html" in body, "on loopback it stays plain"
