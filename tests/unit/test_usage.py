"""`--help` of each command: its group, examples that the command understands, its exit statuses."""

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from commands.cli.main import app_for, main
from commands.cli.usage import GROUPS, STATUSES, USAGES
from relay.version import running_version


def commands() -> Iterator[tuple[str, Any]]:
    """Each command with its words behind `qmqp-relay`."""

    def below(words: str, command: Any) -> Iterator[tuple[str, Any]]:
        for name, child in getattr(command, "commands", {}).items():
            yield from below(f"{words} {name}".strip(), child)
        if getattr(command, "invoke_without_command", True):  # a group may be a command too
            yield words, command

    yield from below("", typer.main.get_command(main))


COMMANDS = dict(commands())


def help_of(*words: str) -> str:
    shown = CliRunner().invoke(main, [*words, "--help"], prog_name="qmqp-relay")
    assert shown.exit_code == 0, shown.output
    return shown.output


def test_each_command_is_described() -> None:
    assert set(USAGES) == set(COMMANDS), "add the command to USAGES in commands/cli/usage.py"


@pytest.mark.parametrize("words", COMMANDS)
def test_help_has_two_examples_and_the_exit_statuses(words: str) -> None:
    text, usage = help_of(*words.split()), USAGES[words]
    assert len(usage.examples) >= 2
    shown = re.findall(r"^  qmqp-relay (.*)$", text.split("\nExamples:\n")[1], re.M)
    assert tuple(shown) == usage.examples
    statuses = dict(re.findall(r"^  (\d+) +(.+)$", text.split("\nExit status:\n")[1], re.M))
    assert {"0", "2"} <= set(statuses) <= {str(status) for status in STATUSES}


@pytest.mark.parametrize(
    ("words", "example"),
    [(words, example) for words, usage in USAGES.items() for example in usage.examples],
)
def test_a_command_understands_its_examples(words: str, example: str) -> None:
    given = shlex.split(re.split(r" (?:&&|\||>|#)", example)[0])
    path = words.split()
    assert given[: len(path)] == path
    with COMMANDS[words].make_context("qmqp-relay", given[len(path) :]) as context:
        assert not context.args


@pytest.mark.parametrize("words", [words for words in COMMANDS if words])
def test_a_command_that_is_made_alone_has_the_same_help(words: str) -> None:
    given = words.split()
    shown = CliRunner().invoke(app_for(given), [*given, "--help"], prog_name="qmqp-relay")
    assert (shown.exit_code, shown.output) == (0, help_of(*given))


@pytest.mark.parametrize("words", [[], ["--version"], ["lists"], ["user", "list"]])
def test_other_words_are_understood_by_the_app_with_all_commands(words: list[str]) -> None:
    assert app_for(words) is main


def test_commands_are_listed_in_groups() -> None:
    text = help_of()
    headings = re.findall(r"^([A-Z].*):$", text, re.M)
    assert [heading for heading in headings if heading != "Options"] == list(GROUPS)
    listed = re.findall(r"^  ([a-z]+)  ", text, re.M)
    assert set(listed) == {words.split()[0] for words in COMMANDS}
    assert "user add" in help_of("user", "add")


def test_headings_of_help_are_bold_on_a_terminal_that_has_colours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("commands.cli.usage.takes_colours", lambda _stream: True)
    shown = CliRunner().invoke(main, ["list", "--help"], color=True)
    assert "\x1b[1mExamples:\x1b[0m" in shown.output


def test_the_version_is_told() -> None:
    shown = CliRunner().invoke(main, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"qmqp-relay {running_version()}\n")
