"""DSNs, read back with the standard library's parser.

RFC 3461 (NOTIFY, RET, ENVID, ORCPT), 3464 (the status part), 6522 (the report), 3834 (automatic
messages).
"""

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from email.message import EmailMessage
from email.utils import parsedate_to_datetime
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.dsn.message import Failure, Kind, Original, compose, quoted, status_of, unxtext
from relay.queue.states import ReasonSource

NOW = datetime(2026, 11, 22, 17, 0, 0, tzinfo=UTC)
ID, ABOUT = "01a20439a5b371daae4d9cd848026382", "01a20439a5b371daae4d9cd848026111"
ORIGINAL = Original(ABOUT, "a@example.com", NOW - timedelta(hours=1), "<1@client.example>", None)
FAILED = Failure(
    "b@example.org",
    None,
    Kind.BOUNCED,
    "no mailbox here by that name (#5.1.1)",
    "mx.example.net:628",
    NOW - timedelta(minutes=1),
    NOW + timedelta(days=4),
    "rejected",
    ReasonSource.SERVER,
)
CONTENT = b"Received: by here\nSubject: hello\nFrom: a@example.com\n\nbody\n.\n--=_not-a-boundary\n"


def written(
    *failures: Failure,
    original: Original = ORIGINAL,
    content: bytes | None = CONTENT,
    full: bool = True,
) -> bytes:
    return compose(ID, "relay.example", NOW, original, failures or (FAILED,), content, full=full)


def parsed(wire: bytes) -> EmailMessage:
    assert b"\r" not in wire
    assert wire.endswith(b"\n")
    found = message_from_bytes(wire, policy=policy.default)
    assert not found.defects
    return found


def parts(wire: bytes) -> list[EmailMessage]:
    return cast(list[EmailMessage], parsed(wire).get_payload())


def groups(wire: bytes) -> list[dict[str, str]]:
    """The delivery-status part: the message's fields, then those of each recipient."""
    status = parts(wire)[1]
    assert status.get_content_type() == "message/delivery-status"
    found = cast(list[Any], status.get_payload())
    return [dict(group.items()) for group in found if group.items()]


def text_of(wire: bytes) -> str:
    return str(parts(wire)[0].get_content())


def test_report_has_three_parts_and_is_marked_as_automatic() -> None:
    wire = written()
    report = parsed(wire)
    assert report.get_content_type() == "multipart/report"
    assert report.get_param("report-type") == "delivery-status"
    kinds = [part.get_content_type() for part in report.iter_parts()]
    assert kinds == ["text/plain", "message/delivery-status", "message/rfc822"]
    assert report["Auto-Submitted"] == "auto-replied"  # RFC 3834
    assert (report["From"], report["To"]) == (
        "Mail Delivery System <MAILER-DAEMON@relay.example>",
        "a@example.com",
    )
    assert (report["Message-ID"], report["References"]) == (
        f"<{ID}@relay.example>",
        "<1@client.example>",
    )
    assert parsedate_to_datetime(report["Date"]) == NOW
    assert report["MIME-Version"] == "1.0"
    assert wire.startswith(b"Received: ")


def test_text_part_names_recipient_reason_and_queue_id() -> None:
    text = text_of(written())
    assert "could not be delivered" in text
    assert "<b@example.org>" in text
    assert "no mailbox here by that name (#5.1.1)" in text
    assert ABOUT in text
    assert all(len(line) <= 78 for line in text.splitlines())


def test_status_part_of_a_bounce() -> None:
    about, recipient = groups(written())
    assert about == {
        "Reporting-MTA": "dns; relay.example",
        "Arrival-Date": "Sun, 22 Nov 2026 16:00:00 +0000",
    }
    assert recipient == {
        "Final-Recipient": "rfc822; b@example.org",
        "Action": "failed",
        "Status": "5.1.1",
        "Remote-MTA": "dns; mx.example.net",
        "Diagnostic-Code": "x-qmqp; no mailbox here by that name (#5.1.1)",
        "Last-Attempt-Date": "Sun, 22 Nov 2026 16:59:00 +0000",
    }


def test_delay_is_not_reported_as_a_failure() -> None:
    wire = written(
        replace(FAILED, kind=Kind.DELAYED, reply="busy (#4.3.2)", outcome="deferred"), full=False
    )
    recipient = groups(wire)[1]
    assert (recipient["Action"], recipient["Status"]) == ("delayed", "4.3.2")
    assert recipient["Will-Retry-Until"] == "Thu, 26 Nov 2026 17:00:00 +0000"
    assert parsed(wire)["Subject"].startswith("Delayed")
    assert "need not send it again" in " ".join(text_of(wire).split())


