"""Attacks on smtpd as it runs on a server: each is an attempt that a hostile host can make.

smtpd is a process with all its listeners. It takes mail for example.org from all clients, and
trusts none of the addresses of 127.0.0.0/8 that the attackers have (TRUSTED only reads slowly).
Afterwards the queue has no row of an attack, and mail is taken as before.
"""

import json
import select
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import psutil
import pytest

from qmqp.netstring import encode
from tests.acceptance.installation import Install, Installation
from tests.acceptance.test_auth import PASSWORD, user
from tests.certificates import Authority
from tests.integration.test_smtpd import RawClient
from tests.services import free_port
from tests.waiting import until, whole_lines

BALANCER, OUTSIDER, GUESSER, FRIEND = "127.0.0.9", "127.0.0.5", "127.0.0.7", "127.0.0.8"
TRUSTED = "127.0.0.20"
SMTP_TIMEOUT, SESSION_TIMEOUT, HEADER_TIMEOUT, HANDSHAKE_TIMEOUT = 4, 14, 5, 30
UNREAD = SMTP_TIMEOUT + 10  # a 421 that is not read has ten seconds
EVIL = b"MAIL FROM:<evil@example.com>\r\nRCPT TO:<evil@elsewhere.example>\r\nDATA\r\nevil\r\n.\r\n"
RIGHT = b"AUTH PLAIN " + b64encode(b"\0ann\0" + PASSWORD.encode())
WRONG = b"AUTH PLAIN " + b64encode(b"\0ann\0wrong horse")
HEADER = b"PROXY TCP4 192.0.2.1 198.51.100.1 40000 25\r\n"


@dataclass
class AttackedRelay:
    """A relay, and the ports of its listeners."""

    relay: Installation
    smtpd: psutil.Process
    authority: Authority
    tls: int
    auth: int
    proxy: int
    qmqp: int

    def connected(self, port: int, source: str = OUTSIDER) -> RawClient:
        client = RawClient("127.0.0.1", port, source)
        client.socket.settimeout(60)
        return client

    def greeted(self, source: str = OUTSIDER, *, port: int = 0, tls: bool = False) -> RawClient:
        client = self.connected(self.tls if tls else port or self.relay.port, source)
        if tls:
            client.socket = self.secured(client.socket)
        client.expect(b"220")
        client.say(b"EHLO client.example", b"250")
        return client

    def secured(self, client: socket.socket) -> ssl.SSLSocket:
        """After the handshake."""
        context = self.authority.client_context()
        return context.wrap_socket(client, server_hostname="localhost")

    def clients(self) -> list[int]:
        """The ports of the clients whose connections smtpd has open."""
        listeners = {self.relay.port, self.tls, self.auth, self.proxy, self.qmqp}
        sockets = self.smtpd.net_connections("tcp")
        return [one.raddr.port for one in sockets if one.raddr and one.laddr.port in listeners]

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = whole_lines(self.relay.log)
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        return [entry for entry in entries if entry["event"] == event]

    def stored(self) -> list[str]:
        return [row[0] for row in self.relay.rows("SELECT sender FROM messages ORDER BY id")]

    def still_takes_mail(self, recipient: str) -> None:
        """A message is taken, and the queue has no sender but its own."""
        self.relay.send(f"{recipient}@example.org")
        sent = "SELECT 1 FROM recipients WHERE address = :r"
        until(lambda: self.relay.rows(sent, r=f"{recipient}@example.org"))
        assert set(self.stored()) <= {"me@example.com"}


