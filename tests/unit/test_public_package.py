"""The package `qmqp_relay`: answers, addresses, transactions, contents, arguments."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

import qmqp_relay
from qmqp_relay import (
    OK,
    Address,
    Deny,
    DenySoft,
    MessageContent,
    PluginArguments,
    Relay,
    RewritableAddress,
    Session,
    Transaction,
)
from qmqp_relay.answers import LONGEST_TEXT, as_answer
from qmqp_relay.content import ContentClosed
from qmqp_relay.registration import PluginArgumentError
from qmqp_relay.session import HEADER_LIMIT, LONGEST_LINE
from relay.log import get_logger


def test_every_public_name_has_a_text():
    assert {name for name in qmqp_relay.__all__ if not hasattr(qmqp_relay, name)} == set()
    classes = [getattr(qmqp_relay, name) for name in qmqp_relay.__all__ if name[0].isupper()]
    assert [each for each in classes if isinstance(each, type) and not each.__doc__] == []
    assert (Path(qmqp_relay.__file__).parent / "py.typed").exists()


def test_a_plugin_imports_no_server():
    """`from qmqp_relay import ...` costs a command little."""
    code = "import sys, qmqp_relay; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "qmqp_relay.session" in modules
    assert {"smtpd", "reception", "plugins", "sqlalchemy"} & set(modules) == set()


# Answers


def test_replies():
    assert Deny().reply == "550 5.7.1 Denied"
    assert Deny("No such user", enhanced="5.1.1").reply == "550 5.1.1 No such user"
    assert DenySoft("later", code=450, enhanced="4.2.0").reply == "450 4.2.0 later"
    assert not Deny().disconnect
    assert DenySoft("busy", code=421, enhanced="4.3.2").disconnect


def test_a_text_becomes_one_bounded_line_of_ascii():
    assert Deny("a\r\n250 ok\xe9").text == "a??250 ok?"
    assert len(Deny("x" * 1000).text) == LONGEST_TEXT
    assert Deny("").text == "Denied"
    assert OK("queued\nthere").text == "queued?there"


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (lambda: Deny("x", code=450), "Deny: the code 450 is not between 500 and 599"),
        (lambda: DenySoft("x", code=550), "DenySoft: the code 550 is not between 400 and 499"),
        (lambda: Deny("x", enhanced="4.7.1"), "Deny: the enhanced code '4.7.1' is not like 5.7.1"),
        (lambda: DenySoft("x", enhanced="x"), "DenySoft: the enhanced code 'x' is not like 4.7.1"),
    ],
)
def test_codes_of_another_class_are_refused(answer, fault: str):
    with pytest.raises(ValueError, match=fault):
        answer()


def test_a_class_is_an_answer_too():
    assert [as_answer(each) for each in (None, OK, Deny, DenySoft)] == [
        None,
        OK(),
        Deny(),
        DenySoft(),
    ]


@pytest.mark.parametrize("value", [True, 0, "550 no", b"", (550, "no"), Deny("x").reply])
def test_anything_else_is_no_answer(value: object):
    with pytest.raises(TypeError, match="it may return None, OK"):
        as_answer(value)


# Transactions


def transaction() -> Transaction:
    return Transaction(
        Session("smtp", "192.0.2.1"), "a@example.com", lambda: ["b@example.org"], lambda: ["fast"]
    )


def test_addresses_have_parts():
    address = Address("some@where@example.org")
    assert (address.local, address.domain, str(address)) == (
        "some@where",
        "example.org",
        "some@where@example.org",
    )
    assert (Address("").local, Address("").domain) == ("", "")


def test_the_last_rewrite_counts():
    address = RewritableAddress("a@example.org")
    address.rewrite("b@example.org")
    address.rewrite("c@example.org")
    assert address.rewritten == "c@example.org"
    assert address.address == "a@example.org"


@pytest.mark.parametrize(
    "wrong", ["", "a", "@", "a@", "@b", "a b@c", "a@b\n", "<a@b>", "\xe9@b", "x" * 1000 + "@b"]
)
def test_no_address_is_no_rewrite(wrong: str):
    with pytest.raises(ValueError, match="is no address"):
        RewritableAddress("a@example.org").rewrite(wrong)


def test_fields_go_to_the_top():
    one = transaction()
    one.add_header("X-First", "1")
    one.add_header("X-Second", "a\n\tb \xe9")
    assert one.prefix == "X-Second: a\n\tb \xe9\nX-First: 1\n".encode()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("", "x"),
        ("a b", "x"),
        ("a:", "x"),
        ("a\n", "x"),
        ("\xe9", "x"),
        ("x", "a\nb"),
        ("x", "a\r\n b"),
        ("x", "a\n\nbody"),
        ("x", "a\n "),
        ("x", "a\n"),
        ("x", "\0"),
        ("x", "\x7f"),
        ("x", "\ud800"),
        ("x", "y" * LONGEST_LINE),
        ("x", "a\n " + "y" * LONGEST_LINE),
    ],
)
def test_what_is_no_field_is_refused(name: str, value: str):
    one = transaction()
    with pytest.raises(ValueError):
        one.add_header(name, value)
    assert one.prefix == b""


def test_fields_are_bounded():
    one = transaction()
    for _ in range(HEADER_LIMIT // 910):
        one.add_header("X-Long", "y" * 900)
    with pytest.raises(ValueError, match=f"longer than {HEADER_LIMIT} octets"):
        one.add_header("X-Long", "y" * 900)
    assert len(one.prefix) <= HEADER_LIMIT


def test_only_a_known_route_can_be_set():
    one = transaction()
    one.route = "fast"
    with pytest.raises(ValueError, match="there is no route 'slow'; there are fast"):
        one.route = "slow"
    assert one.route == "fast"
    one.route = None
    assert one.route is None


def test_a_reason_is_one_bounded_line():
    one = transaction()
    one.hold("a\nb" + "x" * 1000)
    assert one.hold_reason is not None
    assert one.hold_reason.startswith("a?bx")
    assert len(one.hold_reason) == 500
    one.hold("")
    assert one.hold_reason == "no reason given"


def test_content_cannot_be_read_before_it_has_come():
    with pytest.raises(RuntimeError, match="only the hooks `message` and `queue`"):
        _ = transaction().content


# Contents

TEXT = b"Subject: one\n two\nTo: b@example.org\n\nbody\n" + b"x" * 5000


def content(text: bytes = TEXT) -> MessageContent:
    return MessageContent(lambda size, offset: text[offset : offset + size], len(text))


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
def test_blocks_are_the_added_fields_and_the_text(size: int):
    one = content()
    one.added = b"X-A: 1\n"

    async def read() -> list[bytes]:
        return [block async for block in one.blocks(size)]

    blocks = [*one.blocks(size)]
    assert b"".join(blocks) == b"X-A: 1\n" + TEXT
    assert max(map(len, blocks)) <= size
    assert asyncio.run(read()) == blocks
    assert one.size == len(b"X-A: 1\n" + TEXT)


def test_the_header_is_parsed_once_it_is_asked_for():
    one = content()
    one.added = b"X-A: 1\n"
    assert one.header["subject"] == "one two"
    assert one.header["x-a"] is None
    assert one.header is one.header
    assert content(b"Subject: no end").header["subject"] == "no end"
    assert content(b"").header.keys() == []


def test_a_closed_content_yields_nothing():
    one = content()
    one.close()
    with pytest.raises(ContentClosed):
        next(iter(one.blocks()))


def test_a_content_that_ends_early_is_an_error():
    with pytest.raises(OSError, match="the content ends after 3 of 10 octets"):
        [*MessageContent(lambda size, offset: b"abc"[offset : offset + size], 10).blocks()]


# Registration


def test_arguments():
    arguments = PluginArguments(("10.0.0.7",), {"delay": "5m", "limit": "64K", "x": "y"})
    assert arguments.word(0) == "10.0.0.7"
    assert arguments.word(1, "628") == "628"
    assert arguments.option("x") == "y"
    assert arguments.option("z", "d") == "d"
    assert arguments.seconds("delay", 1.0) == 300.0
    assert arguments.seconds("other", 1.0) == 1.0
    assert arguments.size("limit", 1) == 65536
    arguments.check_known("delay", "limit", "x", words=1)


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (lambda a: a.word(1), "needs 2 words behind its name"),
        (lambda a: a.option("y"), "needs y=..."),
        (lambda a: a.seconds("x", 1.0), "x=soon: "),
        (lambda a: a.size("x", 1), "x=soon: "),
        (lambda a: a.check_known("y", words=1), "has no option x=; its options are: y="),
        (lambda a: a.check_known("x"), "takes 0 words, and 'w' is too many"),
    ],
)
def test_wrong_arguments_say_what_to_write(call, fault: str):
    with pytest.raises(PluginArgumentError, match=fault):
        call(PluginArguments(("w",), {"x": "soon"}))


def test_a_path_is_relative_to_the_working_directory(tmp_path: Path):
    relay = Relay("relay.example", get_logger("plugin"))
    assert relay.path("x/y") == Path("x/y")
    assert relay.path(str(tmp_path)) == tmp_path
    relay.at_stop(lambda: None)
    assert len(relay.stopping) == 1