def test_expired_message_quotes_the_last_reply() -> None:
    wire = written(replace(FAILED, kind=Kind.EXPIRED, reply="busy (#4.3.2)", outcome="deferred"))
    assert groups(wire)[1]["Status"] == "5.4.7"
    assert groups(wire)[1]["Diagnostic-Code"] == "x-qmqp; busy (#4.3.2)"
    expected = " ".join(text_of(wire).split())
    assert "It could not be delivered in time. The last reply was: busy (#4.3.2)" in expected
    assert "may have arrived" not in expected


@pytest.mark.parametrize("kind", Kind)
def test_possibly_delivered_is_not_called_undelivered(kind: Kind) -> None:
    """Three recipients: one whose last try got no answer, one of which that is so of an earlier
    try, one without."""
    ours = "connection closed by the server after the commit point"
    bounced = replace(
        FAILED,
        reply="bounced by an operator",
        reason_source=ReasonSource.OPERATOR,
        possibly_delivered=True,
    )
    doubtful = replace(
        bounced, kind=kind, outcome="uncertain", reply=ours, reason_source=ReasonSource.RELAY
    )
    earlier = replace(doubtful, outcome="deferred", reply="busy", reason_source=ReasonSource.SERVER)
    if kind is Kind.BOUNCED:
        doubtful = earlier = bounced
    wire = written(doubtful, earlier)
    expected = " ".join(text_of(wire).split())
    assert expected.count("It may have been delivered all the same") == 2
    assert ["Diagnostic-Code" in group for group in groups(wire)[1:]] == [
        False,
        kind is not Kind.BOUNCED,
    ]
    assert (ours in expected) == (kind is not Kind.BOUNCED)
    if kind is not Kind.DELAYED:
        assert "or the relay cannot know whether it was" in expected
        assert parsed(wire)["Subject"] == "Mail that may not have been delivered"
        both = written(doubtful, replace(FAILED, reply="no"))
        assert parsed(both)["Subject"] == "Undelivered mail returned to sender"


@pytest.mark.parametrize(
    ("outcome", "reply", "source", "expected"),
    [
        ("deferred", "busy", "server", "The last reply was: busy"),
        ("rejected", "not you", "server", "The last reply was: not you"),
        ("deferred", "held by greylist", "server", "The last reply was: held by greylist"),
        (
            "unreachable",
            "ECONNREFUSED (refused)",
            "relay",
            "The last attempt failed: ECONNREFUSED (refused)",
        ),
        (
            "malformed",
            "no QMQP reply: 220 mx",
            "relay",
            "The last attempt failed: no QMQP reply: 220 mx",
        ),
        ("interrupted", "", "relay", "The last attempt failed."),
        ("deferred", "held by ann@host: looks odd", "operator", "The last attempt failed."),
        (None, "held by ann@host: looks odd", "operator", "It has not been tried yet."),
        (None, "", None, "It has not been tried yet."),
    ],
)
def test_only_a_reply_of_a_server_is_a_diagnostic_code(
    outcome: str | None, reply: str, source: str | None, expected: str
) -> None:
    failure = replace(FAILED, kind=Kind.DELAYED, outcome=outcome, reply=reply, reason_source=source)
    wire = written(failure)
    diagnostic = f"x-qmqp; {reply}" if source == "server" else None
    assert groups(wire)[1].get("Diagnostic-Code") == diagnostic
    assert expected in " ".join(text_of(wire).split())
    assert "ann" not in text_of(wire)


@pytest.mark.parametrize(
    ("outcome", "reply", "expected"),
    [
        (
            "rejected",
            "bounced by an operator: spam run",
            "An operator of this relay bounced it: spam run",
        ),
        ("uncertain", "bounced by an operator", "An operator of this relay bounced it."),
        ("rejected", "", "The mail server rejected it and gave no reason."),
    ],
)
def test_bounce_by_an_operator_is_not_attributed_to_a_server(
    outcome: str, reply: str, expected: str
) -> None:
    source = ReasonSource.OPERATOR if reply else ReasonSource.SERVER
    wire = written(replace(FAILED, outcome=outcome, reply=reply, reason_source=source))
    assert expected in " ".join(text_of(wire).split())
    assert "Diagnostic-Code" not in groups(wire)[1]


