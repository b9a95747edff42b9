"""Group commit: no item is lost or answered twice, and a bad row fails alone."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError

from relay.db.group_commit import CommitThread
from tests.waiting import until


def outage() -> OperationalError:
    return OperationalError("COMMIT", {}, ConnectionError("away"))


class Database:
    """Commits every batch, unless `fault` raises an error; remembers each round."""

    def __init__(self) -> None:
        self.rounds: list[list[Any]] = []
        self.fault: Callable[[list[Any]], None] = lambda items: None
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def commit(self, items: Sequence[Any]) -> list[str]:
        self.entered.set()
        assert self.go_on.wait(20)
        self.fault(list(items))
        self.rounds.append(list(items))
        return [f"{item} done" for item in items]


class CommitHarness:
    """A writer whose answers come in through `posts`, as they do on an event loop."""

    def __init__(self, database: Database, **options: Any) -> None:
        self.posts: queue.Queue[Callable[[], None]] = queue.Queue()
        self.answers: dict[Any, Any] = {}
        self.writer: CommitThread[Any, str] = CommitThread(
            "test", database.commit, post=self.posts.put, **options
        )

    def put(self, item: Any, **options: Any) -> None:
        self.writer.put(item, lambda answer: self._answer(item, answer), **options)

    def _answer(self, item: Any, answer: Any) -> None:
        assert item not in self.answers, "answered twice"
        self.answers[item] = answer

    def wait(self) -> dict[Any, Any]:
        """Run one call that was posted; all answers so far."""
        self.posts.get(timeout=20)()
        return self.answers

    def finish(self) -> dict[Any, Any]:
        """Close, and run all that was posted."""
        assert self.writer.close(20)
        while not self.posts.empty():
            self.wait()
        return self.answers


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def harness(database: Database) -> Iterator[CommitHarness]:
    harness = CommitHarness(database)
    yield harness
    database.go_on.set()
    database.fault = lambda items: None
    harness.writer.close(20)


def test_an_urgent_item_takes_along_what_has_gathered(database: Database) -> None:
    harness = CommitHarness(database, gather=1e6)
    harness.put(1)
    harness.put(2)  # after a batch of two the next one gathers
    harness.writer.start()
    harness.wait()
    harness.put("patient")
    harness.put("urgent", urgent=True)
    harness.wait()
    assert database.rounds == [[1, 2], ["patient", "urgent"]]
    harness.finish()


def test_items_that_gather_within_a_commit_are_the_next_batch(
    harness: CommitHarness, database: Database
) -> None:
    database.go_on.clear()
    harness.writer.start()
    harness.put("first")
    assert database.entered.wait(20)
    for n in range(5):
        harness.put(n)
    database.go_on.set()
    assert harness.wait() == {"first": "first done"}
    assert harness.wait() == {"first": "first done"} | {n: f"{n} done" for n in range(5)}
    assert database.rounds == [["first"], [0, 1, 2, 3, 4]]


def test_all_results_of_a_commit_reach_the_loop_in_one_call(harness: CommitHarness) -> None:
    for n in range(100):
        harness.put(n)
    harness.writer.start()
    assert len(harness.wait()) == 100
    assert harness.posts.empty()


def test_batches_are_bounded_and_observed(database: Database) -> None:
    sizes: list[int] = []
    harness = CommitHarness(database, largest=4, observe=lambda size, seconds: sizes.append(size))
    for n in range(10):
        harness.put(n)
    harness.writer.start()
    assert list(harness.finish()) == list(range(10))
    assert [len(round_) for round_ in database.rounds] == sizes == [4, 4, 2]


def test_one_bad_row_fails_alone(harness: CommitHarness, database: Database) -> None:
    def fault(items: list[Any]) -> None:
        if "bad" in items:
            raise IntegrityError("INSERT", {}, ValueError("bad"))

    database.fault = fault
    for item in (1, "bad", 2):
        harness.put(item)
    harness.writer.start()
    answers = harness.finish()
    assert isinstance(answers.pop("bad"), IntegrityError)
    assert answers == {1: "1 done", 2: "2 done"}


def test_an_error_without_a_text_does_not_end_the_thread(
    harness: CommitHarness, database: Database
) -> None:
    def fault(items: list[Any]) -> None:
        if items == ["wordless"]:
            raise AssertionError

    database.fault = fault
    harness.put("wordless")
    harness.writer.start()
    assert isinstance(harness.wait()["wordless"], AssertionError)
    harness.put("next")
    assert harness.wait()["next"] == "next done"


def test_a_transaction_is_run_again_whole_until_the_database_is_back(
    harness: CommitHarness, database: Database
) -> None:
    tries: list[list[Any]] = []

    def fault(items: list[Any]) -> None:
        tries.append(items)
        if len(tries) < 3:
            raise outage()

    database.fault = fault
    for n in range(3):
        harness.put(n)
    harness.writer.start()
    assert harness.wait() == {n: f"{n} done" for n in range(3)}
    assert tries == [[0, 1, 2]] * 3
    assert not harness.writer.database_away


def test_close_commits_waiting_items(harness: CommitHarness) -> None:
    for n in range(600):
        harness.put(n)
    harness.writer.start()
    assert len(harness.finish()) == 600


def away(items: list[Any]) -> None:
    raise outage()


def test_closing_while_the_database_is_away_gives_up_in_the_end(
    harness: CommitHarness, database: Database
) -> None:
    database.fault = away
    harness.put("never")
    harness.writer.start()
    until(lambda: harness.writer.database_away)
    assert harness.writer.close(0.5)
    assert isinstance(harness.wait()["never"], OperationalError)


def test_a_database_that_comes_back_while_we_close_gets_everything(
    harness: CommitHarness, database: Database
) -> None:
    """The last outcomes of a worker are worth waiting for."""
    database.fault = away
    harness.put("outcome")
    harness.writer.start()
    until(lambda: harness.writer.database_away)
    closing = threading.Thread(target=harness.writer.close, args=(20,))
    closing.start()
    seen, failures = threading.Event(), iter((True, True))

    def back_at_the_third(items: list[Any]) -> None:
        if next(failures, False):
            raise outage()
        seen.set()

    database.fault = back_at_the_third
    assert seen.wait(10)
    closing.join(10)
    assert harness.wait() == {"outcome": "outcome done"}


def test_a_callback_that_fails_does_not_affect_the_others(harness: CommitHarness) -> None:
    """A caller that is gone must not leave the rest of the round without its 250."""

    def gone(_: Any) -> None:
        raise RuntimeError("gone")

    harness.put("before")
    harness.writer.put("gone", gone)
    harness.put("after")
    harness.writer.start()
    assert harness.wait() == {"before": "before done", "after": "after done"}


def test_every_item_gets_one_result_under_load(database: Database) -> None:
    harness = CommitHarness(database, largest=16)
    broken = iter(range(1000))

    def fault(items: list[Any]) -> None:
        if next(broken) % 7 == 3:
            raise IntegrityError("INSERT", {}, ValueError("bad"))

    database.fault = fault
    harness.writer.start()

    def work(worker: int) -> None:
        for n in range(100):
            harness.put((worker, n))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers = harness.finish()
    assert set(answers) == {(worker, n) for worker in range(4) for n in range(100)}
    assert harness.writer.close(20), "the thread has ended"
    for worker in range(4):
        committed = [n for round_ in database.rounds for w, n in round_ if w == worker]
        assert committed == sorted(committed), "in the order they came"