@pytest.fixture(scope="module")
def attacked(install: Install, tmp_path_factory: pytest.TempPathFactory) -> AttackedRelay:
    directory = tmp_path_factory.mktemp("attacked")
    authority = Authority(directory)
    certificate, key = authority.sign("localhost").write(directory / "tls")
    tls, auth, proxy, qmqp = (free_port() for _ in range(4))
    relay = install(
        "sqlite",
        CLIENT_NETWORKS=f"192.0.2.0/24 {TRUSTED}",
        RECIPIENT_DOMAINS="example.org",
        QMQP_CLIENT_NETWORKS="127.0.0.0/8",
        AUTH_PLAINTEXT_NETWORKS="127.0.0.0/8",
        PROXY_NETWORKS=BALANCER,
        QMQP_LISTEN=f"127.0.0.1:{qmqp}",
        TLS_CERTIFICATE=str(certificate),
        TLS_KEY=str(key),
        SMTP_TIMEOUT=f"{SMTP_TIMEOUT}s",
        SESSION_TIMEOUT=f"{SESSION_TIMEOUT}s",
        LOG_FORMAT="json",
    )
    user(relay, "add", "ann", "--sender", "*@example.com")
    listen = {relay.port: "", tls: "/tls", auth: "/auth", proxy: "/proxy"}
    child = relay.smtpd(
        SMTP_LISTEN=" ".join(f"127.0.0.1:{port}{option}" for port, option in listen.items())
    )
    return AttackedRelay(relay, psutil.Process(child.pid), authority, tls, auth, proxy, qmqp)


def test_commands_put_behind_starttls_never_reach_the_session(attacked: AttackedRelay) -> None:
    """CVE-2011-0411, with a whole message, a login, and with half a command."""
    for injected in (b"EHLO evil\r\n" + EVIL, RIGHT + b"\r\n" + EVIL, b"EHLO evil\r\nMAIL FR"):
        with closing(attacked.greeted()) as client:
            client.send(b"STARTTLS\r\n" + injected)
            client.expect(b"220 2.0.0")
            client.socket = attacked.secured(client.socket)
            client.say(b"MAIL FROM:<a@example.com>", b"503 5.5.1 Send HELO")
            client.say(b"EHLO client.example", b"250")
            client.say(b"MAIL FROM:<a@example.com>", b"250")
            client.say(b"RCPT TO:<b@elsewhere.example>", b"554 5.7.1")  # no user is logged in
            client.say(b"QUIT", b"221")
            assert client.closed()
    attacked.still_takes_mail("starttls")


@pytest.mark.parametrize("secret", [WRONG, b"AUTH PLAIN", b"AUTH LOGIN", b"AUTH PLAIN ="])
def test_a_message_pipelined_past_auth_is_not_taken(attacked: AttackedRelay, secret: bytes) -> None:
    """Where AUTH is required, and where it alone opens the relay. AUTH that asks for a response
    takes the next line for it."""
    local = EVIL.replace(b"elsewhere.example", b"example.org")  # without /auth it would be taken
    for port, source, message in (
        (attacked.auth, "127.0.0.10", local),
        (attacked.relay.port, "127.0.0.11", EVIL),
    ):
        with closing(attacked.greeted(source, port=port)) as client:
            client.send(secret + b"\r\n" + message + b"QUIT\r\n")
            heard = read_to_the_end(client.socket)
        codes = [line[:3] for line in heard.splitlines()]
        assert not {b"235", b"354"} & {*codes}, heard
        assert b"queued as" not in heard
    attacked.still_takes_mail("pipelined")


def test_a_proxy_header_from_outside_changes_nothing(attacked: AttackedRelay) -> None:
    before = len(attacked.logged("proxy connection refused"))
    for sent in (HEADER, HEADER + b"EHLO evil\r\n" + EVIL, b"", b"\r\n\r\n\0\r\nQUIT\n\x21\x11"):
        with closing(attacked.connected(attacked.proxy)) as client:
            with suppress(ConnectionError):
                client.send(sent)
            assert read_to_the_end(client.socket) == b""
    refused = attacked.logged("proxy connection refused")[before:]
    assert {(one["peer"], one["reason"]) for one in refused} == {
        (OUTSIDER, "the peer is not in RELAY_PROXY_NETWORKS")
    }
    with closing(attacked.greeted()) as client:  # a listener without /proxy
        client.say(HEADER.strip(), b"500 5.5.2 Command not recognized")
        client.say(b"MAIL FROM:<evil@example.com>", b"250")
        client.say(b"RCPT TO:<evil@elsewhere.example>", b"554 5.7.1")
    with closing(attacked.connected(attacked.proxy, BALANCER)) as client:
        client.send(HEADER)
        client.expect(b"220")  # the header is taken from the balancer
    attacked.still_takes_mail("proxy")


