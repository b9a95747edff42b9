"""docs/plugins.md: every block of code on the page runs, and does what the text says.

The first line of a block of Python or TOML is a comment with the name of its file. The blocks of
the chapter "A plugin step by step" are appended to one file, which is tried after each of them.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest

from qmqp.sink import Answer, Rule, running_sink
from qmqp_relay import hooks
from qmqp_relay.testing import PluginClient, plugin_session
from tests.waiting import until

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plugins.md").read_text()
BUNDLED = ROOT / "plugins" / "bundled" / "qmqp_forward.py"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
FILES = [
    (match[1], text)
    for _, text in BLOCKS
    if (match := re.match(r"# ([\w/.]+\.(?:py|toml))\n", text))
]
STEPS = [*accumulate(text for name, text in FILES if name == "qmqp_forward.py")]
HOOKS = {Path(name).stem: text for name, text in FILES if name.startswith("hooks/")}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with all files of the page."""
    for name, text in FILES:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_is_a_file_or_a_command():
    assert {language for language, _ in BLOCKS} == {"python", "toml", "sh"}
    assert len(FILES) == sum(language != "sh" for language, _ in BLOCKS)


def test_the_commands_of_the_page_run(directory: Path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    commands = [text for language, text in BLOCKS if language == "sh"]
    shown = [
        subprocess.run(
            ["bash", "-euc", command],
            cwd=directory,
            env=environment | {"RELAY_STATE_DIR": str(directory / "var")},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        for command in commands
    ]
    assert [one.returncode for one in shown] == [0] * len(commands), shown
    first, tested, packaged = shown
    assert "no_lottery" in first.stdout
    assert "2 passed" in tested.stdout
    assert f"{directory}/site/no_lottery.py" in packaged.stdout


# --- a plugin step by step
# ------------------------------------------------------------------------------


def reply_after(step: int, directory: Path, answer: Answer, options: str = "") -> str:
    """The reply to a message, with the file as it is after this step."""
    path = directory / "step.py"
    path.write_text(STEPS[step - 1])
    with running_sink(Rule(answer)) as sink:
        with plugin_session(f"{path} 127.0.0.1 {sink.port} {options}") as client:
            reply = client.send()
        sent = b"" if not sink.received else sink.received[0].sender
    assert sent == (b"ann@example.com" if sink.count else b"")
    return reply


K, Z, D = (Answer(letter, b"says the server") for letter in (b"K", b"Z", b"D"))
NOTHING = Answer(raw=b"")
QUEUED = r"250 2\.0\.0 Ok: queued as [0-9a-f]{32}"


@pytest.mark.parametrize(
    ("step", "answer", "reply"),
    [
        (1, K, QUEUED),
        (2, K, QUEUED),
        (3, K, QUEUED),
        (4, K, r"250 2\.0\.0 Ok"),
        (4, D, QUEUED),
        (5, K, r"250 2\.0\.0 Ok"),
        (6, K, r"250 2\.0\.0 Ok"),
        (6, Z, QUEUED),
        (7, K, r"250 2\.0\.0 Ok: says the server"),
        (7, Z, r"451 4\.0\.0 says the server"),
        (7, D, r"550 5\.0\.0 says the server"),
        (7, NOTHING, QUEUED),
        (8, K, r"250 2\.0\.0 Ok: says the server"),
        (8, NOTHING, QUEUED),
    ],
)
def test_each_step_works(tmp_path: Path, step: int, answer: Answer, reply: str):
    assert re.fullmatch(reply, reply_after(step, tmp_path, answer))


def test_the_last_step_knows_only(tmp_path: Path):
    assert len(STEPS) == 8
    reply = reply_after(8, tmp_path, NOTHING, "only=yes")
    assert reply == "451 4.4.0 Cannot forward the message now"


def statements(text: str) -> dict[str, str]:
    """The statements of a module by what they define; the last definition counts."""
    found = {}
    for node in ast.parse(text).body:
        name = getattr(node, "name", None) or ast.unparse(node)
        found[name] = ast.unparse(node)
    return found


def test_the_result_is_the_bundled_plugin():
    bundled = ast.parse(BUNDLED.read_text())
    assert isinstance(bundled.body[0], ast.Expr)
    without_docstring = ast.unparse(ast.Module(bundled.body[1:], []))
    assert statements(STEPS[-1]) == statements(without_docstring)


# --- every hook
# -----------------------------------------------------------------------------------------


def connected(client: PluginClient) -> None:
    assert client.banner.startswith("220")


def greeted(client: PluginClient) -> None:
    assert client.helo("localhost") == "550 5.7.1 Say your own name"
    assert client.helo().startswith("250")


def sent_mail(client: PluginClient) -> None:
    client.helo()
    assert client.mail(parameters="SIZE=10000001") == "452 4.3.4 Send large mail at night"
    assert client.mail(parameters="SIZE=100").startswith("250")


def named_recipients(client: PluginClient) -> None:
    recipients = ("old@example.org", *(f"r{number}@example.org" for number in range(50)))
    assert client.send(recipients=recipients) == "552 5.5.3 Too many recipients"
    assert client.data("hello\n").startswith("250")
    assert client.message is not None
    assert client.message.recipients[0] == "new@example.org"


def began_data(client: PluginClient) -> None:
    assert client.send().startswith("250")


def sent_content(client: PluginClient) -> None:
    assert client.send("\nX-Test-Pattern\n") == "451 4.7.1 Come again"
    assert client.send("\nhello\n").startswith("250")
    assert client.message is not None
    assert client.message.hold_reason is None
    length = len(client.message.content.partition(b"\n")[2])
    assert client.message.header["X-Size"] == str(length)


def took_message(client: PluginClient) -> None:
    assert client.send(recipients=("archive@example.org",)) == "250 2.0.0 Ok: archived"
    (stored,) = Path("archive/new").iterdir()
    assert stored.read_bytes().endswith(b"hello\n")
    assert client.messages == []


def sent_message(client: PluginClient) -> None:
    assert client.send().startswith("250")


def refused_thrice(client: PluginClient) -> None:
    client.helo()
    for _ in range(3):
        assert client.command("RCPT TO:<a@example.org>").startswith("503")


SCENES: dict[str, Callable[[PluginClient], None]] = {
    "connect": connected,
    "helo": greeted,
    "mail": sent_mail,
    "rcpt": named_recipients,
    "data": began_data,
    "message": sent_content,
    "queue": took_message,
    "queue_post": sent_message,
    "deny": refused_thrice,
    "reset_transaction": sent_message,
    "disconnect": sent_message,
}


@pytest.mark.parametrize("hook", SCENES)
def test_the_example_of_each_hook_works(directory: Path, hook: str):
    entries = f"./hooks/{hook}.py"
    strangers = {"client_networks": ("10.0.0.1",), "recipient_domains": ("example.org",)}
    if hook == "disconnect":
        entries += "; ./hooks/reset_transaction.py"
    with plugin_session(entries, **strangers) as client:
        SCENES[hook](client)
    if hook == "queue_post":
        until(lambda: written("accepted").endswith(" ann@example.com\n"))
    if hook == "disconnect":
        until(lambda: written("last_client") == "127.0.0.1 ann@example.com\n")


def written(name: str) -> str:
    """What a hook has written to a file so far."""
    path = Path(name)
    return path.read_text() if path.exists() else ""


def test_examples_work_together(directory: Path):
    with plugin_session("./hooks/deny.py; ./hooks/data.py") as client:
        refused_thrice(client)
        client.mail()
        client.rcpt()
        assert client.data("hello\n") == "451 4.7.1 Not now"


def test_register_gets_the_arguments(directory: Path):
    with plugin_session("./hooks/register.py name delay=1m; ./no_lottery.py") as client:
        assert client.banner.startswith("220")


def test_every_hook_has_a_section_with_its_signature():
    sections = dict(re.findall(r"^### (\w+)\((.*)\)$", PAGE, re.MULTILINE))
    signatures = {
        name: ", ".join(function.__code__.co_varnames[: function.__code__.co_argcount])
        for name, function in vars(hooks).items()
        if hasattr(function, f"{hooks.PROJECT}_spec")
    }
    assert sections == signatures
    assert list(HOOKS) == list(sections)
