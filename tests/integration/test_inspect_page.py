"""docs/inspect.md names the views' columns as they are; test_console.py asks its questions."""

import re
from pathlib import Path

from sqlalchemy import inspect

from migrations.tables import VIEW_COLUMNS
from migrations.views import VIEWS
from relay.db import engine as database
from relay.queue.outcome import Outcome
from relay.queue.states import State

PAGE = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text()


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def first_column(title: str) -> list[str]:
    rows = re.findall(r"^\| (`.*?) \|", section(title), re.MULTILINE)
    return re.findall(r"`(\w+)`", " ".join(rows))


def test_columns(database_url: str):
    engine = database.connect(database_url)
    for view in VIEWS:
        given = [column["name"] for column in inspect(engine).get_columns(view)]
        listed = first_column("`mail_queue`" if view == "mail_history" else f"`{view}`")
        assert sorted(listed) == sorted(given), view
    engine.dispose()


def test_the_page_describes_each_column_as_the_schema_does():
    for view, columns in VIEW_COLUMNS.items():
        title = "`mail_queue`" if view == "mail_history" else f"`{view}`"
        listed = re.findall(r"^\| `(\w+)` \| (.*) \|$", section(title), re.MULTILINE)
        assert listed == list(columns.items()), view


def test_states_and_outcomes():
    assert set(first_column("States")) == set(State)
    assert set(first_column("Outcomes")) == set(Outcome)


def test_each_question_has_a_command_a_statement_and_a_link():
    questions = re.findall(
        r"(?m)^(\d+)\\\. [^\n]+\n\n```sh\nqmqp-relay .*\n```\n\n```sql$", section("Questions")
    )
    assert questions == [str(number) for number in range(1, 25)]
    further = re.findall(r"(?m)^(\d+)\\\. [^\n]*\?.*\n\n```sql$", section("More questions"))
    assert further == [str(number) for number in range(1, 21)]
