"""smtpd over TLS: STARTTLS and implicit, on both event loops, with real clients."""

import asyncio
import functools
import itertools
import shutil
import smtplib
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from reception import handshake
from relay.listeners import Listener
from smtpd import session
from smtpd.server import SmtpConnection
from tests.certificates import Authority
from tests.content_model import model
from tests.integration.front_end import body_of
from tests.integration.plugins import host, plugin_file
from tests.integration.test_authentication import measured
from tests.integration.test_smtpd import RawClient, SmtpHarness, run, talking
from tests.postfix import PostfixClient
from tests.services import ServiceError
from tests.waiting import until

__all__ = ["run"]  # a fixture

IMPLICIT = Listener("127.0.0.1", 0, tls=True)
LOOPS = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def pair(authority: Authority, tmp_path: Path) -> tuple[Path, Path]:
    return authority.sign("localhost", "127.0.0.1").write(tmp_path / "tls")


@pytest.fixture(params=LOOPS)
def serve(
    request: pytest.FixtureRequest, run: Callable[..., SmtpHarness], pair: tuple[Path, Path]
) -> Callable[..., SmtpHarness]:
    """Runs a server that has a certificate, on each event loop."""
    certificate, key = pair
    return functools.partial(
        run, new_loop=LOOPS[request.param], tls_certificate=certificate, tls_key=key
    )


@contextmanager
def speaking_tls(
    running: SmtpHarness, context: ssl.SSLContext, *, source: str = "127.0.0.1"
) -> Iterator[RawClient]:
    """A client after its handshake: at the banner of an implicit listener, else after STARTTLS."""
    with talking(running, source) as client:
        if not running.listener.tls:
            client.expect(b"220")
            client.say(b"EHLO before.example", b"250")
            client.say(b"STARTTLS", b"220 2.0.0")
        client.socket = context.wrap_socket(client.socket, server_hostname="localhost")
        yield client