def test_many_connections_guess_few_passwords(attacked: AttackedRelay) -> None:
    """Ten failures of an address are verified, and at most one more that was begun already. Then
    the right password does not help it, and other clients log in meanwhile."""
    with ExitStack() as stack:
        guessers = [stack.enter_context(closing(attacked.greeted(GUESSER))) for _ in range(40)]
        for client in guessers:
            client.send(WRONG + b"\r\n")
        with closing(attacked.greeted(FRIEND)) as friend:
            friend.say(RIGHT, b"235")
        replies = [client.reply()[:3] for client in guessers]
        assert 10 <= replies.count(b"535") <= 11, replies
        assert replies.count(b"421") == len(guessers) - replies.count(b"535")
        [guesser, *_] = [
            client for client, reply in zip(guessers, replies, strict=True) if reply == b"535"
        ]
        guesser.say(RIGHT, b"421 4.7.0 Too many failed authentications from your address")
        assert guesser.closed()
    assert len(attacked.logged("authentication limited")) >= replies.count(b"421")
    assert PASSWORD not in attacked.relay.log.read_text()
    attacked.still_takes_mail("guessed")


OVERSIZED = (
    b"9" * 1_000_000,
    b"99999999999999999999:",
    b"4294967296:",
    b"30000000:29000000:" + b"x" * 100_000,
    b"100:4294967295:" + b"x" * 1000,
    b"100:-1:x,",
    encode(encode(b"x") + b"18446744073709551615:" + b"a" * 1000),
    encode(encode(b"x") + encode(b"a@example.com") + encode(b"b" * 100_000)),
    encode(encode(b"x") + encode(b"a@example.com") + encode(b"b@example.org") * 2000),
)


def test_oversized_netstrings_are_refused_in_little_memory(attacked: AttackedRelay) -> None:
    def memory() -> int:
        return int(attacked.smtpd.memory_info().rss)

    with ExitStack() as stack:
        clients = []
        before = memory()
        for sent in OVERSIZED * 3:
            client = stack.enter_context(closing(attacked.connected(attacked.qmqp)))
            with suppress(ConnectionError):
                client.send(sent)
            clients.append(client)
        for client, sent in zip(clients, OVERSIZED * 3, strict=True):
            with suppress(OSError):
                client.socket.shutdown(socket.SHUT_WR)
            heard = read_to_the_end(client.socket)
            assert heard.partition(b":")[2][:1] == b"D", (sent[:40], heard)
        assert memory() - before < 32 << 20
    with closing(attacked.connected(attacked.qmqp)) as client:
        envelope = encode(b"me@example.com") + encode(b"qmqp@example.org")
        client.send(encode(encode(b"Subject: x\n\nHello.\n") + envelope))
        assert read_to_the_end(client.socket).partition(b":")[2][:1] == b"K"
    attacked.still_takes_mail("oversized")


def read_to_the_end(client: socket.socket) -> bytes:
    heard = b""
    with suppress(ConnectionError):
        while data := client.recv(65536):
            heard += data
    return heard


@dataclass
class SlowPeer:
    """A client that sends a piece of `rest` every now and then, and must be closed in time."""

    phase: str
    limit: float
    socket: socket.socket
    rest: Iterator[bytes] = field(default_factory=lambda: iter(()))
    reads: bool = True
    begun: float = field(default_factory=time.monotonic)
    lasted: float | None = None

    def drip(self) -> None:
        try:
            self.socket.send(next(self.rest, b""))
        except (BlockingIOError, ssl.SSLWantWriteError):  # it is full
            return
        except (ConnectionError, ssl.SSLError):
            self.end()

    def look(self) -> None:
        """Notes when the connection has ended. Of a peer that does not read, `drip` does."""
        try:
            if self.reads and not self.socket.recv(65536):
                self.end()
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except (ConnectionError, ssl.SSLError):
            self.end()

    def end(self) -> None:
        self.lasted = self.lasted or time.monotonic() - self.begun


