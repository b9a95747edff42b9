"""`qmqp-relay up`: starts, stops, crashes and restarts."""

import os
import signal
import smtplib
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from qmqp.sink import running_sink
from tests.acceptance.stack import (
    ROOT,
    STARTING,
    StartUp,
    Up,
    command,
    processes_of,
    relay_environ,
)
from tests.certificates import Authority
from tests.services import end, free_port, spawn
from tests.waiting import until


def test_mail_is_delivered_after_every_process_was_killed(start_up: StartUp) -> None:
    up = start_up("--demo")
    output = up.log_text()
    assert "DEMO" in output
    for word in (
        f"smtp://127.0.0.1:{up.port}",
        "curl",
        "sqlite3",
        "defer-2@",
        "reject@",
        "slow@",
        "drop-reply@",
    ):
        assert word in output
    up.send("you@example.org", "reject@example.org", sender="")
    up.until_state("reject@example.org", "bounced")
    up.send("you@example.org")
    up.until_state("you@example.org", "delivered")
    assert list((up.state_dir / "sink").glob("*.eml"))
    for name in ("smtpd", "worker", "valkey"):
        pid = up.child(name) or up.child(f"{name}-server") or up.child("redis-server")
        assert pid, name
        os.kill(pid, signal.SIGKILL)
    until(lambda: up.log_text().count("child restarted") >= 3, STARTING, what=up.log_text)
    until(lambda: _listens(up.port), STARTING, what=up.log_text)
    up.send("me@example.org")
    up.until_state("me@example.org", "delivered")
    assert up.end(signal.SIGINT) == 0
    assert processes_of(up.state_dir) == []


def test_the_lines_of_the_banner_can_be_pasted_however_long_the_path(
    start_up: StartUp, tmp_path: Path
) -> None:
    deep = tmp_path / ("d" * 100) / "var"  # longer than the path of a socket may be
    deep.parent.mkdir()
    up = start_up("--demo", QMQP_SERVER="mail.example.com", STATE_DIR=str(deep))
    assert up.log_text().count("ignoring RELAY_QMQP_SERVER,") == 1
    assert "did you mean RELAY_QMQP_SERVERS?" in up.log_text()
    (tmp_path / "README.md").write_text("# Heading\n\n.dots\n")
    paste("curl", up, tmp_path)
    up.until_state("you@example.org", "delivered")
    body = next((up.state_dir / "sink").glob("*.eml")).read_bytes()
    assert body.endswith(b"\n# Heading\n\n.dots\n")
    paste("sqlite3", up, ROOT)
    assert "broker\tok" in command("check", STATE_DIR=str(deep)).stdout
    assert up.end(signal.SIGTERM) == 0
    assert processes_of(up.state_dir) == []


