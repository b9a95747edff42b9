"""smtpd on several listeners: their options, and sockets as systemd passes them."""

import os
import signal
import smtplib
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.stack import command, relay_environ
from tests.certificates import Authority
from tests.integration.test_smtpd import PROGRAM, Program, RawClient
from tests.services import free_port
from tests.waiting import until

UNDER_SYSTEMD = 'LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=smtp:closed exec "$@"'
"""systemd sets LISTEN_PID to the process that it becomes by exec, as the shell does here."""


@pytest.fixture
def program_over_tls(
    tmp_path: Path, clean_sqlite_url: str, spawn: Callable[..., subprocess.Popen[Any]]
) -> tuple[Program, Authority, Path]:
    """smtpd with implicit TLS, its authority, and the directory of its pair."""
    authority = Authority(tmp_path)
    certificate, key = authority.sign("localhost").write(tmp_path / "tls")
    port = free_port()
    program = Program(
        tmp_path,
        clean_sqlite_url,
        spawn,
        port,
        smtp_listen=f"127.0.0.1:{port}/tls",
        tls_certificate=str(certificate),
        tls_key=str(key),
    )
    return program, authority, tmp_path / "tls"


@pytest.fixture
def smtpd(
    tmp_path: Path, clean_sqlite_url: str, spawn: Callable[..., subprocess.Popen[Any]]
) -> Callable[..., tuple[subprocess.Popen[Any], Path]]:
    """Starts smtpd with the listeners, below these two sockets of systemd."""

    def start(listen: str, sockets: list[socket.socket]) -> tuple[subprocess.Popen[Any], Path]:
        first = 3
        duplicates = [os.dup(each.fileno()) for each in sockets]

        def place() -> None:  # runs between fork and exec
            for number, descriptor in enumerate(duplicates):
                os.dup2(descriptor, first + number)

        log = tmp_path / "log"
        settings = {
            "STATE_DIR": str(tmp_path / "var"),
            "DATABASE_URL": clean_sqlite_url,
            "UNSAFE_DURABILITY": "1",
            "SMTP_LISTEN": listen,
            "AUTH_PLAINTEXT_NETWORKS": "127.0.0.1",
            "LOG_FORMAT": "json",
        }
        with log.open("wb") as output:
            process = spawn(
                ["sh", "-c", UNDER_SYSTEMD, "sh", sys.executable, "-c", PROGRAM],
                env=relay_environ(**settings),
                stderr=output,
                preexec_fn=place,
                pass_fds=(first, first + 1),
            )
        for descriptor in duplicates:
            os.close(descriptor)
        until(
            lambda: b'"listening"' in log.read_bytes() or process.poll() is not None,
            30,
            what=log.read_text,
        )
        return process, log

    return start


def test_sockets_of_systemd_are_served_by_name_and_outlive_smtpd(
    smtpd: Callable[..., tuple[subprocess.Popen[Any], Path]],
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as passed,
        socket.create_server(("127.0.0.1", 0)) as closed,
    ):
        port, closed_port = passed.getsockname()[1], closed.getsockname()[1]
        process, log = smtpd("systemd:smtp, systemd:closed/auth", [passed, closed])
        with smtplib.SMTP("127.0.0.1", port) as client:
            client.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\nbody\r\n")
        with smtplib.SMTP("127.0.0.1", closed_port) as client:
            with pytest.raises(smtplib.SMTPSenderRefused) as refused:
                client.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\n")
            assert (refused.value.smtp_code, refused.value.smtp_error[:5]) == (530, b"5.7.0")
        text = log.read_text()
        assert '"addresses": ["systemd:smtp", "systemd:closed/auth"]' in text
        assert "sockets not used" not in text
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        waiting = RawClient("127.0.0.1", port)
        again, _ = smtpd("systemd:smtp", [passed, closed])
        waiting.expect(b"220")
        waiting.say(b"QUIT", b"221")
        waiting.close()
        assert '"names": ["closed"]' in log.read_text()
        again.send_signal(signal.SIGTERM)
        assert again.wait(20) == 0


def test_a_renewed_certificate_is_taken_on_sighup_and_no_session_ends(
    program_over_tls: tuple[Program, Authority, Path],
) -> None:
    program, authority, directory = program_over_tls
    context = authority.client_context()
    with smtplib.SMTP_SSL("localhost", program.port, context=context) as open_before:
        before = certificate_of(open_before)
        authority.sign("localhost").write(directory)
        program.process.send_signal(signal.SIGHUP)
        until(lambda: program.events("certificate loaded"), what=program.log.read_text)
        with smtplib.SMTP_SSL("localhost", program.port, context=context) as client:
            assert certificate_of(client) != before
        (directory / "key.pem").write_text("nonsense")
        program.process.send_signal(signal.SIGHUP)
        [event] = until(lambda: program.events("certificate rejected"), what=program.log.read_text)
        assert event["level"] == "critical"
        with smtplib.SMTP_SSL("localhost", program.port, context=context) as client:
            client.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\n")
        open_before.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\n")
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(20) == 0


def certificate_of(client: smtplib.SMTP) -> bytes:
    assert isinstance(client.sock, ssl.SSLSocket)
    return client.sock.getpeercert(binary_form=True) or b""


def test_smtpd_does_not_start_with_a_pair_that_does_not_fit(tmp_path: Path) -> None:
    certificate, _key = Authority(tmp_path).sign("localhost").write(tmp_path / "tls")
    done = command("smtpd", STATE_DIR=str(tmp_path / "var"), TLS_CERTIFICATE=str(certificate))
    assert done.returncode == 2
    assert f"RELAY_TLS_CERTIFICATE = {certificate}" in done.stderr


def test_sighup_without_a_certificate_ends_nothing(
    tmp_path: Path, clean_sqlite_url: str, spawn: Callable[..., subprocess.Popen[Any]]
) -> None:
    program = Program(tmp_path, clean_sqlite_url, spawn, free_port())
    [spooler] = program.spoolers()
    for pid in (spooler, program.process.pid):
        os.kill(pid, signal.SIGHUP)
    program.send("b@example.org")
    assert program.spoolers() == [spooler]
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(20) == 0


def test_a_name_that_systemd_did_not_pass_is_an_error(
    smtpd: Callable[..., tuple[subprocess.Popen[Any], Path]],
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as passed,
        socket.create_server(("127.0.0.1", 0)) as closed,
    ):
        process, log = smtpd("systemd:submission", [passed, closed])
        assert process.wait(20) != 0
    assert "systemd passed no socket 'submission'" in log.read_text()
    assert "(others: closed, smtp)" in log.read_text()
