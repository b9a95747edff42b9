"""The plugins of examples/plugins."""

import ast
import asyncio
from pathlib import Path

from plugins.runner import Verdict
from qmqp_relay import Address, Deny, Session, Transaction
from qmqp_relay.testing import plugin_session
from tests.integration.plugins import plugins
from tests.waiting import until

EXAMPLES = Path(__file__).parents[2] / "examples" / "plugins"


def test_examples_are_as_short_as_the_guide_says():
    lengths = []
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        _, *lines = ast.parse(text).body  # without the docstring
        code = text.splitlines()[lines[0].lineno - 1 :]
        lengths.append(len([line for line in code if line.strip()]))
    assert (len(lengths), min(lengths), max(lengths)) == (3, 9, 12)


def test_greylist_accepts_the_second_attempt_after_the_delay():
    with plugin_session(f"{EXAMPLES}/greylist.py delay=1s") as client:
        client.helo()
        client.mail()
        assert client.rcpt() == "450 4.7.1 Greylisted, try again later"
        until(lambda: client.rcpt().startswith("250"))


def test_own_address_refuses_other_senders_of_a_user():
    loaded = plugins(f"{EXAMPLES}/own_address.py example.com")

    def asked(user: str | None, sender: str) -> Verdict | None:
        transaction = Transaction(Session("smtp", "192.0.2.1", user=user), sender, list, list)
        arguments = {"transaction": transaction, "sender": Address(sender)}
        return asyncio.run(loaded.ask("mail", **arguments))

    refusal = Deny("Write from an address of example.com", code=553)
    assert asked("ann", "ann@example.org") == Verdict(refusal, "own_address")
    assert asked("ann", "ann@Example.com") is None
    assert asked(None, "ann@example.org") is None


def test_bulk_route_sends_newsletters_by_a_route():
    newsletter = "List-Unsubscribe: <https://example.com/>\n\nnews\n"
    with plugin_session(f"{EXAMPLES}/bulk_route.py default") as client:
        assert client.send(newsletter).startswith("250")
        assert client.message is not None
        assert client.message.routes == ["default"]
    with plugin_session(f"{EXAMPLES}/bulk_route.py unknown") as client:
        assert client.send("\nhello\n").startswith("250")
        assert client.data("hello\n").startswith("503")
        client.mail()
        client.rcpt()
        assert client.data(newsletter).startswith("451 4.3.0")