@pytest.mark.parametrize(
    ("kind", "outcome", "source", "status"),
    [
        (Kind.BOUNCED, "rejected", ReasonSource.SERVER, "5.7.1"),
        (Kind.BOUNCED, "unsendable", ReasonSource.RELAY, "5.7.1"),
        (Kind.BOUNCED, "rejected", ReasonSource.OPERATOR, "5.0.0"),
        (Kind.BOUNCED, "unsendable", ReasonSource.OPERATOR, "5.0.0"),
        (Kind.DELAYED, "deferred", ReasonSource.SERVER, "4.7.1"),
        (Kind.DELAYED, "deferred", ReasonSource.OPERATOR, "4.0.0"),
        (Kind.DELAYED, "malformed", ReasonSource.RELAY, "4.0.0"),
    ],
)
def test_no_reason_of_an_operator_gives_a_status(
    kind: Kind, outcome: str, source: ReasonSource, status: str
) -> None:
    reply = "bounced by an operator: see 5.7.1 and 4.7.1"
    failure = replace(FAILED, kind=kind, outcome=outcome, reply=reply, reason_source=source)
    assert groups(written(failure))[1]["Status"] == status


def test_a_server_that_replies_like_an_operator_is_a_server() -> None:
    reply = "bounced by an operator: x"
    wire = written(replace(FAILED, outcome="rejected", reply=reply))
    assert f"The mail server rejected it: {reply}" in " ".join(text_of(wire).split())
    assert groups(wire)[1]["Diagnostic-Code"] == f"x-qmqp; {reply}"


def test_left_out_content_is_explained() -> None:
    wire = compose(
        ID, "relay.example", NOW, ORIGINAL, [FAILED], None, full=True, left_out="It is too long."
    )
    assert "\nIt is too long.\n" in text_of(wire)


def test_several_recipients_share_a_dsn() -> None:
    wire = written(
        *(replace(FAILED, address=f"{n}@example.org", reply=f"why {n}") for n in range(50))
    )
    assert [group["Final-Recipient"] for group in groups(wire)[1:]] == [
        f"rfc822; {n}@example.org" for n in range(50)
    ]
    assert all(f"why {n}" in text_of(wire) for n in range(50))


def test_ENVID_and_ORCPT_are_decoded() -> None:
    wire = written(
        replace(FAILED, orcpt="rfc822;B+40first+2Bdomain@example.org"),
        original=replace(ORIGINAL, envid="QQ+2B314+3D159"),
    )
    about, recipient = groups(wire)
    assert next(iter(about)) == "Original-Envelope-Id"
    assert about["Original-Envelope-Id"] == "QQ+314=159"
    assert next(iter(recipient)) == "Original-Recipient"
    assert recipient["Original-Recipient"] == "rfc822; B@first+domain@example.org"


def test_RET_HDRS_encloses_the_header_alone() -> None:
    header = CONTENT.partition(b"\n\n")[0] + b"\n"
    last = parts(written(content=header, full=False))[-1]
    assert last.get_content_type() == "text/rfc822-headers"
    assert b"Subject: hello" in cast(bytes, last.get_payload(decode=True))


def test_RET_FULL_encloses_the_original_unchanged() -> None:
    wire = written()
    assert b"\n\n" + CONTENT + b"\n--" in wire
    (inner,) = cast(list[EmailMessage], parts(wire)[2].get_payload())
    assert inner["Subject"] == "hello"


def test_dsn_without_the_original_lacks_only_that_part() -> None:
    assert len(parts(written(content=None))) == 2


def test_8_bit_original_is_declared_and_unchanged() -> None:
    content = b"Subject: caf\xc3\xa9\n\n\xff\xfe \x80 latin-1 \xe9\n"
    wire = written(content=content)
    assert content in wire
    assert parsed(wire)["Content-Transfer-Encoding"] == "8bit"
    assert parts(wire)[2]["Content-Transfer-Encoding"] == "8bit"
    assert wire.replace(content, b"").isascii()
    assert parsed(written())["Content-Transfer-Encoding"] is None


@pytest.mark.parametrize(
    ("kind", "reply", "status"),
    [
        (Kind.BOUNCED, "5.1.1 unknown", "5.1.1"),
        (Kind.BOUNCED, "sorry (#5.7.1)", "5.7.1"),
        (Kind.BOUNCED, "Error: 5.007.010 padded", "5.7.10"),
        (Kind.BOUNCED, "go away", "5.0.0"),
        (Kind.BOUNCED, "4.2.2 in a D", "5.0.0"),
        (Kind.BOUNCED, "by 10.5.1.1 and 1.5.1.1", "5.0.0"),
        (Kind.BOUNCED, "4.2.2 first, then 5.2.2", "5.2.2"),
        (Kind.DELAYED, "5.1.1 in a Z", "4.0.0"),
        (Kind.DELAYED, "busy # 4.3.2", "4.3.2"),
        (Kind.EXPIRED, "5.1.1", "5.4.7"),
        (Kind.BOUNCED, "", "5.0.0"),
        (Kind.BOUNCED, "5.1.1234", "5.0.0"),
        (Kind.BOUNCED, "550 5.1.1. No such user", "5.1.1"),
        (Kind.BOUNCED, "no mail from 192.5.1.10", "5.0.0"),
    ],
)
def test_the_servers_status_code_is_kept_if_its_class_fits(
    kind: Kind, reply: str, status: str
) -> None:
    assert status_of(kind, reply) == status


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("b@example.org", "b@example.org"),
        ("a b@example.org", '"a b"@example.org'),
        ("a@b@c", '"a@b"@c'),
        ('q"u\\o@c', '"q\\"u\\\\o"@c'),
        (".dot@c", '".dot"@c'),
        ("x+y=z@c", "x+y=z@c"),
        ("postmaster", "postmaster"),
        ("b\n@c", '"b\\\\n"@c'),
    ],
)
def test_addresses_are_quoted(address: str, path: str) -> None:
    assert quoted(address) == path