def send(client: RawClient, *, banner: bool) -> None:
    if banner:
        client.expect(b"220")
    client.say(b"EHLO client.example", b"250")
    client.send(b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n")
    client.expect(b"250", b"250", b"354")
    client.say(b"Subject: x\r\n\r\nbody\r\n.", b"250 2.0.0 Ok: queued")
    client.say(b"QUIT", b"221")
    assert client.closed()


@pytest.mark.parametrize("listener", [Listener("127.0.0.1", 0), IMPLICIT], ids=str)
def test_a_message_over_tls_says_so_in_its_trace_field_and_its_row(
    serve: Callable[..., SmtpHarness], authority: Authority, listener: Listener
) -> None:
    running = serve(listener=listener)
    with speaking_tls(running, authority.client_context()) as client:
        assert isinstance(client.socket, ssl.SSLSocket)
        name, protocol, _ = client.socket.cipher() or ("", "", 0)
        send(client, banner=listener.tls)
    [message] = running.messages(1)
    assert (message.protocol, message.tls) == ("ESMTPS", f"{protocol} {name}")
    assert message.auth_user is None
    assert body_of(running, message).startswith(
        b"Received: from client.example ([127.0.0.1])\n"
        b"\t(using %b with cipher %b)\n"
        b"\tby relay.example with ESMTPS id " % (protocol.encode(), name.encode())
    )
    until(lambda: not running.server.connections and not running.server.clients)


def test_a_session_begins_anew_after_starttls(
    serve: Callable[..., SmtpHarness], authority: Authority
) -> None:
    running = serve()
    with speaking_tls(running, authority.client_context()) as client:
        client.say(b"MAIL FROM:<a@example.com>", b"503 5.5.1 Send HELO")
        client.send(b"EHLO client.example\r\n")
        assert b"STARTTLS" not in client.reply()
        client.say(b"STARTTLS", b"503 5.5.1 TLS is active")
        client.say(b"MAIL FROM:<a@example.com> SMTPUTF8", b"250")
        client.send(b"RCPT TO:<b@example.org>\r\nDATA\r\n.\r\n")
        client.expect(b"250", b"354", b"250")
    [message] = running.messages(1)
    assert (message.protocol, message.helo) == ("UTF8SMTPS", "client.example")


@pytest.mark.parametrize(
    "injected",
    [
        b"EHLO evil\r\nMAIL FROM:<evil@example.com>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n",
        b"NOOP\r\n" * 500,
        b"RSET",
    ],
)
def test_plain_text_behind_starttls_is_discarded(
    serve: Callable[..., SmtpHarness], authority: Authority, injected: bytes
) -> None:
    """CVE-2011-0411: a man in the middle puts commands behind STARTTLS."""
    running = serve()
    with talking(running) as client:
        client.expect(b"220")
        client.say(b"EHLO client.example", b"250")
        client.send(b"STARTTLS\r\n" + injected)
        client.expect(b"220 2.0.0")
        client.socket = authority.client_context().wrap_socket(
            client.socket, server_hostname="localhost"
        )
        client.say(b"VRFY me", b"252")
        client.say(b"MAIL FROM:<a@example.com>", b"503 5.5.1 Send HELO")
        client.say(b"EHLO client.example", b"250")
        client.say(b"DATA", b"503 5.5.1 Send MAIL")
        client.say(b"QUIT", b"221")


def test_commands_in_the_record_behind_the_handshake_are_obeyed_after_starttls(
    serve: Callable[..., SmtpHarness], authority: Authority
) -> None:
    running = serve()
    with talking(running) as client:
        client.expect(b"220")
        client.say(b"EHLO client.example", b"250")
        client.say(b"STARTTLS", b"220")
        tls, out = eager_handshake(client, authority.client_context())
        tls.write(b"EHLO client.example\r\nQUIT\r\n")
        client.send(out.read())
        assert decrypted(client, tls).count(b"250 DSN\r\n221 ") == 1


def test_a_client_that_sends_before_the_banner_is_refused_over_tls_too(
    serve: Callable[..., SmtpHarness], authority: Authority
) -> None:
    running = serve(listener=IMPLICIT)
    with talking(running) as client:
        tls, out = eager_handshake(client, authority.client_context())
        tls.write(b"EHLO client.example\r\n")
        client.send(out.read())
        assert decrypted(client, tls).startswith(b"554 5.5.0")


def eager_handshake(
    client: RawClient, context: ssl.SSLContext
) -> tuple[ssl.SSLObject, ssl.MemoryBIO]:
    """The handshake up to the client's last flight, which is not sent yet."""
    into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(into, out, server_hostname="localhost")
    while True:
        try:
            tls.do_handshake()
            return tls, out
        except ssl.SSLWantReadError:
            client.send(out.read())
            into.write(client.socket.recv(65536))
            client.incoming = into  # type: ignore[attr-defined]


def decrypted(client: RawClient, tls: ssl.SSLObject) -> bytes:
    """All that the server sends until it closes."""
    text = b""
    while data := client.socket.recv(65536):
        client.incoming.write(data)  # type: ignore[attr-defined]
        while True:
            try:
                more = tls.read()
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:
                return text
            if not more:
                return text
            text += more
    return text


def test_starttls_has_its_place(serve: Callable[..., SmtpHarness]) -> None:
    running = serve()
    with talking(running) as client:
        client.expect(b"220")
        client.say(b"STARTTLS", b"503 5.5.1 Send HELO")
        client.send(b"EHLO client.example\r\n")
        assert b"250-STARTTLS\r\n" in client.reply()
        client.say(b"STARTTLS now", b"501 5.5.4")
        client.say(b"MAIL FROM:<a@example.com>", b"250")
        client.say(b"STARTTLS", b"503 5.5.1 STARTTLS is not allowed in a transaction")
        client.say(b"RCPT TO:<b@example.org>", b"250")
        client.say(b"STARTTLS", b"503 5.5.1")
        client.say(b"RSET", b"250")
        client.say(b"STARTTLS", b"220")


def test_without_a_certificate_starttls_is_unknown(run: Callable[..., SmtpHarness]) -> None:
    with talking(run()) as client:
        client.expect(b"220")
        client.say(b"STARTTLS", b"500 5.5.2")
        client.send(b"EHLO client.example\r\n")
        assert b"STARTTLS" not in client.reply()
        client.say(b"STARTTLS", b"500 5.5.2")


@pytest.mark.parametrize("listener", [Listener("127.0.0.1", 0), IMPLICIT], ids=str)
@pytest.mark.parametrize("sent", [b"", b"EHLO plain.example\r\nQUIT\r\n", b"\x16\x03\x01\x00"])
def test_a_handshake_that_does_not_end_or_is_none_closes_the_connection(
    serve: Callable[..., SmtpHarness],
    monkeypatch: pytest.MonkeyPatch,
    listener: Listener,
    sent: bytes,
) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT", 0.2)
    running = serve(listener=listener)
    failed = measured("tls_handshakes", result="failed")
    with talking(running) as client:
        if not listener.tls:
            client.expect(b"220")
            client.say(b"EHLO client.example", b"250")
            client.say(b"STARTTLS", b"220")
        client.send(sent)
        while not client.closed():
            pass  # an alert of TLS
    until(lambda: not running.server.connections and not running.server.clients)
    assert measured("tls_handshakes", result="failed") == failed + 1


def test_a_connection_in_its_handshake_counts_and_ends_with_the_server(
    serve: Callable[..., SmtpHarness],
) -> None:
    running = serve(listener=IMPLICIT, max_connections_per_client=1)
    with talking(running) as first, talking(running) as second:
        until(lambda: running.server.admitted == 1)
        assert second.closed()
        running.ask_to_stop(0.0)
        assert first.closed()
    until(lambda: not running.server.connections and not running.server.clients)


def test_a_client_that_leaves_in_its_handshake_leaves_nothing(
    serve: Callable[..., SmtpHarness],
) -> None:
    running = serve(listener=IMPLICIT)
    with talking(running):
        until(lambda: running.server.admitted == 1)
    until(lambda: not running.server.connections and not running.server.clients)


@pytest.mark.parametrize("listener", [Listener("127.0.0.1", 0), IMPLICIT], ids=str)
def test_a_large_message_passes_and_reading_pauses(
    serve: Callable[..., SmtpHarness], authority: Authority, listener: Listener
) -> None:
    running = serve(listener=listener)
    content = (b"x" * 998 + b"\r\n") * 6000
    with speaking_tls(running, authority.client_context()) as client:
        if listener.tls:
            client.expect(b"220")
        client.say(b"EHLO client.example", b"250")
        client.send(b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n")
        client.expect(b"250", b"250", b"354")
        client.send(content + b".\r\n")
        client.expect(b"250 2.0.0")
    [message] = running.messages(1)
    assert body_of(running, message).endswith(content.replace(b"\r\n", b"\n"))


def test_replies_that_are_not_read_pause_the_session(
    serve: Callable[..., SmtpHarness], authority: Authority
) -> None:
    running = serve(listener=IMPLICIT)
    with speaking_tls(running, authority.client_context()) as client:
        client.expect(b"220")
        sender = threading.Thread(target=client.send, args=(b"NOOP\r\n" * 400_000,))
        sender.start()
        [connection] = running.server.connections
        assert isinstance(connection, SmtpConnection)
        until(lambda: connection.session.halted or not sender.is_alive(), 30)
        for _ in range(400_000):
            client.expect(b"250")
        sender.join(30)
        assert not sender.is_alive()
        client.say(b"QUIT", b"221")


def test_stopping_sends_421_over_tls(
    serve: Callable[..., SmtpHarness], authority: Authority
) -> None:
    running = serve(listener=IMPLICIT)
    with speaking_tls(running, authority.client_context()) as client:
        client.expect(b"220")
        running.ask_to_stop(5.0)
        client.expect(b"421 4.3.2")
        assert client.closed()


# --- client certificates


def test_a_client_certificate_of_the_authority_may_relay(
    serve: Callable[..., SmtpHarness], tmp_path: Path, authority: Authority
) -> None:
    clients = Authority(tmp_path, "clients")
    own = clients.sign("app.example", common_name="app").write(tmp_path / "app")
    running = serve(
        listener=Listener("127.0.0.1", 0, tls=True, auth=True),
        client_networks=(),
        tls_client_ca=clients.bundle,
    )
    with speaking_tls(running, authority.client_context()) as client:
        client.expect(b"220")
        client.say(b"EHLO client.example", b"250")
        client.say(b"MAIL FROM:<a@example.com>", b"530 5.7.0")
    with speaking_tls(running, authority.client_context(own)) as client:
        send(client, banner=True)
    [message] = running.messages(1)
    assert message.client_trusted
    assert (message.auth_user or "").startswith("CN=app,OU=")
    assert (message.auth_user or "").endswith(",O=clients")
    stranger = Authority(tmp_path, "others").sign("x.example").write(tmp_path / "stranger")
    with (
        pytest.raises((ssl.SSLError, ConnectionError, AssertionError)),
        speaking_tls(running, authority.client_context(stranger)) as client,
    ):
        client.expect(b"220")


# --- the smuggling matrix

OCTETS = (b"\r", b"\n", b"\0", b".")
SEQUENCES = [b"".join(s) for n in range(1, 5) for s in itertools.product(OCTETS, repeat=n)]
HOSTILE = (b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r\n", b"\r.\r", b"\r\n.\r", b"\r\n\0.\r\n")


def transfer(client: RawClient, pieces: list[bytes]) -> bytes:
    client.send(b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n")
    client.expect(b"250", b"250", b"354")
    for piece in pieces:
        client.send(piece)
    reply = client.reply()
    client.say(b"VRFY me", b"252")  # nothing of the content ran as a command
    return reply


@contextmanager
def greeted(running: SmtpHarness, authority: Authority, *, tls: bool) -> Iterator[RawClient]:
    if tls:
        with speaking_tls(running, authority.client_context()) as client:
            client.say(b"EHLO client.example", b"250")
            yield client
    else:
        with talking(running) as client:
            client.expect(b"220")
            client.say(b"EHLO client.example", b"250")
            yield client


def judge(running: SmtpHarness, wire: bytes, reply: bytes) -> None:
    expected = model(wire)
    assert expected is not None
    assert expected[1] == b"", "the message has one end"
    if expected[0] is None:
        assert reply.startswith(b"550 5.6.11"), (wire, reply)
        assert not running.database.messages
    else:
        assert reply.startswith(b"250 2.0.0"), (wire, reply)
        [message] = running.messages(1)
        assert body_of(running, message).endswith(b"\n" + expected[0])
    running.database.messages.clear()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("first", OCTETS, ids=["cr", "lf", "nul", "dot"])
def test_C2_no_sequence_of_cr_lf_nul_and_dot_smuggles_a_message(
    run: Callable[..., SmtpHarness],
    pair: tuple[Path, Path],
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
    first: bytes,
    tls: bool,
) -> None:
    """Whole, and cut in two at every octet."""
    monkeypatch.setattr(session, "ERROR_LIMIT", 1_000_000)
    running = run(tls_certificate=pair[0], tls_key=pair[1])
    with greeted(running, authority, tls=tls) as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for sequence in (s for s in SEQUENCES if s.startswith(first)):
            wire = b"a" + sequence + b"MAIL FROM:<x@y>\r\n.\r\n"
            for at in range(len(wire)):
                judge(running, wire, transfer(client, [wire[:at], wire[at:]]))


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("sequence", HOSTILE)
def test_C2_a_smuggled_end_is_refused_however_it_is_cut(
    run: Callable[..., SmtpHarness],
    pair: tuple[Path, Path],
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
    sequence: bytes,
    tls: bool,
) -> None:
    monkeypatch.setattr(session, "ERROR_LIMIT", 1_000_000)
    running = run(tls_certificate=pair[0], tls_key=pair[1])
    wire = b"a" + sequence + b"MAIL FROM:<x@y>\r\nb\r\n.\r\n"
    cuts = [[wire[:at], wire[at:]] for at in range(1, len(wire))]
    cuts.append([wire[at : at + 1] for at in range(len(wire))])
    with greeted(running, authority, tls=tls) as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for pieces in cuts:
            judge(running, wire, transfer(client, pieces))


# --- real clients


def command(*words: str | Path, **options: Any) -> str:
    if shutil.which(str(words[0])) is None:
        pytest.skip(f"no {words[0]} on this machine")
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=60, **options
    )
    output = str(done.stdout) + str(done.stderr)
    assert done.returncode == 0, output
    return output


def by_openssl(running: SmtpHarness, authority: Authority) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    words: list[str | Path] = [
        "openssl", "s_client", "-quiet", "-verify_return_error", "-CAfile", authority.bundle,
        "-verify_hostname", "localhost", "-connect", f"127.0.0.1:{running.port}",
    ]  # fmt: skip
    words += [] if running.listener.tls else ["-starttls", "smtp"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        if running.listener.tls:  # it does not wait for the banner
            assert client.stdout.readline().startswith(b"220 ")
        client.stdin.write(
            b"EHLO client.example\r\nMAIL FROM:<a@example.com>\r\nrcpt TO:<b@example.org>\r\n"
            b"DATA\r\n"
        )
        client.stdin.flush()
        assert any(line.startswith(b"354") for line in iter(client.stdout.readline, b""))
        client.stdin.write(b"Subject: x\r\n\r\nbody\r\n.\r\nQUIT\r\n")
        client.stdin.flush()
        assert b"\n221 2.0.0" in client.stdout.read()


def by_curl(running: SmtpHarness, authority: Authority) -> None:
    scheme = "smtps" if running.listener.tls else "smtp"
    command(
        "curl", "-sS", "--ssl-reqd", "--cacert", authority.bundle, "--crlf",
        f"{scheme}://localhost:{running.port}/client.example", "--mail-from", "a@example.com",
        "--mail-rcpt", "b@example.org", "-T", "-", input="Subject: x\n\nbody\n",
    )  # fmt: skip


def by_swaks(running: SmtpHarness, authority: Authority) -> None:
    mode = "--tls-on-connect" if running.listener.tls else "--tls"
    command(
        "swaks", mode, "--tls-verify", "--tls-ca-path", authority.bundle, "--server", "localhost",
        "--port", str(running.port), "--from", "a@example.com", "--to", "b@example.org",
        "--helo", "client.example",
    )  # fmt: skip


def by_msmtp(running: SmtpHarness, authority: Authority) -> None:
    command(
        "msmtp", "--host=localhost", f"--port={running.port}", "--tls=on",
        f"--tls-starttls={'off' if running.listener.tls else 'on'}", "--from=a@example.com",
        f"--tls-trust-file={authority.bundle}", "--domain=client.example", "b@example.org",
        input="Subject: x\n\nbody\n",
    )  # fmt: skip


def by_smtplib(running: SmtpHarness, authority: Authority) -> None:
    with smtplib_client(running, authority) as client:
        client.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\nbody\r\n")


def smtplib_client(running: SmtpHarness, authority: Authority) -> smtplib.SMTP:
    """After its handshake."""
    context = authority.client_context()
    if running.listener.tls:
        return smtplib.SMTP_SSL("localhost", running.port, context=context)
    client = smtplib.SMTP("localhost", running.port)
    client.starttls(context=context)
    return client


def by_postfix(running: SmtpHarness, authority: Authority, **more: str) -> None:
    """`more`: further settings of Postfix."""
    settings = {
        "smtp_tls_security_level": "verify",
        "smtp_tls_CAfile": authority.bundle,
        "smtp_tls_wrappermode": "yes" if running.listener.tls else "no",
        "smtp_tls_verify_cert_match": "localhost",
        **more,
    }
    try:
        postfix = PostfixClient(
            running.port, "".join(f"{name} = {value}\n" for name, value in settings.items())
        )
        postfix.start()
    except ServiceError as error:
        pytest.skip(str(error))
    try:
        postfix.sendmail("a@example.com", "b@example.org", b"Subject: x\n\nbody\n")
        until(lambda: running.database.messages, 20)
    finally:
        postfix.stop()


@pytest.mark.parametrize("listener", [Listener("127.0.0.1", 0), IMPLICIT], ids=str)
@pytest.mark.parametrize(
    "deliver", [by_openssl, by_curl, by_swaks, by_msmtp, by_smtplib, by_postfix]
)
def test_real_clients_verify_the_certificate_and_send(
    run: Callable[..., SmtpHarness],
    pair: tuple[Path, Path],
    authority: Authority,
    listener: Listener,
    deliver: Callable[[SmtpHarness, Authority], None],
) -> None:
    running = run(listener=listener, tls_certificate=pair[0], tls_key=pair[1])
    deliver(running, authority)
    [message] = running.messages(1)
    assert (message.protocol[-1], message.tls is not None) == ("S", True)
    assert message.recipients[0].address == "b@example.org"


@pytest.mark.parametrize(("answer", "banner"), [("None", b"220"), ("Deny('no')", b"550 5.7.1 no")])
def test_connect_is_asked_after_an_implicit_handshake(
    run: Callable[..., SmtpHarness],
    tmp_path: Path,
    authority: Authority,
    pair: tuple[Path, Path],
    answer: str,
    banner: bytes,
) -> None:
    plugin = plugin_file(
        tmp_path,
        f"@hookimpl\nasync def connect(session):\n    return {answer} if session.tls else OK()\n",
    )
    hooks = host(str(plugin))
    running = run(listener=IMPLICIT, hooks=hooks, tls_certificate=pair[0], tls_key=pair[1])
    with speaking_tls(running, authority.client_context()) as client:
        client.expect(banner)
