"""`.env.example` names every setting once, with its default and one line about it."""

import re
from pathlib import Path

import pytest

from relay.settings import ROLES, load, names

LINES = (Path(__file__).parents[2] / ".env.example").read_text().splitlines()
GIVEN = [
    found.groups() for line in LINES if (found := re.fullmatch(r"#(RELAY_[A-Z_]+)=(.*)", line))
]


def test_every_setting_is_listed_once():
    assert sorted(name for name, _ in GIVEN) == sorted(names())


@pytest.mark.parametrize(("name", "value"), GIVEN)
def test_value_is_the_default(name: str, value: str, monkeypatch: pytest.MonkeyPatch):
    for known in names():
        monkeypatch.delenv(known, raising=False)
    usual = [load(role) for role in ROLES]
    monkeypatch.setenv(name, value)
    assert [load(role) for role in ROLES] == usual


@pytest.mark.parametrize("name", [name for name, _ in GIVEN])
def test_every_setting_has_one_line_of_explanation(name: str):
    place = next(n for n, line in enumerate(LINES) if line.startswith(f"#{name}="))
    assert re.fullmatch(r"# \S.*\.( (Like|Compose:) \S.*)?", LINES[place - 1])
    assert not LINES[place - 2].startswith("# ") or LINES[place - 2].startswith("# ---")
    assert all(len(line) <= 120 for line in LINES if line.startswith("# "))  # a default may be long
