"""The sink: a strict server, its rules and presets, and the files that it writes."""

import asyncio
import itertools
import json
import os
import socket
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmqp.netstring import encode
from qmqp.request import Request
from qmqp.sink import PRESETS, Answer, MagicRecipients, Preset, Rule, Sink, running_sink


def wire_of(*recipients: bytes, body: bytes = b"hello\n", sender: bytes = b"s@x.test") -> bytes:
    request = Request(len(body), sender, recipients or (b"r@y.test",))
    return request.head + body + request.tail


def talk(sink: Sink, *pieces: bytes, then_end: bool = False) -> bytes | None:
    """Send the blocks and read to the end; None if the connection was reset."""
    with socket.create_connection(("127.0.0.1", sink.port), timeout=10) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server_reply = b""
        try:
            for piece in pieces:
                peer.sendall(piece)
            if then_end:
                peer.shutdown(socket.SHUT_WR)
            while data := peer.recv(65536):
                server_reply += data
        except ConnectionError:
            return server_reply or None
        return server_reply


def answers(
    *rules: Rule | MagicRecipients, wire: bytes = b"", times: int = 1
) -> list[bytes | None]:
    with running_sink(*rules) as sink:
        return [talk(sink, wire or wire_of()) for _ in range(times)]


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_message_is_received_unchanged(new_loop):
    body = os.urandom(300_000)
    with running_sink(new_loop=new_loop) as sink:
        assert talk(sink, wire_of(b"r@y.test", b"q@z.test", body=body)) == b"16:KOk: queued as 1,"
        assert sink.wait_for(1, 20)
    received = sink.received[0]
    assert (received.sender, received.recipients) == (b"s@x.test", (b"r@y.test", b"q@z.test"))
    assert (received.size, received.sha256, received.reply) == (
        300_000,
        sha256(body).hexdigest(),
        b"KOk: queued as 1",
    )


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 60), max_size=6))
def test_a_request_cut_in_any_way_is_received(one_sink, cuts):
    wire = wire_of(b"r@y.test", b"q@z.test")
    edges = [0, *sorted(cut for cut in cuts if cut < len(wire)), len(wire)]
    server_reply = talk(one_sink, *[wire[a:b] for a, b in itertools.pairwise(edges)])
    assert server_reply is not None
    assert server_reply.startswith(b"1")
    assert b"KOk: queued as " in server_reply


@pytest.fixture(scope="module")
def one_sink():
    with running_sink() as sink:
        yield sink
        assert not sink.faults


def test_A18_B7_every_wrong_length_is_refused():
    good = wire_of()
    inner = good[3:-1]
    wires = [
        b"%d:%b," % (len(inner) - 1, inner),
        b"%d:%b,,," % (len(inner) + 1, inner),
        b"0%d:%b," % (len(inner), inner),
        b":%b," % inner,
        encode(encode(b"hello")),
        b"GET / HTTP/1.0\r\n\r\n",
        b"9999999999:",
    ]
    with running_sink() as sink:
        for wire in wires:
            server_reply = talk(sink, wire)
            assert server_reply is not None, wire
            assert b":Dnetstring " in server_reply, wire
        assert sink.count == 0
        assert len(sink.faults) == len(wires)


def test_a_request_that_breaks_off_is_discarded():
    with running_sink() as sink:
        assert talk(sink, wire_of()[:-1], then_end=True) == b""
        assert sink.wait_for_fault(5)
        assert (sink.count, sink.faults[0]) == (
            0,
            "connection lost while receiving recipient address",
        )


def test_B1_B2_B6_a_reply_of_any_kind():
    assert answers(Rule(Answer(b"Z", b"busy"))) == [b"5:Zbusy,"]
    assert answers(Rule(Answer(b"D", b"no"))) == [b"3:Dno,"]
    assert answers(Rule(Answer(b"K", b"fine"))) == [b"5:Kfine,"]


def test_rules_are_read_from_the_first_to_the_last():
    rules = (
        Rule(Answer(b"Z", b"1"), times=2),
        Rule(Answer(b"D", b"2"), recipient=b"r@"),
        Rule(Answer(b"D", b"3")),
    )
    assert answers(*rules, times=3) == [b"2:Z1,", b"2:Z1,", b"2:D2,"]
    assert answers(rules[1], rules[2], wire=wire_of(b"q@z")) == [b"2:D3,"]


def test_a_rule_for_a_recipient_may_run_out():
    rule = Rule(Answer(b"Z", b"busy"), recipient=b"r@", times=1)
    assert answers(rule, times=2) == [b"5:Zbusy,", b"16:KOk: queued as 2,"]


def test_B4_a_reply_byte_by_byte_and_late():
    started = time.monotonic()
    assert answers(Rule(Answer(b"K", b"Ok", delay=0.1, drip=0.02))) == [b"3:KOk,"]
    assert time.monotonic() - started >= 0.2


def test_B9_garbage():
    assert answers(Rule(Answer(raw=b"220 hello\r\n"))) == [b"220 hello\r\n"]


def test_B13_a_silent_close():
    assert answers(Rule(Answer(raw=b""))) == [b""]


def test_B14_a_reset():
    assert answers(Rule(Answer(raw=b"", end="reset"))) == [None]