def test_unxtext_decodes_to_one_line() -> None:
    assert unxtext("a+2Bb+3Dc") == "a+b=c"
    assert unxtext("a+0D+0AX-Evil:+20yes") == "a\\x0d\\nX-Evil: yes"
    assert unxtext("+E9+00") == "\\xe9\\x00"
    assert unxtext("a+2bc+4") == "a+2bc+4", "what is no xtext stays"


HOSTILE = st.text(st.characters(max_codepoint=0x2FF), max_size=200).map(
    lambda text: text.replace("x", "\n\nAction: delivered\n\n--=_" + ID + "--\nSubject: evil\r\n")
)


@settings(max_examples=15)
@given(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)
def test_C30_hostile_values_add_no_line_and_no_field(
    reply: str, address: str, orcpt: str, envid: str, queue_id: str
) -> None:
    failure = replace(FAILED, reply=reply, address=address, orcpt=f"{orcpt};{orcpt}")
    original = replace(ORIGINAL, envid=envid, header_message_id=queue_id)
    wire = written(failure, original=original)
    calm = written(
        replace(FAILED, orcpt="rfc822;b", reply=reply and "x"),
        original=replace(ORIGINAL, envid=envid and "e", header_message_id=queue_id and "m"),
    )
    assert wire.isascii()
    names = [list(group) for group in groups(wire)]
    assert names == [list(group) for group in groups(calm)]
    assert groups(wire)[1]["Action"] == "failed"
    assert parsed(wire).keys() == parsed(calm).keys()
    assert len(parts(wire)) == 3
    assert max(map(len, wire.splitlines())) < 998
    assert re.findall(rb"(?m)^--=_.*$", wire.replace(CONTENT, b"")) == [
        b"--=_" + ID.encode()
    ] * 3 + [b"--=_" + ID.encode() + b"--"]
    assert all(len(line) <= 998 for line in text_of(wire).splitlines())


def test_long_replies_are_bounded() -> None:
    wire = written(replace(FAILED, reply="x" * 100_000, address="y" * 5000 + "@example.org"))
    assert len(wire) < 10_000
    assert max(map(len, wire.splitlines())) < 998


@pytest.mark.parametrize("length", [900, 970, 995, 996, 999])
def test_address_is_whole_as_far_as_a_line_can_hold_it(length: int) -> None:
    domain = ".".join(["d" * 60] * 4)
    address = "x" * (length - len(domain) - 1) + "@" + domain
    path = address if length < 996 else address[:992] + "..."
    wire = written(replace(FAILED, address=address), original=replace(ORIGINAL, sender=address))
    assert max(map(len, wire.splitlines())) <= 998
    head = wire.partition(b"\n\n")[0].replace(b"\n ", b" ").decode()
    assert f"\nTo: {path}\n" in head
    assert re.sub(r"\s+", " ", groups(wire)[1]["Final-Recipient"]) == f"rfc822; {path}"
    assert f"\n<{path}>\n" in text_of(wire)


def test_quotes_do_not_make_a_line_too_long() -> None:
    wire = written(replace(FAILED, address='"' * 900 + "@example.org"))
    assert max(map(len, wire.splitlines())) <= 998


@pytest.mark.parametrize(
    ("server", "remote"),
    [
        ("[::1]:628", "dns; [::1]"),
        ("unix:/run/qmqpd", None),
        (None, None),
        ("10.0.0.1:629", "dns; 10.0.0.1"),
    ],
)
def test_server_is_named_if_it_has_a_host_name(server: str | None, remote: str | None) -> None:
    assert groups(written(replace(FAILED, server=server)))[1].get("Remote-MTA") == remote


def test_unknown_fields_are_left_out() -> None:
    wire = written(
        replace(FAILED, attempted_at=None, reply=""),
        original=replace(ORIGINAL, header_message_id=None),
    )
    assert not {"Last-Attempt-Date", "Diagnostic-Code"} & set(groups(wire)[1])
    assert parsed(wire)["References"] is None
    assert "gave no reason" in text_of(wire)
