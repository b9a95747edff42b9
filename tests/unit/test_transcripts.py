"""Every dialogue of tests/transcripts is what the session says, and they cover every command."""

from pathlib import Path

import pytest

from smtpd.session import COMMANDS, SessionState
from tests.transcript import DIRECTORY, Play, Transcript, filled, read

FILES = sorted(DIRECTORY.glob("*.txt"))
DIALOGUES = [
    pytest.param(dialogue, id=f"{path.stem}-{dialogue.title}")
    for path in FILES
    for dialogue in read(path)
]
# These close the session in every state, so one dialogue of each is enough.
HTTP = {"GET", "POST", "PUT", "HEAD", "OPTIONS", "CONNECT", "DELETE", "PATCH", "PRI"}


def played(directory: Path, dialogue: Transcript, *, cut: bool) -> Play:
    play = Play(directory, dialogue, cut=cut)
    said = play.run()
    assert said == [line for line in dialogue.lines if line and not line.startswith("# ")]
    return play


@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_the_session_says_what_the_transcript_says(dialogue: Transcript, tmp_path: Path) -> None:
    played(tmp_path, dialogue, cut=False)
    if "whole" not in dialogue.options:
        played(tmp_path, dialogue, cut=True)


def test_the_transcripts_have_every_command_in_every_state(tmp_path: Path) -> None:
    seen = set[tuple[str, SessionState]]()
    for path in FILES:
        for dialogue in read(path):
            play = Play(tmp_path, dialogue)
            play.run()
            seen |= play.seen
    states = [state for state in SessionState if state <= SessionState.RECIPIENTS]
    words = {word.decode() for word in COMMANDS}
    assert {(word, state) for word in words - HTTP for state in states} - seen == set()
    assert words - {word for word, _ in seen} == set()
    assert {("FROB", state) for state in states} - seen == set(), "an unknown command too"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_as_the_program_writes_it(path: Path, tmp_path: Path) -> None:
    assert path.read_text() == filled(path, tmp_path)