def port_of(peer: SlowPeer) -> int:
    return int(peer.socket.getsockname()[1])


def client_hello(authority: Authority) -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = authority.client_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def octets(text: bytes) -> Iterator[bytes]:
    return (bytes([octet]) for octet in text)


def slow_peers(attacked: AttackedRelay) -> Iterator[SlowPeer]:
    """One for each phase of a connection, by SMTP and QMQP."""
    hello = client_hello(attacked.authority)
    header = attacked.connected(attacked.proxy, BALANCER)
    yield SlowPeer("PROXY header", HEADER_TIMEOUT, header.socket, octets(HEADER))
    for name, rest in (("before the handshake", b""), ("handshake", hello)):
        client = attacked.connected(attacked.tls)
        yield SlowPeer(name, HANDSHAKE_TIMEOUT, client.socket, octets(rest))
    client = attacked.greeted()
    client.say(b"STARTTLS", b"220")
    yield SlowPeer("handshake of STARTTLS", HANDSHAKE_TIMEOUT, client.socket, octets(hello))
    yield from slow_sessions(attacked, tls=False)
    yield from slow_sessions(attacked, tls=True)
    request = attacked.connected(attacked.qmqp)
    yield SlowPeer("a length of QMQP", SMTP_TIMEOUT, request.socket, octets(b"1"))
    request = attacked.connected(attacked.qmqp)
    request.send(b"1000:900:")
    yield SlowPeer("content of QMQP", SESSION_TIMEOUT, request.socket, octets(b"x" * 400))
    flood = repeat(b"HELP\r\n" * 10_000)
    client = attacked.greeted(
        TRUSTED
    )  # of others a hundred commands are answered, and then one a second
    yield SlowPeer("replies that are not read", UNREAD, client.socket, flood, reads=False)


def slow_sessions(attacked: AttackedRelay, *, tls: bool) -> Iterator[SlowPeer]:
    """One for each phase of a session, after its banner."""

    def peer(phase: str, limit: float, sent: bytes, replies: int, rest: bytes) -> SlowPeer:
        client = attacked.greeted(tls=tls)
        client.send(sent)
        for _ in range(replies):
            assert client.reply()[:1] in b"23"
        return SlowPeer(phase + ", TLS" * tls, limit, client.socket, octets(rest))

    envelope = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\n"
    yield peer("after EHLO", SMTP_TIMEOUT, b"", 0, b"")
    yield peer("a command", SMTP_TIMEOUT, b"", 0, b"NOOP " + b"x" * 400)
    yield peer("a response of AUTH", SMTP_TIMEOUT, b"AUTH PLAIN\r\n", 1, b"A" * 400)
    yield peer("an envelope", SMTP_TIMEOUT, envelope, 2, b"RCPT TO:<" + b"x" * 400)
    yield peer("content", SESSION_TIMEOUT, envelope + b"DATA\r\n", 3, b"line\r\n" * 100)


@pytest.mark.timeout(180)  # a handshake has thirty seconds
def test_slow_clients_in_each_phase_are_closed_in_time_and_delay_no_other(
    attacked: AttackedRelay,
) -> None:
    delays: list[float] = []
    with ExitStack() as stack:
        peers = list(slow_peers(attacked))
        for peer in peers:
            stack.enter_context(peer.socket)
            peer.socket.setblocking(False)
        assert {*map(port_of, peers)} <= {*attacked.clients()}
        while waiting := [peer for peer in peers if peer.lasted is None]:
            began = time.monotonic()
            attacked.relay.send("slow@example.org")
            delays.append(time.monotonic() - began)
            select.select([peer.socket for peer in waiting if peer.reads], [], [], 0.2)
            for peer in waiting:
                peer.drip()
                peer.look()
    wrong = {
        peer.phase: peer.lasted
        for peer in peers
        if not peer.limit - 1 <= (peer.lasted or 0) <= peer.limit + 10
    }
    assert not wrong
    assert max(delays) < 5
    until(lambda: not attacked.clients(), what="smtpd has closed all of them")
    attacked.still_takes_mail("slowly")
