"""The loader: names, order, and errors that name file and line."""

import sys
from pathlib import Path
from textwrap import dedent

import pytest

from plugins.loader import PluginError, load
from plugins.runner import Plugins
from relay.settings import Settings, SettingsError
from relay.settings import load as load_settings


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("from qmqp_relay import *\n" + dedent(text))
    return path


def loaded(entries: str) -> Plugins:
    plugins = load(load_settings(Settings, plugins=entries))
    assert plugins is not None
    return plugins


HELO = """
    seen = []

    @hookimpl
    def register(relay, args):
        seen.append((relay.hostname, args.words, args.options))

    @hookimpl
    def helo(name):
        return None
"""


def test_without_plugins_nothing_is_made():
    assert load(load_settings(Settings)) is None


def test_plugins_run_in_the_order_in_which_they_are_named():
    for name in "abc":
        write(f"{name}.py", HELO)
    plugins = loaded("./c.py; a.py; ./b.py; ./a.py")
    assert [plugin.name for plugin in plugins.loaded] == ["c", "a", "b", "a#2"]
    assert [one.plugin for one in plugins.functions("helo")] == ["c", "a", "b", "a#2"]
    assert plugins.hooks == {"helo"}
    assert [plugin.hooks for plugin in plugins.loaded] == [("register", "helo")] * 4


def test_pluggys_tryfirst_counts():
    write("a.py", HELO)
    write("b.py", HELO.replace("@hookimpl\n    def helo", "@hookimpl(tryfirst=True)\n    def helo"))
    assert [one.plugin for one in loaded("./a.py\n./b.py").functions("helo")] == ["b", "a"]


def test_register_gets_the_arguments_of_each_entry():
    write("a.py", HELO)
    plugins = loaded("./a.py one x=1 timeout=9s; ./a.py")
    seen = [one.function.__globals__["seen"] for one in plugins.functions("helo")]
    assert [words[0][1:] for words in seen] == [(("one",), {"x": "1"}), ((), {})]
    assert [one.timeout for one in plugins.functions("helo")] == [9.0, 5.0]


def test_message_and_queue_have_the_longer_time():
    write("a.py", "@hookimpl\ndef message(): pass\n@hookimpl\ndef queue(): pass")
    plugins = loaded("./a.py message_timeout=2m")
    assert [plugins.functions(name)[0].timeout for name in ("message", "queue")] == [120.0, 120.0]


def test_a_name_without_a_slash_is_a_module(monkeypatch: pytest.MonkeyPatch):
    write("one_package/plugin.py", HELO)
    Path("one_package/__init__.py").touch()
    plugins = loaded("one_package.plugin a; one_package.plugin b")
    assert [plugin.name for plugin in plugins.loaded] == [
        "one_package.plugin",
        "one_package.plugin#2",
    ]
    words = [one.function.__globals__["seen"][0][1] for one in plugins.functions("helo")]
    assert words == [("a",), ("b",)], "each entry has a module of its own"
    del sys.modules["one_package.plugin"], sys.modules["one_package"]


@pytest.fixture
def installed(tmp_path: Path) -> None:
    """Two installed packages with plugins, by their entry points."""
    for name in ("zebra", "early"):
        write(f"{name}_plugin.py", HELO)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[qmqp_relay]\n{name} = {name}_plugin\n")


@pytest.mark.usefixtures("installed")
def test_entry_points_follow_behind_the_named_plugins():
    write("a.py", HELO)
    assert [plugin.name for plugin in loaded("./a.py").loaded] == ["a", "early", "zebra"]
    assert [plugin.name for plugin in loaded("zebra x; ./a.py").loaded] == ["zebra", "a", "early"]


FAULTS = {
    "a file that is missing": (None, r"there is no file .*/bad.py"),
    "syntax": ("x = 1\ndef (:", r"/bad.py, line 3: invalid syntax"),
    "an error of the module": ("x = 1\ny = z", r"/bad.py, line 3: NameError: name 'z' is not"),
    "an import": (
        "import no_such_module",
        r"/bad.py, line 2: ModuleNotFoundError: No",
    ),
    "an exit": ("raise SystemExit('enough')", r"/bad.py, line 2: SystemExit: enough"),
    "no hook": ("def helo(): pass", r"it has no hook: put @hookimpl before its functions"),
    "an unknown hook": (
        "@hookimpl\ndef recpt(): pass",
        r"/bad.py, line 2: there is no hook recpt; did you mean rcpt\?",
    ),
    "an unknown argument": (
        "@hookimpl\ndef rcpt(recipent): pass",
        r"recipent",
    ),
    "a wrapper": (
        "@hookimpl(wrapper=True)\ndef rcpt():\n    return (yield)",
        r"/bad.py, line 2: rcpt is a wrapper",
    ),
    "register is async": (
        "@hookimpl\nasync def register(): pass",
        r"/bad.py, line 2: register must be a def",
    ),
    "register raises": (
        "@hookimpl\ndef register(args):\n    args.option('host')",
        r"/bad.py, line 4: needs host=",
    ),
    "register raises something else": (
        "@hookimpl\ndef register(args):\n    1 / 0",
        r"/bad.py, line 4: ZeroDivisionError: division by zero",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_file_and_line(fault: str):
    text, expected = FAULTS[fault]
    if text is not None:
        write("bad.py", text)
    with pytest.raises(PluginError, match=expected) as caught:
        loaded("./bad.py")
    assert str(caught.value).startswith("RELAY_PLUGINS: ./bad.py: ")
    assert isinstance(caught.value, SettingsError)


def test_arguments_without_register_are_a_fault():
    write("bad.py", "@hookimpl\ndef helo(): pass")
    with pytest.raises(PluginError, match="it takes no arguments: it has no hook register"):
        loaded("./bad.py x")


def test_an_unknown_name_has_a_hint():
    with pytest.raises(PluginError, match="there is no such plugin; a file is written with a /"):
        loaded("no_such_plugin_at_all")


def test_a_hook_without_its_mark_is_warned_about(capfd: pytest.CaptureFixture[str]):
    write("a.py", HELO + "\n    def rcpt(): pass")
    loaded("./a.py")
    assert "hook without hookimpl" in "".join(capfd.readouterr())
