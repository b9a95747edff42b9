"""The command line as people type it, in this process: a start of Python for each command would
take too long."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from commands.cli.main import main
from relay.spool.store import Spool
from tests.integration.office import Office

type Typed = Callable[..., Result]


def typed_at(office: Office, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """`typed("list", "--json")`: run a command on the office's database and this spool."""
    settings = {
        "STATE_DIR": str(spool.directory.parent), "SPOOL_DIR": str(spool.directory), "UNSAFE_DURABILITY": "1",
        "DATABASE_URL": office.engine.url.render_as_string(hide_password=False),
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(f"RELAY_{name}", value)
    spool.prepare(office.engine, unsafe=True)

    def typed(*words: str, status: int | None = 0, answer: str | None = None) -> Result:
        done = CliRunner().invoke(main, words, input=answer)
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert status is None or done.exit_code == status, (
            f"{words}: {done.exit_code} {done.output}"
        )
        return done

    return typed


def lines(done: Result) -> list[dict[str, Any]]:
    """The NDJSON that a command printed."""
    return [json.loads(line) for line in done.stdout.splitlines()]
