"""The health check of the containers, run as Docker runs it, against faulty servers and the real
ones."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from commands import healthcheck as health
from tests.acceptance.stack import ROOT, command, relay_environ
from tests.certificates import Authority
from tests.services import end, free_port
from tests.waiting import until

SCRIPT = ROOT / "commands" / "healthcheck.py"


def check(role: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """The check in an interpreter with only the standard library."""
    return subprocess.run(
        [sys.executable, "-I", "-S", SCRIPT, role],
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@contextmanager
def server(*says: bytes, stays: bool = False, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """A server for one connection: sends the first line at once, each other after it received
    something, then closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = threading.Event()

        def serve() -> None:
            client, _ = listener.accept()
            if tls is not None:
                client = tls.wrap_socket(client, server_side=True)
            with client:
                for number, text in enumerate(says):
                    if number and not client.recv(100):
                        return
                    client.sendall(text)
                if stays:
                    done.wait(30)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        done.set()
        thread.join(10)


# --- smtp
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("banner", [b"220 mx ESMTP\r\n", b"220-mx\r\n220 at your service\r\n"])
def test_a_banner_and_a_reply_to_quit_are_healthy(banner: bytes):
    with server(banner, b"221 2.0.0 Bye\r\n") as address:
        done = check("smtp", RELAY_SMTP_LISTEN=f"{address},127.0.0.1:1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("220 ")


def test_a_listener_over_tls_is_healthy_without_a_name_in_its_certificate(tmp_path: Path):
    certificate, key = Authority(tmp_path).sign("relay.example").write(tmp_path / "tls")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with server(b"220 mx\r\n", b"221 bye\r\n", tls=context) as address:
        done = check("smtp", RELAY_SMTP_LISTEN=f"systemd:smtp {address}/tls/auth")
    assert (done.returncode, done.stderr) == (0, "")
    assert check("smtp", RELAY_SMTP_LISTEN="systemd:smtp/tls").returncode == 1


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ([b"421 4.3.2 busy\r\n"], "421 4.3.2 busy"),
        ([b""], "closed"),
        ([b"220 mx"], "closed"),
        ([b"220 mx\r\n", b"500 what?\r\n"], "500 what?"),
        ([b"220 mx\r\n", b""], "closed"),
        ([b"220-" + b"x" * 5000], "does not end"),
        ([b"\xff\x00\r\n"], "xff"),
    ],
)
def test_any_other_dialogue_is_unhealthy(says: list[bytes], why: str):
    with server(*says) as address:
        done = check("smtp", RELAY_SMTP_LISTEN=address)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("unhealthy: ")
    assert why in done.stdout


def test_a_silent_server_is_unhealthy_in_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(health, "TIMEOUT", 0.2)
    began = time.monotonic()
    with server(b"220-and so", stays=True) as address, pytest.raises(TimeoutError):
        health.smtp(address)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "listen", ["127.0.0.1:{port}", "0.0.0.0:{port}", ":{port}", "nonsense", "127.0.0.1:high"]
)
def test_a_closed_port_is_unhealthy(listen: str):
    done = check("smtp", RELAY_SMTP_LISTEN=listen.format(port=free_port()))
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("host", ["0.0.0.0", ""])
def test_every_address_means_this_machine(host: str):
    with server(b"220 mx\r\n", b"221 bye\r\n") as address:
        assert (
            check("smtp", RELAY_SMTP_LISTEN=f"{host}:{address.rpartition(':')[2]}").returncode == 0
        )


def test_the_real_smtpd_is_healthy_and_logs_no_client(
    spawn: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
):
    port = free_port()
    settings = {
        "STATE_DIR": str(tmp_path / "var"),
        "SMTP_LISTEN": f"127.0.0.1:{port}",
        "LOG_FORMAT": "json",
    }
    assert command("migrate", **settings).returncode == 0
    log = tmp_path / "log"
    with log.open("wb") as output:
        smtpd = spawn(
            [sys.executable, "-m", "commands.cli.start", "smtpd"],
            env=relay_environ(**settings),
            stdout=output,
            stderr=output,
        )
    address = f"127.0.0.1:{port}"
    until(lambda: check("smtp", RELAY_SMTP_LISTEN=address).returncode == 0, 60, what=log.read_text)
    for _ in range(3):
        assert check("smtp", RELAY_SMTP_LISTEN=address).returncode == 0
    assert end(smtpd, signal.SIGTERM) == 0
    assert '"client"' not in log.read_text()
    assert check("smtp", RELAY_SMTP_LISTEN=address).returncode == 1


# --- worker
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("age", "status"), [(0, 0), (50, 0), (70, 1), (-30, 0), (-70, 1)])
def test_a_worker_is_healthy_while_its_heartbeat_is_young(age: int, status: int, tmp_path: Path):
    heartbeat = tmp_path / "heartbeat"
    heartbeat.touch()
    moment = time.time() - age
    os.utime(heartbeat, (moment, moment))
    done = check("worker", RELAY_HEALTH_FILE=str(heartbeat))
    assert (done.returncode, done.stderr) == (status, "")
    assert "ago" in done.stdout


def test_no_heartbeat_file_is_unhealthy(tmp_path: Path):
    assert (
        "has not started" in check("worker", RELAY_HEALTH_FILE=str(tmp_path / "heartbeat")).stdout
    )
    assert "RELAY_HEALTH_FILE" in check("worker").stdout
    assert {
        check("worker", RELAY_HEALTH_FILE=str(tmp_path / "heartbeat")).returncode,
        check("worker").returncode,
    } == {1}


def test_wrong_use_exits_with_1_not_with_the_reserved_2():
    assert check("everything").returncode == 1


def test_the_real_worker_is_healthy_without_a_broker(
    spawn: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
):
    heartbeat = tmp_path / "heartbeat"
    settings = {
        "STATE_DIR": str(tmp_path / "var"),
        "HEALTH_FILE": str(heartbeat),
        "BROKER_URL": f"redis://127.0.0.1:{free_port()}/0",
    }
    assert command("migrate", **settings).returncode == 0
    log = tmp_path / "log"
    with log.open("wb") as output:
        worker = spawn(
            [sys.executable, "-m", "commands.cli.start", "worker"],
            env=relay_environ(**settings),
            stdout=output,
            stderr=output,
        )
    until(
        lambda: check("worker", RELAY_HEALTH_FILE=str(heartbeat)).returncode == 0,
        60,
        what=log.read_text,
    )
    end(worker, signal.SIGTERM, timeout=60)
    done = check("worker", RELAY_HEALTH_FILE=str(heartbeat))
    assert done.returncode == 1
    assert "stopping" in done.stdout
