"""RELAY_PLUGINS: entries, arguments, and errors that name the entry."""

import pytest

from relay.plugin_entries import PluginEntry, parse_plugins
from relay.settings import Settings, SettingsError, load, seconds


def parsed(text: str) -> list[PluginEntry]:
    return [*parse_plugins(text, seconds)]


@pytest.mark.parametrize("text", ["", " \n ", ";;", "# none yet\n  # later"])
def test_empty_text_names_no_plugin(text: str):
    assert parsed(text) == []


def test_entries_stand_on_lines_or_between_semicolons():
    text = "./a.py delay=5m; qmqp_forward 10.0.0.7 628\n# not now: b\nrspamd"
    assert parsed(text) == [
        PluginEntry("./a.py", (), (("delay", "5m"),)),
        PluginEntry("qmqp_forward", ("10.0.0.7", "628")),
        PluginEntry("rspamd"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a 'x; y' z", ("x; y", "z")),
        ('a "x; \\" y"', ('x; " y',)),
        ("a x\\;y", ("x;y",)),
        ("a ''", ("",)),
        ("a a=b=c", ()),
        ("a =b 1=2", ("=b", "1=2")),
    ],
)
def test_quotes_keep_blanks_and_semicolons(text: str, words: tuple[str, ...]):
    (entry,) = parsed(text)
    assert (entry.name, entry.words) == ("a", words)


def test_the_arguments_of_the_relay_are_taken_out():
    (entry,) = parsed("a timeout=2s x message_timeout=1m fail=open y=z")
    limits = frozenset({"timeout", "message_timeout"})
    expected = PluginEntry("a", ("x",), (("y", "z"),), 2.0, 60.0, fail_open=True, own_limits=limits)
    assert entry == expected


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a 'x; b", "a: no closing quotation in its arguments"),
        ("b; a timeout=soon", "a: timeout=soon: "),
        ("a timeout=0s", "a: timeout=0s: must be more than 0"),
        ("a message_timeout=x", "a: message_timeout=x: "),
        ("a fail=maybe", "a: fail=maybe: write open, or closed"),
        ("a x=1 x=2", "a: x= is given twice"),
    ],
)
def test_an_error_names_the_entry_and_its_argument(text: str, fault: str):
    with pytest.raises(ValueError, match=fault):
        parsed(text)


def test_an_error_shows_no_other_argument(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RELAY_PLUGINS", "a password=hunter2 fail=x")
    with pytest.raises(SettingsError) as caught:
        load(Settings)
    assert str(caught.value) == "RELAY_PLUGINS: a: fail=x: write open, or closed"
