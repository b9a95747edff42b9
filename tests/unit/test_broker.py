"""RELAY_BROKER_URL means the same to publishers (redis-py) and to Celery's workers (kombu)."""

import ssl
import subprocess
import sys
from typing import Any

import pytest
from kombu import Connection
from redis.connection import SSLConnection, UnixDomainSocketConnection, parse_url

from relay.broker import celery_url, redis_url


def for_redis(url: str) -> dict[str, Any]:
    """What redis-py makes of an address."""
    return dict(parse_url(redis_url(url)))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://[::1]:6380/3",
        "redis://:p%40ss@host:6379/0",
        "redis://user:p%2Fss@host:6379/12",
    ],
)
def test_an_address_is_the_same_for_both(url: str) -> None:
    ours, theirs = for_redis(url), Connection(celery_url(url))
    assert ours.get("host") == theirs.hostname
    assert ours.get("port", 6379) == (theirs.port or 6379)
    assert ours.get("db", 0) == int(theirs.virtual_host.strip("/") or 0)
    assert (ours.get("username"), ours.get("password")) == (theirs.userid, theirs.password)
    assert not theirs.ssl


def test_a_socket_may_have_a_database() -> None:
    parsed = for_redis("redis+socket:///run/b.sock?virtual_host=2")
    assert (parsed["path"], parsed["db"]) == ("/run/b.sock", 2)
    assert parsed["connection_class"] is UnixDomainSocketConnection


@pytest.mark.parametrize(
    ("query", "verifies"),
    [
        ("", True),
        ("?ssl_ca_certs=/etc/ca.pem", True),
        ("?ssl_cert_reqs=required", True),
        ("?ssl_cert_reqs=CERT_REQUIRED", True),
        ("?ssl_cert_reqs=none", False),
        ("?ssl_cert_reqs=CERT_NONE", False),
    ],
)
def test_both_verify_a_certificate_unless_the_url_says_no(query: str, *, verifies: bool) -> None:
    url = f"rediss://host:6379/0{query}"
    ours = for_redis(url)
    assert ours["connection_class"] is SSLConnection
    assert ours.get("ssl_cert_reqs", "required") == ("required" if verifies else "none")
    theirs: Any = Connection(celery_url(url)).ssl
    assert theirs["ssl_cert_reqs"] is (ssl.CERT_REQUIRED if verifies else ssl.CERT_NONE)
    assert theirs.get("ssl_ca_certs") == ours.get("ssl_ca_certs")


def test_smtpd_needs_no_celery() -> None:
    code = "import sys, smtpd.main; sys.exit(bool({'celery', 'kombu'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
