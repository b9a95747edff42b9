"""The kept inputs of the fuzzers, given to their targets without atheris."""

from pathlib import Path

import pytest

from tests.fuzz import __main__ as program
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_holds_for_every_kept_input(target: str) -> None:
    inputs = program.kept(target)
    assert len(inputs) == len(set(inputs)) > 10
    for data in inputs:
        assert len(data) <= program.LONGEST
        try:
            TARGETS[target](data)
        except AssertionError as error:
            raise AssertionError(f"{program.written(data)}: {error}") from error


def test_the_program_knows_every_target() -> None:
    assert tuple(TARGETS) == program.TARGETS


@pytest.mark.parametrize("data", [b"", b"\x00", b"\xff" * 3, bytes(range(256)), b"\r\n.\r\n" * 9])
def test_the_targets_hold_for_any_bytes(data: bytes) -> None:
    for target in TARGETS.values():
        target(data)


def test_a_target_fails_if_a_parser_breaks_its_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smtpd.content._END", b"\n.\n")
    with pytest.raises(AssertionError):
        TARGETS["content"](b"\x05hello\n.\nrest\r\n.\r\n")


@pytest.mark.parametrize("data", [bytes(range(256)), b"#x", b"\\x23", b"", b" x "])
def test_an_input_is_written_as_a_line_of_the_corpus(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "CORPUS", tmp_path)
    (tmp_path / "content.txt").write_text(f"# a comment\n{program.written(data)}\n")
    assert program.kept("content") == [data]
