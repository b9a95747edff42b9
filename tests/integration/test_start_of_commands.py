"""A short command imports little and ends at once."""

import json
import subprocess
import sys

import pytest

from tests.acceptance.stack import command, relay_environ
from tests.integration.harness import QueueHarness

# What a list needs not. Each costs milliseconds, the libraries tens of them.
SLOW = (
    "alembic",
    "argon2",
    "celery",
    "commands.ops.show",
    "cryptography",
    "dotenv",
    "jinja2",
    "kombu",
    "prometheus_client",
    "pydantic_settings",
    "qmqp",
    "redis",
    "relay.dsn",
    "relay.report.records",
    "relay.spool",
    "rich",
    "starlette",
    "structlog",
    "uvicorn",
    "uvloop",
)
# It reports the modules, and the plugins of pydantic and the commands of typer that it has made.
PROGRAM = """
import json, os, sys
sys.argv[1:] = ["list", "--json"]
def exit_(status):
    from pydantic.plugin import _loader
    made = {"status": status, "modules": [*sys.modules], "commands": commands}
    print(json.dumps(made | {"searched": _loader._plugins is not None}), file=sys.stderr)
    raise SystemExit
os._exit = exit_
import typer.core
commands = []
class Command(typer.core.TyperCommand):
    def __init__(self, name, **settings):
        commands.append(name)
        super().__init__(name, **settings)
typer.core.TyperCommand = Command
from commands.cli.start import main
main()
"""


def test_a_list_makes_nothing_that_it_does_not_need(queue: QueueHarness) -> None:
    queue.accept("x@example.org")
    url = queue.database.url.render_as_string(hide_password=False)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=relay_environ(DATABASE_URL=url),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    made = json.loads(done.stderr)
    modules = made["modules"]
    assert made["status"] == 0, done.stderr
    assert json.loads(done.stdout)["recipient"] == "x@example.org"
    assert not set(SLOW) & set(modules)
    assert len(modules) < 700
    assert made["commands"] == ["list"]
    assert not made["searched"], "pydantic has searched all packages for its plugins"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["list", "--json"], 1, "the queue is empty"),
        (["--version"], 0, ""),
        (["list", "--state", "lost"], 2, "no state lost"),
        (["--help"], 0, ""),
    ],
)
def test_a_command_ends_with_its_status_and_all_of_its_output(
    sqlite_url: str, arguments: list[str], status: int, said: str
) -> None:
    done = command(*arguments, DATABASE_URL=sqlite_url)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    ended_as_usual = subprocess.run(
        [sys.executable, "-m", "commands.cli.main", *arguments],
        env=relay_environ(DATABASE_URL=sqlite_url),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == ended_as_usual.stdout