def paste(word: str, up: Up, directory: Path) -> None:
    """Run the line of the banner that contains this word."""
    line = next(
        line for line in up.log_text().splitlines() if line.startswith("  ") and f"{word} " in line
    )
    done = subprocess.run(
        line, shell=True, cwd=directory, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"


def test_sighup_renews_the_certificate_and_stops_nothing(start_up: StartUp, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.sign("localhost").write(tmp_path / "tls")
    port = free_port()
    up = start_up(
        TLS_CERTIFICATE=str(certificate),
        TLS_KEY=str(key),
        SMTP_LISTEN=f"127.0.0.1:{port}/tls",
    )
    os.kill(up.pid, signal.SIGHUP)
    until(lambda: "certificate loaded" in up.log_text(), 20, what=up.log_text)
    with smtplib.SMTP_SSL("localhost", port, context=authority.client_context()) as client:
        client.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\n")
    assert len(processes_of(up.state_dir)) == 5
    assert up.end(signal.SIGTERM) == 0


def test_sighup_stops_it_when_its_terminal_has_been_closed(tmp_path: Path) -> None:
    up = Up(tmp_path / "var")
    terminal, end_of_terminal = os.openpty()
    buffered = relay_environ(**up.settings)
    buffered.pop("PYTHONUNBUFFERED", None)
    process = spawn(
        [sys.executable, "-m", "commands.cli.start", "up"],
        env=buffered,
        stdout=end_of_terminal,
        stderr=end_of_terminal,
        cwd=ROOT,
    )
    os.close(end_of_terminal)
    text = b""
    while b"Ctrl-C to stop" not in text:
        text += os.read(terminal, 65536)
    os.close(terminal)
    assert end(process, signal.SIGHUP) == 0
    assert processes_of(up.state_dir) == []


def test_the_next_start_delivers_the_mail_of_a_killed_one(start_up: StartUp) -> None:
    first = start_up()  # no server: mail waits
    assert len(processes_of(first.state_dir)) == 5  # up, valkey, smtpd and its spooler, worker
    first.send("you@example.org")
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: not processes_of(first.state_dir), 20, what="the children died with it")
    assert (first.state_dir / "broker.sock").exists()
    with running_sink() as sink:
        second = start_up(QMQP_SERVERS=f"127.0.0.1:{sink.port}")
        second.until_state("you@example.org", "delivered")
        assert len(sink.received) == 1
    assert second.end(signal.SIGINT) == 0


def test_a_second_up_in_one_directory_is_refused(tmp_path: Path) -> None:
    up = Up(tmp_path / "var")
    up.begin()
    lock = up.state_dir / "up.lock"
    until(lambda: lock.exists() and lock.read_text(), STARTING, what=up.log_text)
    second = command("up", STATE_DIR=str(up.state_dir), SMTP_LISTEN=f"127.0.0.1:{free_port()}")
    assert second.returncode == 2
    assert f"pid {up.pid}" in second.stderr
    assert "RELAY_STATE_DIR" in second.stderr
    assert up.running
    assert up.end(signal.SIGINT) == 0  # also in the middle of starting
    assert processes_of(up.state_dir) == []


@pytest.mark.parametrize("setting", ["SMTP_LISTEN", "QMQP_LISTEN"])
def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path, setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = {"SMTP_LISTEN": f"127.0.0.1:{free_port()}", setting: address}
        refused = command("up", "--demo", STATE_DIR=str(tmp_path / "var"), **settings)
    assert refused.returncode == 2
    assert f"{address} is taken" in refused.stderr
    assert f"RELAY_{setting}" in refused.stderr
    assert {path.name for path in (tmp_path / "var").iterdir()} == {"up.lock"}


def test_a_child_that_refuses_its_settings_ends_up(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    spool.chmod(0o777)
    address = f"127.0.0.1:{free_port()}"
    refused = command(
        "up", STATE_DIR=str(tmp_path / "var"), SPOOL_DIR=str(spool), SMTP_LISTEN=address
    )
    assert refused.returncode == 2
    assert f"RELAY_SPOOL_DIR: {spool} is writable by everybody" in refused.stderr
    assert (
        "cannot run here, so it is not started again; the reason is above"
        in refused.stderr.splitlines()[-1]
    )
    assert "child restarted" not in refused.stdout + refused.stderr
    assert processes_of(tmp_path / "var") == []


def test_a_worker_with_a_wrong_setting_exits_with_status_2(sqlite_url: str, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    spool.chmod(0o777)
    refused = command(
        "worker", STATE_DIR=str(tmp_path), DATABASE_URL=sqlite_url, SPOOL_DIR=str(spool)
    )
    assert refused.returncode == 2
    assert f"qmqp-relay worker: RELAY_SPOOL_DIR: {spool} is writable by everybody" in refused.stderr


def test_a_port_that_another_program_took_ends_up(start_up: StartUp) -> None:
    """The smtpd that crashed is started again, and says that it cannot listen."""
    up = start_up()
    smtpd = up.child("smtpd")
    assert smtpd
    with socket.socket() as other:
        other.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # beside connections that have just ended
        os.kill(smtpd, signal.SIGKILL)
        until(lambda: _takes(other, up.port), what="the port of the dead smtpd")
        until(lambda: not up.running, STARTING, what=up.log_text)
    assert up.process is not None
    assert up.process.wait() == 2
    assert f"cannot listen on 127.0.0.1:{up.port}: Address already in use" in up.log_text()
    assert "smtpd cannot run here, so it is not started again" in up.log_text()
    assert processes_of(up.state_dir) == []


def _takes(listener: socket.socket, port: int) -> bool:
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()
    except OSError:
        return False
    return True


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = command("up", STATE_DIR=str(tmp_path / "file" / "var"))
    assert refused.returncode == 2
    assert "RELAY_STATE_DIR" in refused.stderr


def test_a_configured_broker_is_used(start_up: StartUp, broker_url: str) -> None:
    up = start_up("--demo", BROKER_URL=broker_url)
    assert up.child("valkey-server") is up.child("redis-server") is None
    up.send("you@example.org")
    up.until_state("you@example.org", "delivered")


def test_a_second_ctrl_c_kills(start_up: StartUp) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tarpit:  # takes the connection and never replies
        up = start_up(QMQP_SERVERS=f"127.0.0.1:{tarpit.getsockname()[1]}", DRAIN_TIMEOUT="60s")
        up.send("you@example.org")
        with _with_a_request(tarpit):
            os.kill(up.pid, signal.SIGINT)
            until(
                lambda: "stopping" in up.log_text() and up.child("smtpd") is None,
                10,
                what=up.log_text,
            )
            assert up.running
            # Within half a second a signal counts as the same one, so send it until it is another.
            until(lambda: _interrupted(up.pid) or not up.running, 10, what=up.log_text)
    assert up.end(signal.SIGCONT) == 0
    assert processes_of(up.state_dir) == []


def _with_a_request(listener: socket.socket) -> socket.socket:
    """The first connection on which a whole request comes. A preconnection is closed without one if
    its claim comes before the rows."""
    listener.settimeout(20)
    while True:
        connection, _ = listener.accept()
        connection.settimeout(20)
        received = b""
        with suppress(ConnectionResetError):
            while data := connection.recv(65536):
                received += data
                if received.endswith(b","):
                    return connection
        connection.close()


def _interrupted(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGINT)
    except ProcessLookupError:
        return True
    return False


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


if sys.platform != "linux":
    pytest.skip("looks for processes in /proc", allow_module_level=True)
