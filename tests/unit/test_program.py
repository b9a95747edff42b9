"""The program `qmqp-relay`: services run without docstrings, commands with their help."""

import gc
import os
import sys
from collections.abc import Callable
from importlib.util import cache_from_source
from pathlib import Path
from types import SimpleNamespace

import pytest

from commands.cli import start

type Run = Callable[..., list[str] | None]


class Executed(Exception):
    """The process would have become another one."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def execute(path: str, arguments: list[str]) -> None:
        assert path == sys.executable
        raise Executed(arguments)

    def run(*arguments: str, dont_write: bool = False) -> list[str] | None:
        """The arguments of the process that takes the place of this one; None if none does."""
        monkeypatch.setattr(os, "execv", execute)
        monkeypatch.setattr(sys, "argv", ["qmqp-relay", *arguments])
        monkeypatch.setattr(sys, "orig_argv", ["python", "-P", "qmqp-relay", *arguments])
        monkeypatch.setattr(sys, "dont_write_bytecode", dont_write)
        commands = SimpleNamespace(app_for=lambda words: lambda **_: None)
        monkeypatch.setitem(sys.modules, "commands.cli.main", commands)
        services = SimpleNamespace(run=lambda service: 0)
        monkeypatch.setitem(sys.modules, "commands.services", services)
        monkeypatch.setattr(os, "_exit", sys.exit)
        monkeypatch.setattr(gc, "set_threshold", lambda threshold: None)
        monkeypatch.setenv("PYDANTIC_DISABLE_PLUGINS", "")  # as it was, at the end
        try:
            start.main()
        except Executed as executed:
            (command,) = executed.args
            return list(command)
        except SystemExit:
            pass  # the end of a short command
        return None

    return run


@pytest.mark.parametrize("service", ["smtpd", "worker"])
def test_services_run_without_docstrings(run: Run, service: str) -> None:
    assert run(service) == ["python", "-OO", "-P", "qmqp-relay", service]


@pytest.mark.parametrize("arguments", [("smtpd", "--help"), ("list",), ()])
def test_commands_keep_their_help(run: Run, arguments: tuple[str, ...]) -> None:
    assert run(*arguments) is None


def test_a_service_that_cannot_keep_bytecode_does_not_compile_at_each_start(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(start, "__file__", str(tmp_path / "main.py"))
    assert run("smtpd", dont_write=True) is None
    kept = Path(cache_from_source(start.__file__, optimization=2))
    kept.parent.mkdir()
    kept.touch()
    assert run("smtpd", dont_write=True) is not None, "what is there is enough"
