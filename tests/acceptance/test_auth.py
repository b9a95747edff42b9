"""Users log in with the clients that people have, and commands act on them while smtpd runs."""

import json
import smtplib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qmqp.sink import Sink, running_sink
from tests.acceptance.installation import Install, Installation, installed, submit
from tests.acceptance.stack import command
from tests.services import Postgres
from tests.waiting import until, whole_lines

PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def sink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sink]:
    with running_sink(dump=tmp_path_factory.mktemp("sink")) as sink:
        yield sink


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def relay(request: pytest.FixtureRequest, install: Install, sink: Sink) -> Installation:
    """It trusts no network of this machine, and the user ann may send from example.com."""
    relay = install(
        request.param,
        QMQP_SERVERS=f"127.0.0.1:{sink.port}",
        CLIENT_NETWORKS="192.0.2.0/24",
        AUTH_PLAINTEXT_NETWORKS="127.0.0.0/8",
    )
    user(relay, "add", "ann", "--sender", "*@example.com")
    relay.smtpd()
    relay.worker()
    return relay


def user(relay: Installation, *arguments: str, password: str = PASSWORD) -> None:
    """Run `qmqp-relay user ARGUMENTS`; a password comes from a file."""
    options = []
    if arguments[0] in ("add", "passwd"):
        file = relay.directory / "password"
        file.write_text(f"{password}\n")
        options = ["--password-file", str(file)]
    done = command("user", *arguments, *options, **relay.settings)
    assert done.returncode == 0, done.stderr


def listed(relay: Installation, *arguments: str) -> list[dict[str, Any]]:
    done = command(*arguments, "--json", **relay.settings)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def run(*arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [installed(arguments[0]), *arguments[1:]],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def swaks(relay: Installation, mechanism: str, recipient: str, password: str) -> list[str]:
    options = ["--server", f"127.0.0.1:{relay.port}", "-f", "ann@example.com", "-t", recipient]
    login = ["--auth", mechanism, "--auth-user", "ann", "--auth-password", password]
    return ["swaks", *options, *login]


@pytest.mark.parametrize("client", ["curl PLAIN", "curl LOGIN", "swaks PLAIN", "swaks LOGIN"])
def test_clients_log_in_and_relay(
    relay: Installation, sink: Sink, tmp_path: Path, client: str
) -> None:
    program, mechanism = client.split()
    recipient = f"{program}.{mechanism}.{relay.port}@sink.test".lower()  # the sink is shared
    if program == "curl":
        letter = tmp_path / "letter"
        letter.write_text("Subject: x\n\nHello.\n")
        address = f"smtp://127.0.0.1:{relay.port}"
        options = ["-sS", "--crlf", "--mail-from", "ann@example.com", "--mail-rcpt", recipient]
        login = ["--user", f"ann:{PASSWORD}", "--login-options", f"AUTH={mechanism}"]
        run("curl", *options, *login, "-T", str(letter), address)
    else:
        assert "235 2.7.0" in run(*swaks(relay, mechanism, recipient, PASSWORD))
    row = relay.until_state(recipient, "delivered")
    assert row.auth_user == "ann"
    assert row.protocol == "ESMTPA"
    number = next(one.number for one in list(sink.received) if recipient.encode() in one.recipients)
    assert sink.dump is not None
    body = (sink.dump / f"{number:08d}.eml").read_bytes()
    assert b" with ESMTPA id " in body


def test_commands_show_who_sent_a_message(relay: Installation) -> None:
    recipient = "shown@sink.test"
    with client_of(relay) as client:
        assert log_in(client, "ann") == 235
        queue_id = submit(
            client, recipient, sender="ann@example.com", body=b"Subject: x\n\nHello.\n"
        )
    assert relay.until_state(recipient, "delivered").auth_user == "ann"
    [shown] = listed(relay, "show", queue_id)
    assert (shown["auth_user"], shown["protocol"]) == ("ann", "ESMTPA")
    [line] = listed(relay, "list", "--all", "--recipient", recipient)
    assert line["auth_user"] == "ann"
    assert " as ann" in command("show", queue_id, **relay.settings).stdout


def test_a_wrong_password_relays_nothing(relay: Installation) -> None:
    output = run(*swaks(relay, "PLAIN", "wrong@sink.test", "wrong horse"), status=28)
    assert "535 5.7.8" in output
    sent = "SELECT 1 FROM mail_history WHERE recipient = :recipient"
    assert not relay.rows(sent, recipient="wrong@sink.test")
    failed = until(lambda: logged(relay, "authentication failed"))
    assert failed[-1]["user"] == "ann"
    assert failed[-1]["reason"] == "wrong password"
    assert failed[-1]["client"] == "127.0.0.1"
    assert "horse" not in relay.log.read_text()


def logged(relay: Installation, event: str) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in whole_lines(relay.log) if line.startswith("{")]
    return [entry for entry in entries if entry["event"] == event]