def test_B17_an_early_reply():
    with running_sink(Rule(Answer(b"D", b"no", at=0)), Rule(Answer())) as sink:
        assert talk(sink) == b"3:Dno,"
    with running_sink(Rule(Answer(b"D", b"no", at=5))) as sink:
        assert talk(sink, wire_of()[:5]) == b"3:Dno,"


def test_B20_B22_a_silent_server():
    with running_sink(Rule(Answer(raw=b"", end="stay"))) as sink, socket.socket() as peer:
        peer.connect(("127.0.0.1", sink.port))
        peer.settimeout(0.2)
        peer.sendall(wire_of())
        assert sink.wait_for(1, 20)
        with pytest.raises(TimeoutError):
            peer.recv(1)


def test_B21_a_slow_reader():
    started = time.monotonic()
    assert answers(Rule(Answer(read_size=5, read_pause=0.03)))[0] is not None
    assert time.monotonic() - started >= 0.1


def test_magic_recipients():
    with running_sink(MagicRecipients(slow=0.1)) as sink:

        def reply(recipient: bytes, body: bytes = b"hello\n") -> bytes | None:
            server_reply = talk(sink, wire_of(recipient, body=body))
            return server_reply.partition(b":")[2][:1] if server_reply else server_reply

        assert [reply(b"defer-2@x") for _ in range(4)] == [b"Z", b"Z", b"K", b"K"]
        assert reply(b"defer-2@x", b"another") == b"Z"
        assert reply(b"reject@x") == b"D"
        assert reply(b"drop-reply@x") == b""
        assert reply(b"anybody@x") == b"K"
        assert reply(b"rejected@x") == b"K"
        started = time.monotonic()
        assert reply(b"slow@x") == b"K"
        assert time.monotonic() - started >= 0.1


def test_preset_strict_rejects_a_request_without_recipients():
    with running_sink() as sink:
        assert (
            talk(sink, encode(encode(b"hello") + encode(b"")))
            == b"31:DError: no recipients specified,"
        )


def test_preset_qmail_closes_without_a_reply_to_a_bad_request():
    with running_sink(preset="qmail") as sink:
        assert talk(sink, b"20:hello") in (b"", None)
        assert talk(sink, encode(encode(b"hello") + encode(b""))) == b"16:KOk: queued as 1,"
        long = encode(encode(b"hello") + encode(b"") + encode(b"r" * 1000))
        assert talk(sink, long) == b"51:Dsorry, I can't accept addresses like that (#5.1.3),"


def test_preset_postfix_refuses_a_large_message_early():
    with running_sink(preset=Preset(max_size=100, error_delay=0.05)) as sink:
        server_reply = talk(sink, b"2000:101:" + bytes(50))
    assert (
        server_reply
        == b"71:Dnetstring length exceeds storage limit while receiving message content,"
    )
    assert PRESETS["postfix"].error_delay == 1.0


def test_A14_an_address_beyond_any_limit():
    with running_sink() as sink:
        server_reply = talk(sink, b"9000:0:,0:,2049:")
    assert server_reply is not None
    assert b"length exceeds storage limit while receiving recipient address" in server_reply


def test_a_dump_holds_messages_and_envelopes(tmp_path: Path):
    for number in (1, 2):  # the numbers go on where they ended
        with running_sink(dump=tmp_path) as sink:
            talk(sink, wire_of(b"r\xff@y.test", body=b"hello %d\n" % number))
            assert talk(sink, wire_of()[:-1], then_end=True) == b""
            assert sink.wait_for(number, 20)
            assert sink.wait_for_fault(5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000001.eml",
        "00000001.json",
        "00000002.eml",
        "00000002.json",
    ]
    assert (tmp_path / "00000002.eml").read_bytes() == b"hello 2\n"
    envelope = json.loads((tmp_path / "00000002.json").read_text())
    assert envelope == {
        "number": 2,
        "sender": "s@x.test",
        "recipients": ["r\\xff@y.test"],
        "size": 8,
        "sha256": sha256(b"hello 2\n").hexdigest(),
        "reply": "KOk: queued as 2",
    }


def test_an_empty_message_is_dumped_too(tmp_path: Path):
    with running_sink(dump=tmp_path) as sink:
        talk(sink, wire_of(body=b""))
        assert sink.wait_for(1, 20)
    assert (tmp_path / "00000001.eml").read_bytes() == b""


def test_a_unix_socket(tmp_path: Path):
    path = str(tmp_path / "qmqp")
    with running_sink(path=path), socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
        peer.sendall(wire_of())
        assert peer.recv(100) == b"16:KOk: queued as 1,"


def test_a_port_in_use_raises():
    with (
        running_sink() as sink,
        pytest.raises(OSError, match="in use"),
        running_sink(port=sink.port),
    ):
        pass


def test_only_the_last_requests_are_kept():
    with running_sink(keep=2) as sink:
        for _ in range(3):
            talk(sink, wire_of())
        assert sink.wait_for(3, 20)
        assert [received.number for received in sink.received] == [2, 3]


def test_wait_for_returns_false_after_its_timeout():
    with running_sink() as sink:
        assert not sink.wait_for(1, 0.01)


def test_open_connections_are_closed_with_the_sink():
    for _ in range(20):
        with running_sink() as sink:
            peer = socket.create_connection(("127.0.0.1", sink.port), timeout=10)
            peer.sendall(b"12:")
        with peer, suppress(ConnectionResetError):
            assert peer.recv(1) == b""
