"""The commands that read: on a running relay, on one that was never started, and on wrong use."""

import json
import os
import signal
import socket
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from commands.cli.main import app_for
from tests.acceptance.stack import StartUp, command
from tests.services import free_port


def test_commands_show_the_mail_of_a_relay(start_up: StartUp, tmp_path: Path) -> None:
    up = start_up("--demo")
    var = str(up.state_dir)
    address = f"{'long' * 12}@{'sub.' * 8}example.com"
    delivered = up.send("you@example.org", sender=address)
    deferred = up.send("defer-99@example.org", "second@example.org", sender="")
    up.until_state("you@example.org", "delivered")
    up.until_state("defer-99@example.org", "deferred")

    waiting = [
        json.loads(line) for line in command("list", "--json", STATE_DIR=var).stdout.splitlines()
    ]
    assert [row["recipient"] for row in waiting] == ["defer-99@example.org", "second@example.org"]
    assert {row["queue_id"] for row in waiting} == {deferred}
    assert "busy" in waiting[0]["reason"]

    everything = command("list", "--all", STATE_DIR=var).stdout
    assert len(everything.splitlines()) == 4  # a heading
    assert address in everything

    options = ("--all", "--sender", "", "--recipient", "*@example.org", "--limit", "1", "--json")
    one = command("list", *options, STATE_DIR=var)
    assert json.loads(one.stdout)["sender"] == ""
    assert command("list", "--older-than", "1h", STATE_DIR=var).returncode == 1

    shown = command("show", delivered[-10:], STATE_DIR=var)
    assert shown.returncode == 0, shown.stderr
    for word in (
        delivered,
        address,
        "you@example.org",
        "delivered",
        "delivered",
        "Ok: queued as",
    ):
        assert word in shown.stdout
    whole = json.loads(command("show", deferred, "--json", STATE_DIR=var).stdout)
    assert whole["file_size"] == whole["size"]
    assert {row["outcome"] for row in whole["attempts"]} == {"deferred"}
    assert command("show", "0123456789abcdef", STATE_DIR=var).returncode == 1

    stats = [
        json.loads(line) for line in command("stats", "--json", STATE_DIR=var).stdout.splitlines()
    ]
    assert {(row["kind"], row.get("state")) for row in stats if row["kind"] == "queue"} >= {
        ("queue", "delivered")
    }
    assert [row["alive"] for row in stats if row["kind"] == "worker"]
    assert any(row["kind"] == "server" and row["delivered"] for row in stats)

    checked = command("check", STATE_DIR=var, QMQP_SERVERS=f"127.0.0.1:{free_port()}")
    assert checked.returncode == 3  # that server is out of reach, and all else is well
    assert {line.split("\t")[1] for line in checked.stdout.splitlines()[1:]} <= {
        "ok",
        "warn",
        "away",
    }
    assert up.end(signal.SIGINT) == 0


@pytest.mark.parametrize("arguments", [("list",), ("show", "abcdef"), ("stats",), ("check",)])
def test_commands_create_nothing_before_the_first_start(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    result = command(*arguments, STATE_DIR=str(tmp_path / "var"))
    assert result.returncode in {2, 3}
    assert "there is no database" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "var").exists()


def test_a_database_out_of_reach(tmp_path: Path) -> None:
    url = f"postgresql://relay:secret@127.0.0.1:{free_port()}/relay"
    result = command("list", STATE_DIR=str(tmp_path), DATABASE_URL=url)
    assert result.returncode == 3
    checked = command("check", "--json", STATE_DIR=str(tmp_path), DATABASE_URL=url)
    assert checked.returncode == 3
    for text in (result.stderr, checked.stdout, checked.stderr):
        assert "secret" not in text
        assert "Traceback" not in text


def test_files_are_private_and_check_names_those_that_are_not(tmp_path: Path) -> None:
    """Also in a directory that was made for all, by a shell whose umask is 0."""
    state = tmp_path / "var"
    state.mkdir()
    state.chmod(0o755)
    before = os.umask(0)
    try:
        assert command("migrate", STATE_DIR=str(state)).returncode == 0
    finally:
        os.umask(before)
    made = [*state.iterdir()]
    assert state / "relay.db" in made
    assert not any(stat.S_IMODE(file.stat().st_mode) & 0o077 for file in made)
    assert "files\tok\tother users have no access" in command("check", STATE_DIR=str(state)).stdout
    (state / "relay.db").chmod(0o644)
    assert (
        f"files\twarn\tother users have access to: {state / 'relay.db'}\t"
        in command("check", STATE_DIR=str(state)).stdout
    )
    state.chmod(0o700)
    assert (
        "files\tok\tother users have no access" in command("check", STATE_DIR=str(state)).stdout
    ), "no other user gets there"


