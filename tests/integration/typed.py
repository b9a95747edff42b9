"""The command line in this process, because a start of Python for each command takes too long."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from commands.cli.main import app_for
from relay.spool.store import Spool
from tests.integration.harness import QueueHarness

type Typed = Callable[..., Result]


def typed_at(queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """`typed("list", "--json")` runs a command on the harness's database and this spool."""
    settings = {
        "STATE_DIR": str(spool.directory.parent),
        "SPOOL_DIR": str(spool.directory),
        "UNSAFE_DURABILITY": "1",
        "DATABASE_URL": queue.database.url.render_as_string(hide_password=False),
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"RELAY_{name}", value)
    spool.prepare(queue.database, unsafe=True)

    def typed(*arguments: str, status: int | None = 0, answer: str | None = None) -> Result:
        result = CliRunner().invoke(app_for(arguments), arguments, input=answer)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert status is None or result.exit_code == status, (
            f"{arguments}: {result.exit_code} {result.output}"
        )
        return result

    return typed


def lines(result: Result) -> list[dict[str, Any]]:
    """The NDJSON that a command printed."""
    return [json.loads(line) for line in result.stdout.splitlines()]
