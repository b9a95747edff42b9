"""Paths and parameters by the grammar of RFC 5321, and the refused ones."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmqp.request import Request
from reception.envelope import Refused
from smtpd.addresses import parse_recipient, parse_sender

HOST = "relay.example"


def sender(path: str) -> str:
    return parse_sender(f"FROM:{path}".encode("latin-1"), HOST)[0]


def recipient(path: str) -> str:
    return parse_recipient(f"TO:{path}".encode("latin-1"), HOST).address


def refusal(argument: bytes, *, trusted: bool = False) -> str:
    parse = parse_sender if argument.startswith(b"FROM") else parse_recipient
    try:
        found: object = parse(argument, HOST, trusted=trusted)
    except Refused as refused:
        return str(refused)
    raise AssertionError(f"accepted as {found}")


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("<a@b>", "a@b"),
        (" <a@b>", "a@b"),
        ("<Mixed.Case+tag=x/y@Example.ORG>", "Mixed.Case+tag=x/y@Example.ORG"),
        ('<"a b"@c.example>', "a b@c.example"),
        ('<"a\\"\\\\b"@c.example>', 'a"\\b@c.example'),
        ('<"plain"@c.example>', "plain@c.example"),
        ('<"a@b"@c.example>', "a@b@c.example"),
        ("<@x.example:a@b.example>", "a@b.example"),
        ("<@x.example,@y.example:a@b.example>", "a@b.example"),
        ("<a@[192.0.2.1]>", "a@[192.0.2.1]"),
        ("<a@[IPv6:2001:db8::1]>", "a@[IPv6:2001:db8::1]"),
        ("<a@[ipv6:::ffff:192.0.2.1]>", "a@[ipv6:::ffff:192.0.2.1]"),
        ("<" + "l" * 989 + "@b.example>", "l" * 989 + "@b.example"),
        ('<"' + "\\l" * 989 + '"@b.example>', "l" * 989 + "@b.example"),
        ("<a@" + "d" * 255 + ">", "a@" + "d" * 255),
        ("<a@b.example.>", "a@b.example"),
        ("<@x.example:a@b.>", "a@b"),
    ],
)
def test_C14_valid_addresses(path: str, address: str) -> None:
    assert sender(path) == address
    assert recipient(path) == address


def test_C14_the_null_sender_is_empty_and_no_recipient() -> None:
    assert parse_sender(b"FROM:<>", HOST) == ("", {})
    assert refusal(b"TO:<>").startswith("501 5.1.3")


@pytest.mark.parametrize(
    "path",
    [
        "a@b",
        "",
        "<a@b",
        "a@b>",
        "<a>",
        "<@b>",
        "<a@>",
        "<a@b>x",
        "<a@b><c@d>",
        "<a b@c>",
        "<a..b@c>",
        "<.a@b>",
        "<a.@b>",
        "<a@b..c>",
        "<a@.b>",
        "<a@b..>",
        "<a@.>",
        "<a@[192.0.2.1].>",
        "<a@b_c.>",
        '<"a b">',
        "<a@-b>",
        "<a@b->",
        "<a@b_c>",
        "<a@b@c>",
        '<"a@b>',
        '<"a"b@c>',
        '<""@c>',
        "<a@[]>",
        "<a@[1.2.3]>",
        "<a@[1.2.3.256]>",
        "<a@[IPv6:1.2.3.4]>",
        "<a@[IPv6:zz::]>",
        "<a@[tag:x]>",
        "<@a>",
        "<@a:>",
        "<a@b:c@d>",
        "< a@b>",
        "<a@b >",
        "<" + "l" * 990 + "@b.example>",
        '<"' + "\\l" * 990 + '"@b.example>',
        "<a@" + "d" * 256 + ">",
        "<" + "l" * 744 + "@" + "d" * 255 + ">",
    ],
)
def test_C14_invalid_addresses(path: str) -> None:
    assert refusal(f"FROM:{path}".encode()).startswith("501 5.1.7")
    assert refusal(f"TO:{path}".encode()).startswith("501 5.1.3")


@pytest.mark.parametrize("byte", [*range(32), 127])
def test_C15_control_bytes_are_refused(byte: int) -> None:
    for place in (
        b"TO:<a%cb@c.example>",
        b"TO:<a@c%c.example>",
        b'TO:<"a%cb"@c>',
        b'TO:<"a\\%cb"@c>',
        b"TO:<a@b>%c",
    ):
        assert refusal(place % byte).startswith("501")
        assert refusal(b"FROM" + (place % byte)[2:]).startswith("501")


@pytest.mark.parametrize("word", ["Postmaster", "postmaster", "POSTMASTER"])
def test_C15_postmaster_needs_no_domain(word: str) -> None:
    assert recipient(f"<{word}>") == f"postmaster@{HOST}"
    assert refusal(f"FROM:<{word}>".encode()).startswith("501 5.1.7")


@pytest.mark.parametrize("path", ["<\xfcser@b.example>", "<a@\xfc.example>", '<"\xff"@b>'])
def test_C11_addresses_beyond_ascii_are_refused(path: str) -> None:
    assert refusal(f"FROM:{path}".encode()).startswith("553 5.6.7")
    assert refusal(f"TO:{path}".encode("latin-1")).startswith("553 5.6.7")


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=30))
def test_a_quoted_local_part_comes_out_as_it_went_in(local: str) -> None:
    quoted = re.sub(r'([\\"])', r"\\\1", local)
    if not local.startswith("<"):
        found = parse_recipient(f'TO:<"{quoted}"@b.example>'.encode(), HOST)
        assert found.address == f"{local}@b.example"
        assert found.path == f'"{quoted}"@b.example'


@pytest.mark.parametrize("path", ['<"<x"@b.test>', '<"\\<x"@b.test>', '<"<"@b.test>'])
def test_an_address_that_fits_no_qmqp_request_is_refused(path: str) -> None:
    assert refusal(f"FROM:{path}".encode()).startswith(
        "501 5.1.7 Bad sender address: it begins with <"
    )
    assert refusal(f"TO:{path}".encode()).startswith(
        "501 5.1.3 Bad recipient address: it begins with <"
    )


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=30))
def test_every_accepted_address_fits_a_qmqp_request(local: str) -> None:
    quoted = re.sub(r'([\\"])', r"\\\1", local)
    path = f'<"{quoted}"@b.example>'
    try:
        from_, to = sender(path), recipient(path)
    except Refused:
        assert local.startswith("<")
        return
    Request(1, from_.encode(), [to.encode()])


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("<root>", "root@relay.example"),
        ("<@x.example:root>", "root@relay.example"),
        ('<"a b">', "a b@relay.example"),
        ("<POSTMASTER>", "postmaster@relay.example"),
        ("<a@my_host>", "a@my_host"),
        ("<a@_dmarc.example_net.>", "a@_dmarc.example_net"),
    ],
)
def test_a_trusted_client_may_use_short_addresses(path: str, address: str) -> None:
    assert parse_sender(f"FROM:{path}".encode(), HOST, trusted=True)[0] == address
    found = parse_recipient(f"TO:{path}".encode(), HOST, trusted=True)
    assert found.address == address
    assert found.domain == address.rpartition("@")[2]
    assert found.path.replace('"', "") == address


@pytest.mark.parametrize(
    "path", ["<a@>", "<@b>", "<a@b..>", "<a@-b_c>", "<a@[_]>", '<"">', '<"<a">', "<>x"]
)
def test_a_trusted_client_may_not_use_invalid_addresses(path: str) -> None:
    assert refusal(f"FROM:{path}".encode(), trusted=True).startswith("501 5.1.7")
    assert refusal(f"TO:{path}".encode(), trusted=True).startswith("501 5.1.3")


def test_the_refusal_names_the_fault() -> None:
    assert refusal(b"FROM:<root>") == "501 5.1.7 Bad sender address: a domain is needed"
    assert refusal(b"TO:<a@b_c>") == "501 5.1.3 Bad recipient address: _ in the domain"


@given(st.binary(max_size=40), st.booleans())
def test_addresses_that_a_server_could_misread_are_refused(path: bytes, trusted: bool) -> None:
    try:
        address = parse_recipient(b"TO:<" + path + b">", HOST, trusted=trusted).address
    except Refused:
        return
    assert re.fullmatch(r"[ -~]+@[A-Za-z0-9_.:\[\]-]+", address)
    assert trusted or "_" not in address.rpartition("@")[2]
    assert not address.endswith("@[]")


@pytest.mark.parametrize("magic", ["#@[]", "list-@host-@[]", '"list-@host-"@[]', "-@[]"])
def test_magic_senders_of_qmail_are_refused(magic: str) -> None:
    assert refusal(f"FROM:<{magic}>".encode()).startswith("501")


def test_a_hostile_path_is_refused_in_linear_time() -> None:
    for evil in (
        b"a." * 1000,
        b"a-" * 1000,
        b"@a," * 600,
        b'"' + b"\\" * 1500,
        b"a@" + b"_" * 2000 + b"-",
    ):
        assert refusal(b"TO:<" + evil + b">").startswith("501")
        assert refusal(b"TO:<" + evil + b">", trusted=True).startswith("501")


def test_parameters_of_mail_are_kept() -> None:
    _, values = parse_sender(
        b"FROM:<a@b> size=1000 BODY=8bitmime RET=hdrs  ENVID=Qq+2B314 AUTH=<> smtputf8", HOST
    )
    known = {
        b"SIZE": "1000",
        b"BODY": "8BITMIME",
        b"RET": "HDRS",
        b"ENVID": "Qq+2B314",
        b"AUTH": "<>",
    }
    assert values == known | {b"SMTPUTF8": ""}


def test_parameters_of_rcpt_are_kept() -> None:
    found = parse_recipient(b"TO:<a@b> NOTIFY=success,Failure ORCPT=rfc822;Bob+40Example.ORG", HOST)
    assert (found.notify, found.orcpt) == ("SUCCESS,FAILURE", "rfc822;Bob+40Example.ORG")
    assert parse_recipient(b"TO:<a@b> NOTIFY=never", HOST).notify == "NEVER"


@pytest.mark.parametrize(
    ("argument", "code"),
    [
        (b"FROM:<a@b> SMTPUTF8=1", "501 5.5.4"),
        (b"FROM:<a@b> SMTPUTF8=", "501 5.5.4"),
        (b"FROM:<a@b> SMTPUTF8 SMTPUTF8", "501 5.5.4"),
        ("FROM:<\xfc@b> SMTPUTF8".encode(), "553 5.6.7"),
        ("FROM:<a@\xfc.example> SMTPUTF8".encode(), "553 5.6.7"),
        (b"TO:<a@b> SMTPUTF8", "555 5.5.4"),
        (b"FROM:<a@b> NOTIFY=NEVER", "555 5.5.4"),
        (b"FROM:<a@b> X-OTHER=1", "555 5.5.4"),
        (b"FROM:<a@b> SIZE", "501 5.5.4"),
        (b"FROM:<a@b> SIZE=", "501 5.5.4"),
        (b"FROM:<a@b> SIZE=-1", "501 5.5.4"),
        (b"FROM:<a@b> SIZE=" + b"9" * 21, "501 5.5.4"),
        (b"FROM:<a@b> SIZE=1 SIZE=1", "501 5.5.4"),
        (b"FROM:<a@b> BODY=BINARYMIME", "501 5.5.4"),
        (b"FROM:<a@b> RET=SOME", "501 5.5.4"),
        (b"FROM:<a@b> ENVID=a+2b", "501 5.5.4"),
        (b"FROM:<a@b> ENVID=a=b", "501 5.5.4"),
        (b"FROM:<a@b> ENVID=" + b"a" * 101, "501 5.5.4"),
        (b"FROM:<a@b> =1", "501 5.5.4"),
        (b"FROM:<a@b> SIZE=1\tRET=FULL", "501 5.5.4"),
        (b"TO:<a@b> SIZE=1", "555 5.5.4"),
        (b"TO:<a@b> NOTIFY=NEVER,DELAY", "501 5.5.4"),
        (b"TO:<a@b> NOTIFY=", "501 5.5.4"),
        (b"TO:<a@b> ORCPT=rfc822", "501 5.5.4"),
        (b"TO:<a@b> ORCPT=rfc822;", "501 5.5.4"),
        (b"TO:<a@b> ORCPT=rfc822;a+zz", "501 5.5.4"),
    ],
)
def test_parameters_that_are_refused(argument: bytes, code: str) -> None:
    assert refusal(argument).startswith(code)
