"""`qmqp_relay.testing`: a session in a test, in three lines."""

from pathlib import Path

import pytest

from qmqp_relay.testing import plugin_session
from relay.settings import SettingsError
from tests.integration.plugins import plugin_file

SPAM = """
    @hookimpl
    def rcpt(recipient):
        if recipient.local == "unknown":
            return Deny("No such user", enhanced="5.1.1")

    @hookimpl
    async def message(transaction):
        if "spam" in transaction.header["subject"]:
            return DenySoft("Not now")
        transaction.add_header("X-Seen", transaction.sender.domain)
        if transaction.content.size > 100_000:
            transaction.hold("large")
"""


def test_a_session_in_three_lines(tmp_path: Path):
    plugin = plugin_file(tmp_path, SPAM)
    with plugin_session(f"{plugin}") as client:
        assert client.send("Subject: spam\n\nbuy\n") == "451 4.7.1 Not now"
        assert client.message is None


def test_replies_and_messages(tmp_path: Path):
    plugin = plugin_file(tmp_path, SPAM)
    with plugin_session(f"{plugin}", hostname="mx.example") as client:
        assert client.banner == "220 mx.example ESMTP qmqp-relay"
        assert client.send(recipients=("unknown@example.org",)) == "550 5.1.1 No such user"
        assert client.send("Subject: hi\n\n.dot\n").startswith("250 2.0.0 Ok: queued as ")
        message = client.message
        assert message is not None
        assert message.content.startswith(b"X-Seen: example.com\nReceived: from client.example")
        assert message.content.endswith(b"Subject: hi\n\n.dot\n")
        assert (message.recipients, message.routes) == (["bob@example.org"], ["default"])
        assert message.header["x-seen"] == "example.com"
        assert message.hold_reason is None
        client.send("Subject: large\n\n" + "x\n" * 60_000)
        assert len(client.messages) == 2
        assert client.messages[1].hold_reason == "held by plugin example: large"
        assert client.messages[1].content.endswith(b"x\nx\n")
        assert client.command("QUIT") == "221 2.0.0 Bye"


def test_a_plugin_that_cannot_be_loaded_is_an_error(tmp_path: Path):
    with pytest.raises(SettingsError, match="there is no file"), plugin_session(f"{tmp_path}/x.py"):
        pass


def test_a_held_message_names_the_plugin_that_holds_it(tmp_path: Path):
    other = plugin_file(tmp_path, "@hookimpl\ndef message():\n    return None\n", "other")
    holder = plugin_file(
        tmp_path, "@hookimpl\ndef message(transaction):\n    transaction.hold('odd')\n", "holder"
    )
    with plugin_session(f"{other}; {holder}; {other}") as client:
        client.send()
        assert client.message is not None
        assert client.message.hold_reason == "held by plugin holder: odd"