def client_of(relay: Installation) -> smtplib.SMTP:
    return smtplib.SMTP("127.0.0.1", relay.port, local_hostname="client.example.com", timeout=30)


def log_in(client: smtplib.SMTP, name: str, password: str = PASSWORD) -> int:
    """The code of the reply to AUTH PLAIN."""
    client.ehlo_or_helo_if_needed()
    client.user, client.password = name, password
    return client.auth("PLAIN", client.auth_plain)[0]


def refused(relay: Installation, name: str, password: str = PASSWORD) -> int:
    with client_of(relay) as client, pytest.raises(smtplib.SMTPAuthenticationError) as error:
        log_in(client, name, password)
    return error.value.smtp_code


@pytest.mark.timeout(300)  # it starts ten programs, one after the other
def test_commands_act_on_sessions_that_are_open(relay: Installation) -> None:
    user(relay, "add", "bob")
    with client_of(relay) as client:
        assert log_in(client, "bob") == 235
        submit(client, "bob@sink.test", sender="bob@example.net", body=b"Subject: x\n\nHello.\n")
        until(lambda: seen(relay, "bob"), 60.0, what="the activity of bob is recorded")
        user(relay, "disable", "bob", "--reason", "test")
        until(lambda: mail_code(client) == 421, 60.0, what="the session of bob ends")
    assert refused(relay, "bob") == 535
    user(relay, "enable", "bob")
    user(relay, "passwd", "bob", password="battery staple")
    with client_of(relay) as client:
        assert log_in(client, "bob", "battery staple") == 235
    user(relay, "remove", "bob")
    assert [one["name"] for one in listed(relay, "user", "list")] == ["ann"]


def mail_code(client: smtplib.SMTP) -> int:
    """The code of the reply to MAIL, in a session that may go on."""
    code = client.mail("bob@example.net")[0]
    if code == 250:
        client.rset()
    return code


def seen(relay: Installation, name: str) -> Any:
    return relay.rows("SELECT last_seen_at FROM users WHERE name = :name", name=name)[0][0]


def test_who_has_just_logged_in_does_so_without_the_database(
    install: Install, postgres: Postgres
) -> None:
    relay = install("postgresql", AUTH_PLAINTEXT_NETWORKS="127.0.0.0/8")
    for name in ("ann", "bob"):
        user(relay, "add", name)
    relay.smtpd()
    with client_of(relay) as client:
        assert log_in(client, "ann") == 235
    postgres.kill()
    with client_of(relay) as client:
        assert log_in(client, "ann") == 235
    for name, password in (("bob", PASSWORD), ("ann", "wrong horse"), ("stranger", PASSWORD)):
        assert refused(relay, name, password) == 454
    postgres.start()
    with client_of(relay) as client:
        assert log_in(client, "bob") == 235


def test_check_names_a_bad_network(tmp_path: Path) -> None:
    settings = {"STATE_DIR": str(tmp_path / "var")}
    bad = command("check", AUTH_PLAINTEXT_NETWORKS="10.0.0.1/8", **settings)
    assert bad.returncode == 2
    assert "RELAY_AUTH_PLAINTEXT_NETWORKS" in bad.stdout
    published = {"AUTH_PLAINTEXT_NETWORKS": "connected", "PUBLISH": "0.0.0.0:25"}
    for name in ("check", "smtpd"):
        refused_ = command(name, **published, **settings)
        assert refused_.returncode == 2
        assert "RELAY_AUTH_PLAINTEXT_NETWORKS: `connected`" in refused_.stdout + refused_.stderr
