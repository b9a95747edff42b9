"""Refusals by rates: counted by smtpd, recorded in both databases, shown by `stats`."""

import asyncio
import signal
import smtplib
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from structlog.testing import capture_logs

from reception import rate_recorder as module
from reception.rate_recorder import RateRecorder
from reception.rates import RateExceeded
from relay.db.engine import connect, writing
from relay.report.rows import Row
from relay.report.statistics import Statistics
from relay.spool.store import Spool
from tests.integration.harness import QueueHarness
from tests.integration.test_smtpd import Program
from tests.integration.typed import lines, typed_at
from tests.services import free_port
from tests.waiting import until

CLIENT = RateExceeded("client", "messages", "192.0.2.1")


def recording(
    engine: Engine, use: Callable[[RateRecorder], Awaitable[None]], interval: float = 0.0
) -> None:
    """Runs `use` with a recorder, and closes it."""

    async def run() -> None:
        recorder = RateRecorder(asyncio.get_running_loop(), engine, interval)
        await use(recorder)
        await recorder.close()

    asyncio.run(run())


def recorded(engine: Engine) -> list[tuple[Any, ...]]:
    rows: list[Row] = Statistics(engine).rate_limited()
    return [(row["subject"], row["what"], row["name"], row["refused"]) for row in rows]


async def until_recorded(engine: Engine, count: int) -> None:
    await asyncio.to_thread(until, lambda: sum(row[3] for row in recorded(engine)) >= count)


def change(engine: Engine, statement: str) -> None:
    with writing(engine) as connection:
        connection.exec_driver_sql(statement)


def test_refusals_of_an_hour_are_one_row(engine: Engine) -> None:
    async def use(recorder: RateRecorder) -> None:
        recorder.note(CLIENT)
        await until_recorded(engine, 1)
        recorder.note(CLIENT)
        recorder.note(CLIENT)
        await until_recorded(engine, 3)
        recorder.note(RateExceeded("user", "messages", "ann"))

    recording(engine, use)
    rows = Statistics(engine).rate_limited()
    assert {(row["subject"], row["what"], row["name"]) for row in rows} == {
        ("client", "messages", "192.0.2.1"),
        ("user", "messages", "ann"),
    }
    assert all(row["last_at"].tzinfo is not None for row in rows)


def test_several_processes_add_to_the_same_rows(engine: Engine) -> None:
    async def use(recorder: RateRecorder) -> None:
        other = RateRecorder(asyncio.get_running_loop(), engine, 0.0)
        for _ in range(3):
            recorder.note(CLIENT)
            other.note(CLIENT)
        await other.close()

    recording(engine, use)
    assert recorded(engine) == [("client", "messages", "192.0.2.1", 6)]


def test_what_is_counted_at_the_end_is_recorded(engine: Engine) -> None:
    async def use(recorder: RateRecorder) -> None:
        recorder.note(CLIENT)

    recording(engine, use, interval=3600.0)
    assert recorded(engine) == [("client", "messages", "192.0.2.1", 1)]


def test_made_up_names_are_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NAMES", 30)

    async def use(recorder: RateRecorder) -> None:
        recorder.note(RateExceeded("sender", "messages", "x" * 5000))
        for number in range(100):
            for _ in range(1 + (number in (7, 90))):
                recorder.note(RateExceeded("sender", "recipients", f"{number}@example.com"))

    recording(engine, use, interval=3600.0)
    rows = recorded(engine)
    assert rows[:2] == [
        ("sender", "recipients", "", 81),
        ("sender", "recipients", "7@example.com", 2),
    ]
    assert "90@example.com" not in {name for _, _, name, _ in rows}, "thirty names were counted"
    with writing(engine) as connection:
        written = connection.exec_driver_sql("SELECT name, refused FROM rate_refusals").all()
    assert len(written) == 22
    assert sum(count for _, count in written) == 103
    assert max(len(name) for name, _ in written) == 255


def test_a_database_that_is_away_loses_no_count(engine: Engine) -> None:
    change(engine, "ALTER TABLE rate_refusals RENAME TO elsewhere")

    async def use(recorder: RateRecorder) -> None:
        with capture_logs() as logs:
            for _ in range(3):
                recorder.note(CLIENT)
            await asyncio.to_thread(until, lambda: logs)
        assert logs[0]["event"] == "rates not recorded"
        change(engine, "ALTER TABLE elsewhere RENAME TO rate_refusals")
        await until_recorded(engine, 3)

    recording(engine, use)
    assert recorded(engine) == [("client", "messages", "192.0.2.1", 3)]


def test_rows_are_kept_for_a_day(engine: Engine) -> None:
    async def use(recorder: RateRecorder) -> None:
        recorder.note(CLIENT)

    recording(engine, use)
    ago = {
        "postgresql": "hour - interval '25 hours'",
        "sqlite": "hour - 25 * 3600 * 1000000",
    }[engine.dialect.name]
    change(engine, f"UPDATE rate_refusals SET hour = {ago}")
    assert recorded(engine) == []
    recording(engine, use)
    with writing(engine) as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM rate_refusals").scalar() == 1


def test_stats_shows_who_was_refused(
    queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = typed_at(queue, spool, monkeypatch)
    assert "refused by rate limits in the last day: none" in typed("stats").stdout

    async def use(recorder: RateRecorder) -> None:
        recorder.note(CLIENT)

    recording(queue.database, use)
    [row] = [row for row in lines(typed("stats", "--json")) if row["kind"] == "rate_limit"]
    assert (row["subject"], row["what"], row["name"]) == ("client", "messages", "192.0.2.1")
    assert row["refused"] == 1
    assert "refused by rate limits in the last day:\n" in typed("stats").stdout


def test_smtpd_records_refusals(
    tmp_path: Path, clean_sqlite_url: str, spawn: Callable[..., subprocess.Popen[Any]]
) -> None:
    program = Program(
        tmp_path, clean_sqlite_url, spawn, free_port(), rate_limits="client-messages=1"
    )
    with smtplib.SMTP("127.0.0.1", program.port) as client:
        client.ehlo()
        assert [client.mail("a@example.com")[0], client.rset()[0]] == [250, 250]
        assert client.mail("a@example.com")[0] == 451
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(20) == 0
    engine = connect(clean_sqlite_url)
    until(lambda: recorded(engine))
    assert recorded(engine) == [("client", "messages", "127.0.0.1", 1)]
    engine.dispose()