@pytest.mark.parametrize(
    "arguments",
    [("migrate",), ("list",), ("why", "abcdef"), ("retry", "--all"), ("pause", "--route", "x")],
)
def test_a_file_that_is_no_database_is_a_sentence(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    file = tmp_path / "m.txt"
    file.write_text("this is text " * 100)
    result = command(*arguments, STATE_DIR=str(tmp_path), DATABASE_URL=f"sqlite:///{file}")
    assert result.returncode == 3
    assert result.stderr == "qmqp-relay: database: file is not a database; run `qmqp-relay check`\n"


# Bad settings of every role, for each command that reads settings.
BAD = {
    "CLIENT_NETWORKS": ("10.0.0.1/8", "write 10.0.0.0/8"),
    "RECIPIENT_DOMAINS": ("@example.org", "write example.org"),
    "HOSTNAME": ("a b", "write relay.example.org"),
    "ROUTES": ("/nowhere/routes.toml", "No such file or directory; write that file"),
    "QMQP_SERVERS": ("mail.example.com:port", "write host, host:port"),
    "LEASE": ("soon", "write 30s"),
}
READING = [
    "up",
    "smtpd",
    "worker",
    "migrate",
    "check",
    "list",
    "show x",
    "why x",
    "headers x",
    "body x",
    "stats",
    "problems",
    "actions",
    "retry --all",
    "hold --all",
    "release --all",
    "bounce --all",
    "drop --all",
    "pause --route x",
    "resume --route x",
    "fsck",
    "web",
    "user list",
    "user add x",
    "user set x --role viewer",
    "user passwd x",
    "user disable x",
    "user enable x",
    "user remove x",
]


@pytest.mark.parametrize("arguments", READING)
def test_every_command_refuses_a_setting_that_one_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    monkeypatch.setenv("RELAY_STATE_DIR", str(tmp_path / "var"))
    for name, (value, remedy) in BAD.items():
        with monkeypatch.context() as given:
            given.setenv(f"RELAY_{name}", value)
            refused = CliRunner().invoke(app_for(arguments.split()), arguments.split())
        assert refused.exit_code == 2, refused.output
        assert f"RELAY_{name}" in refused.output
        assert remedy in refused.output
    assert not (tmp_path / "var").exists()


@pytest.mark.parametrize(
    ("arguments", "settings", "text"),
    [
        (("up",), {"SMTP_LISTEN": "nonsense"}, "RELAY_SMTP_LISTEN"),
        (("up",), {"RETRY_MIN": "soon"}, "RELAY_RETRY_MIN"),
        (("smtpd",), {"MAX_MESSAGE_SIZE": "huge"}, "RELAY_MAX_MESSAGE_SIZE"),
        (
            ("smtpd",),
            {"CLIENT_NETWORKS": "connected", "PUBLISH": "0.0.0.0:25"},
            "qmqp-relay: RELAY_CLIENT_NETWORKS",
        ),
        (
            ("smtpd",),
            {"ROUTES": "/nowhere/routes.toml"},
            "RELAY_ROUTES: /nowhere/routes.toml: No such file",
        ),
        (("worker",), {"BLOCK_SIZE": "1"}, "RELAY_BLOCK_SIZE"),
        (("migrate",), {"DATABASE_URL": "mysql://x/y"}, "RELAY_DATABASE_URL"),
        (
            ("check",),
            {"CLIENT_NETWORKS": "connected", "PUBLISH": "0.0.0.0:25"},
            "RELAY_CLIENT_NETWORKS: `connected`",
        ),
        (("check",), {"QMQP_SERVERS": "mail.example.com:port"}, "mail.example.com:port"),
        (("list", "--state", "lost"), {}, "no state lost"),
        (("list", "--older-than", "ages"), {}, "ages"),
        (("sink", "--listen", "unix:here"), {}, "unix:here"),
        (("sink", "--preset", "sendmail"), {}, "sendmail"),
        (("sing",), {}, "sing"),
    ],
)
def test_wrong_use_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    settings: dict[str, str],
    text: str,
) -> None:
    for name, value in {"STATE_DIR": str(tmp_path / "var"), **settings}.items():
        monkeypatch.setenv(f"RELAY_{name}", value)
    monkeypatch.setattr(
        "relay.log.configure", lambda _settings: None
    )  # to a stream that ends with this test
    refused = CliRunner().invoke(
        app_for(arguments), arguments
    )  # in this process: a dozen starts of Python would take a while
    assert refused.exit_code == 2, refused.output
    assert text in refused.output


def test_web_refuses_a_taken_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused = command("web", STATE_DIR=str(tmp_path), WEB_LISTEN=address)
    assert refused.returncode == 2
    assert f"RELAY_WEB_LISTEN: cannot listen on {address}: Address already in use" in refused.stderr


def test_migrate_twice(tmp_path: Path) -> None:
    for _ in range(2):
        migrated = command("migrate", STATE_DIR=str(tmp_path / "var"))
        assert migrated.returncode == 0, migrated.stderr
        assert "is at revision" in migrated.stdout
