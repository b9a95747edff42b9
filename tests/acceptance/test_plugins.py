"""Plugins in the whole program: what they add reaches the server, the DSN and the commands, also
when the database was away; and a plugin that cannot be loaded stops what would need it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmqp.sink import MagicRecipients, Sink, running_sink
from tests.acceptance.installation import Install, Installation
from tests.acceptance.stack import relay_environ
from tests.waiting import until

PLUGIN = """
from qmqp_relay import hookimpl

@hookimpl
def register(relay, args):
    global NAME
    NAME = args.option("name")

@hookimpl
async def message(transaction):
    transaction.add_header(NAME, str(transaction.content.size))
    if transaction.recipients[0].local == "held":
        transaction.hold("looks odd")
"""


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[Sink]:
    with running_sink(dump=tmp_path / "dump") as sink:
        yield sink


def command(relay: Installation, *arguments: str, **settings: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "commands.cli.start", *arguments],
        env=relay_environ(**{**relay.settings, **settings}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def started(install: Install, database: str, sink: Sink, directory: Path) -> Installation:
    plugin = directory / "size.py"
    plugin.write_text(PLUGIN)
    return install(
        database,
        QMQP_SERVERS=f"127.0.0.1:{sink.port}",
        PLUGINS=f"{plugin} name=X-Size password=hunter2 message_timeout=1m",
    )


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_fields_of_a_plugin_reach_the_server_and_the_commands(
    install: Install, database: str, sink: Sink, tmp_path: Path
) -> None:
    relay = started(install, database, sink, tmp_path)
    smtpd, worker = relay.smtpd(), relay.worker()
    small = b"Subject: small\n\nhello\n"
    large = b"Subject: large\n\n" + b"0123456789\n" * 100_000
    for number, body in enumerate((small, large), 1):
        queue_id = relay.send(f"{number}@example.org", body=body)
        until(lambda number=number: len(sink.received) == number)  # type: ignore[misc]
        text = (tmp_path / "dump" / f"{number:08d}.eml").read_bytes()
        field, _, rest = text.partition(b"\n")
        assert rest.startswith(b"Received: from ")
        assert rest.endswith(body)
        assert field == b"X-Size: %d" % len(rest)
        shown = command(relay, "show", queue_id)
        assert shown[0] == 0, shown
    queue_id = relay.send("held@example.org", body=large)
    row = relay.until_state("held@example.org", "held")
    assert row.reason == "held by plugin size: looks odd"
    status, text_shown, _ = command(relay, "headers", queue_id)
    assert status == 0
    assert text_shown.startswith("X-Size: ")
    assert "\nReceived: from " in text_shown
    assert command(relay, "body", queue_id)[1].encode().endswith(large)
    assert command(relay, "release", queue_id, "--yes")[0] == 0
    relay.until_state("held@example.org", "delivered")
    assert len(sink.received) == 3
    assert relay.end(worker) == 0
    assert relay.end(smtpd) == 0


def test_plugins_and_check_show_what_is_loaded(
    install: Install, sink: Sink, tmp_path: Path
) -> None:
    relay = started(install, "sqlite", sink, tmp_path)
    status, text, _ = command(relay, "plugins", "--json")
    (row,) = [json.loads(line) for line in text.splitlines()]
    assert (status, row) == (
        0,
        {
            "name": "size",
            "source": str(tmp_path / "size.py"),
            "hooks": ["register", "message"],
            "arguments": ["name=X-Size", "password=***"],
            "timeout": 5.0,
            "message_timeout": 60.0,
            "fail": "closed",
        },
    )
    assert "loaded in this order: size" in command(relay, "check")[1]
    status, text, error = command(relay, "plugins", PLUGINS="")
    assert (status, text) == (1, "")
    assert "RELAY_PLUGINS is empty" in error


def test_a_plugin_that_cannot_be_loaded_stops_the_process(
    install: Install, sink: Sink, tmp_path: Path
) -> None:
    relay = started(install, "sqlite", sink, tmp_path)
    bad = tmp_path / "bad.py"
    bad.write_text("from qmqp_relay import hookimpl\n\n@hookimpl\ndef rctp(): pass\n")
    for what in ("smtpd", "plugins", "check"):
        status, text, error = command(relay, what, PLUGINS=str(bad))
        assert status == 2, (what, error)
        assert f"{bad}, line 3: there is no hook rctp; did you mean rcpt?" in text + error
        assert "Traceback" not in text + error


def test_worker_runs_the_example_of_the_hook_event(install: Install, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
    (example,) = re.findall(r"^```python\n(# hooks/event\.py\n.*?)^```$", page, re.M | re.S)
    plugin = tmp_path / "event.py"
    # The example writes into the current directory.
    plugin.write_text(f"import os\n\nos.chdir({str(tmp_path)!r})\n{example}")
    with running_sink(MagicRecipients()) as sink:
        relay = install("sqlite", QMQP_SERVERS=f"127.0.0.1:{sink.port}", PLUGINS=str(plugin))
        smtpd, worker = relay.smtpd(), relay.worker()
        relay.send("ann@example.org")
        relay.send("reject@example.org", sender="bob@example.com")
        relay.until_state("ann@example.org", "delivered")
        relay.until_state("reject@example.org", "bounced")
        bounced = tmp_path / "bounced"
        until(lambda: bounced.exists() and bounced.read_text().endswith("\n"))
        (line,) = bounced.read_text().splitlines()
        assert line.startswith("bob@example.com reject@example.org ")
        assert relay.end(worker) == 0
        assert relay.end(smtpd) == 0
