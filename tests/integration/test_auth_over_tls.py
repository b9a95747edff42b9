"""AUTH and TLS together: where AUTH is offered, what STARTTLS changes, and real clients
that log in."""

import functools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.listeners import Listener
from tests.certificates import Authority
from tests.integration.front_end import body_of
from tests.integration.test_authentication import RIGHT
from tests.integration.test_smtpd import SmtpHarness, talking
from tests.integration.test_smtpd_auth import PLAIN, run
from tests.integration.test_tls import (
    authority,
    by_postfix,
    command,
    pair,
    smtplib_client,
    speaking_tls,
)

__all__ = ["authority", "pair", "run"]  # fixtures


@pytest.fixture
def serve(run: Callable[..., SmtpHarness], pair: tuple[Path, Path]) -> Callable[..., SmtpHarness]:
    certificate, key = pair
    return functools.partial(
        run, auth_plaintext_networks=(), tls_certificate=certificate, tls_key=key
    )


@pytest.mark.parametrize("implicit", [False, True])
def test_auth_is_offered_after_tls_only(
    serve: Callable[..., SmtpHarness], authority: Authority, implicit: bool
) -> None:
    running = serve(listener=Listener("127.0.0.1", 0, tls=implicit, auth=True))
    if not implicit:
        with talking(running) as client:
            client.expect(b"220")
            client.send(b"EHLO client.example\r\n")
            assert b"AUTH" not in client.reply()
            client.say(PLAIN, b"538 5.7.11")
    with speaking_tls(running, authority.client_context()) as client:
        if implicit:
            client.expect(b"220")
        client.send(b"EHLO client.example\r\n")
        assert b"250-AUTH PLAIN LOGIN\r\n" in client.reply()
        client.say(b"MAIL FROM:<a@example.com>", b"530 5.7.0")
        client.say(PLAIN, b"235")
        client.send(b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n")
        client.expect(b"250", b"250", b"354")
        client.say(b"Subject: x\r\n\r\nbody\r\n.", b"250 2.0.0 Ok: queued")
    [message] = running.messages(1)
    assert (message.protocol, message.auth_user) == ("ESMTPSA", "ann")
    assert message.tls
    assert b"with ESMTPSA id " in body_of(running, message)


def test_starttls_forgets_a_login(serve: Callable[..., SmtpHarness], authority: Authority) -> None:
    running = serve(auth_plaintext_networks=("127.0.0.1",))
    with talking(running) as client:
        client.expect(b"220")
        client.say(b"EHLO client.example", b"250")
        client.say(PLAIN, b"235")
        client.say(b"STARTTLS", b"220 2.0.0")
        client.socket = authority.client_context().wrap_socket(
            client.socket, server_hostname="localhost"
        )
        client.say(b"EHLO client.example", b"250")
        client.say(b"MAIL FROM:<a@example.com>", b"250")
        client.say(b"RCPT TO:<b@example.org>", b"554 5.7.1")
        client.say(b"RSET", b"250")
        client.say(PLAIN, b"235")
    assert RIGHT not in str(running.database.messages)


# --- real clients


def auth_by_openssl(running: SmtpHarness, authority: Authority) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    words = ["openssl", "s_client", "-quiet", "-CAfile", str(authority.bundle)]
    words += ["-verify_return_error", "-connect", f"127.0.0.1:{running.port}"]
    words += [] if running.listener.tls else ["-starttls", "smtp"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        if running.listener.tls:  # it does not wait for the banner
            assert client.stdout.readline().startswith(b"220 ")
        client.stdin.write(b"EHLO client.example\r\n" + PLAIN + b"\r\n")
        client.stdin.flush()
        assert any(line.startswith(b"235 ") for line in iter(client.stdout.readline, b""))
        client.stdin.write(b"MAIL FROM:<a@example.com>\r\nrcpt TO:<b@example.org>\r\nDATA\r\n")
        client.stdin.flush()
        assert any(line.startswith(b"354") for line in iter(client.stdout.readline, b""))
        client.stdin.write(b"Subject: x\r\n\r\nbody\r\n.\r\nQUIT\r\n")
        client.stdin.flush()
        assert b"\n221 2.0.0" in client.stdout.read()


def auth_by_curl(running: SmtpHarness, authority: Authority) -> None:
    scheme = "smtps" if running.listener.tls else "smtp"
    command(
        "curl", "-sS", "--ssl-reqd", "--cacert", authority.bundle, "--crlf",
        f"{scheme}://localhost:{running.port}/client.example", "--user", f"ann:{RIGHT}",
        "--mail-from", "a@example.com", "--mail-rcpt", "b@example.org", "-T", "-",
        input="Subject: x\n\nbody\n",
    )  # fmt: skip


def auth_by_swaks(running: SmtpHarness, authority: Authority) -> None:
    mode = "--tls-on-connect" if running.listener.tls else "--tls"
    command(
        "swaks", mode, "--tls-verify", "--tls-ca-path", authority.bundle, "--server", "localhost",
        "--port", str(running.port), "--from", "a@example.com", "--to", "b@example.org",
        "--auth", "LOGIN", "--auth-user", "ann", "--auth-password", RIGHT,
    )  # fmt: skip


def auth_by_msmtp(running: SmtpHarness, authority: Authority) -> None:
    command(
        "msmtp", "--host=localhost", f"--port={running.port}", "--tls=on", "--auth=login",
        f"--tls-starttls={'off' if running.listener.tls else 'on'}", "--from=a@example.com",
        "--user=ann", f"--passwordeval=echo '{RIGHT}'", f"--tls-trust-file={authority.bundle}",
        "b@example.org", input="Subject: x\n\nbody\n",
    )  # fmt: skip


def auth_by_smtplib(running: SmtpHarness, authority: Authority) -> None:
    with smtplib_client(running, authority) as client:
        client.login("ann", RIGHT)
        client.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\nbody\r\n")


def auth_by_postfix(running: SmtpHarness, authority: Authority) -> None:
    if not any(Path("/usr/lib").glob("*/sasl2/libplain.so*")):
        pytest.skip("no libsasl2-modules on this machine")
    by_postfix(
        running,
        authority,
        smtp_sasl_auth_enable="yes",
        smtp_sasl_password_maps=f"inline:{{ {{ [127.0.0.1]:{running.port} = ann:{RIGHT} }} }}",
        smtp_sasl_tls_security_options="noanonymous",
        smtp_sasl_mechanism_filter="plain",
    )


@pytest.mark.parametrize("implicit", [False, True], ids=["starttls", "implicit"])
@pytest.mark.parametrize(
    "deliver",
    [
        auth_by_openssl,
        auth_by_curl,
        auth_by_swaks,
        auth_by_msmtp,
        auth_by_smtplib,
        auth_by_postfix,
    ],
)
def test_real_clients_log_in_over_tls(
    serve: Callable[..., SmtpHarness],
    authority: Authority,
    implicit: bool,
    deliver: Callable[[SmtpHarness, Authority], None],
) -> None:
    running = serve(listener=Listener("127.0.0.1", 0, tls=implicit, auth=True))
    deliver(running, authority)
    [message] = running.messages(1)
    assert (message.protocol, message.auth_user) == ("ESMTPSA", "ann")
    assert message.recipients[0].address == "b@example.org"
