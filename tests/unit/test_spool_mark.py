"""The file of the mark: whole and durable, whatever other processes do, and made again if lost."""

import os
from pathlib import Path

import pytest

from relay.ids import new_id
from relay.spool.journal.adoption import adopt
from relay.spool.journal.contents import highest_mark
from relay.spool.journal.directory import DIRECTORY, MARK, NEW, JournalDirectory
from relay.spool.journal.scan import batch_headers, read_header
from relay.spool.mark import SpoolMark
from tests.journal_records import message, new_writer, open_journal, told_calls


@pytest.fixture
def directory(tmp_path: Path) -> JournalDirectory:
    return open_journal(tmp_path)


def content(directory: JournalDirectory) -> bytes:
    return directory.open(MARK).read(32, 0)


def test_a_mark_is_written_and_leaves_no_other_file(directory: JournalDirectory) -> None:
    mark = SpoolMark(directory, "ab" * 16)
    for number in (3, 2, 7):
        mark.learn(number)
    assert (mark.known, content(directory), directory.names()) == (7, b"7\n", [MARK])
    assert SpoolMark(directory, "ab" * 16).known == 7


def test_two_processes_of_one_number_do_not_write_the_same_file(
    directory: JournalDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two containers each process may have the number 7."""
    rename, other = JournalDirectory.rename, SpoolMark(directory, "ab" * 16)
    calls = iter([True])

    def meanwhile(one: JournalDirectory, old: str, new: str) -> None:
        if next(calls, False):
            other.learn(9)
        rename(one, old, new)

    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(JournalDirectory, "rename", meanwhile)
    mine = SpoolMark(directory, "ab" * 16)
    mine.learn(10)
    assert (content(directory), directory.names()) == (b"10\n", [MARK])


def test_a_slower_process_does_not_put_an_older_mark_back(directory: JournalDirectory) -> None:
    slow = SpoolMark(directory, "ab" * 16)
    SpoolMark(directory, "ab" * 16).learn(9)
    slow.learn(8)
    assert content(directory) == b"9\n"


def test_the_file_is_durable_before_and_after_it_has_its_name(
    directory: JournalDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = told_calls(monkeypatch)
    SpoolMark(directory, "ab" * 16).learn(1)
    assert calls == ["write", "sync", f"rename to {MARK}", "sync names"]


def test_what_a_process_left_that_died_while_it_wrote_is_removed(
    directory: JournalDirectory,
) -> None:
    directory.create(new_id() + NEW).close()
    SpoolMark(directory, "ab" * 16).learn(1)
    adopt(directory, skip=set())
    assert directory.names() == [MARK]


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "cut off"])
def test_a_lost_mark_is_made_again_from_the_batches(
    directory: JournalDirectory, tmp_path: Path, lost: bool
) -> None:
    writer, _ = new_writer(directory)
    for number in (4, 6, 5):
        writer.append([message()], mark=number)
    header = read_header(writer.files[writer.segment])
    SpoolMark(directory, header.spool).learn_from_journal()
    if lost:
        directory.unlink(MARK)
    else:
        (tmp_path / DIRECTORY / MARK).write_bytes(b"")
    other = SpoolMark(directory, "cd" * 16)
    assert other.known == 0, "the batches of another spool do not count"
    mark = SpoolMark(directory, header.spool)
    assert mark.known == 6
    assert (MARK in directory.names()) is not lost, "a command writes nothing"
    mark.learn_from_journal(unsealed=True)
    assert content(directory) == b"6\n"


def test_the_highest_mark_is_found_behind_damage(directory: JournalDirectory) -> None:
    writer, _ = new_writer(directory)
    batches = [writer.append([message()], mark=number) for number in (8, 3, 9)]
    file = writer.files[writer.segment]
    file.write([b"?"], batches[1].start)
    header = read_header(file)
    assert [one.mark for one in batch_headers(file, header)] == [8, 9]
    file.write([b"?"], batches[2].start)
    assert highest_mark(directory, header.spool) == 8
    file.protect()
    assert highest_mark(directory, header.spool) == 8
    assert highest_mark(directory, header.spool, unsealed=True) == 0
