"""What a peer costs smtpd that sends no whole message: memory, descriptors, disk and CPU.

`python -m bench.peers` starts an smtpd for each phase of a connection, opens `--peers` connections
that stop in this phase, and divides what the processes of smtpd have gained. Each smtpd is fresh,
because the memory of closed connections is used again, and has served a few connections before, so
that what is loaded once does not count. Memory is the proportional set size of smtpd and its
spooler; the buffers of the kernel are not in it. docs/operate.md has the table.
"""

import resource
import shutil
import socket
import ssl
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import psutil
import trustme
import typer

from bench import services
from bench.machine import cpu_seconds, each_process
from bench.services import free_port, listens, running, wait
from relay.db.engine import migrate

WARM_UP = 20  # connections before the measurement
RECIPIENTS = 1000  # the default of RELAY_MAX_RECIPIENTS
SMALL, LARGE = 60_000, 200_000  # octets of content, below and above a block
UNREAD = 50_000  # commands whose replies are not read
_PASSWORD = b64encode(b"\0ann\0not the password")


@dataclass(frozen=True, slots=True)
class PeerServer:
    """An smtpd that trusts no client. The ports are those of its listeners."""

    pid: int
    directory: Path
    plain: int
    tls: int
    proxy: int
    context: ssl.SSLContext

    def descriptors(self) -> int:
        return sum(each_process([self.pid], lambda process: process.num_fds()))

    def memory(self) -> int:
        """Octets."""
        read = each_process([self.pid], lambda process: int(process.memory_full_info().pss))
        return sum(read)

    def disk(self) -> int:
        """Octets of its spool."""
        files = (self.directory / "spool").rglob("*")
        return sum(file.stat().st_blocks * 512 for file in files if file.is_file())


@dataclass(slots=True)
class Peer:
    """A connection that has come as far as its phase."""

    socket: socket.socket

    def say(self, line: bytes, *, replies: int = 1) -> None:
        """Sends a line and reads its replies."""
        self.socket.sendall(line + b"\r\n")
        self.hear(replies)

    def hear(self, replies: int = 1) -> None:
        """Reads whole replies."""
        read = b""
        while sum(line[3:4] == b" " for line in read.split(b"\r\n")) < replies:
            data = self.socket.recv(65536)
            if not data:
                raise ConnectionError(f"closed after {read[-200:]!r}")
            read += data


def connected(port: int) -> Peer:
    return Peer(socket.create_connection(("127.0.0.1", port), timeout=30))


def greeted(server: PeerServer) -> Peer:
    peer = connected(server.plain)
    peer.hear()
    return peer


def idle(server: PeerServer) -> Peer:
    peer = greeted(server)
    peer.say(b"EHLO client.example")
    return peer


def secured(server: PeerServer) -> Peer:
    peer = connected(server.tls)
    peer.socket = server.context.wrap_socket(peer.socket, server_hostname="localhost")
    peer.hear()
    peer.say(b"EHLO client.example")
    return peer


def in_handshake(server: PeerServer) -> Peer:
    """The client has sent its first flight, and has read the beginning of the server's."""
    peer = connected(server.tls)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = server.context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        peer.socket.sendall(outgoing.read())
    peer.socket.recv(1)
    return peer


def in_auth(server: PeerServer) -> Peer:
    peer = idle(server)
    peer.say(b"AUTH PLAIN")
    return peer


def unverified(server: PeerServer) -> Peer:
    """A wrong password has been sent; its reply comes after seconds."""
    peer = idle(server)
    peer.socket.sendall(b"AUTH PLAIN " + _PASSWORD + b"\r\n")
    return peer


def with_recipients(server: PeerServer) -> Peer:
    peer = idle(server)
    peer.say(b"MAIL FROM:<a@example.com>")
    lines = (b"RCPT TO:<recipient-%d@example.org>" % number for number in range(RECIPIENTS))
    peer.say(b"\r\n".join(lines), replies=RECIPIENTS)
    return peer


def in_content(octets: int, server: PeerServer) -> Peer:
    peer = idle(server)
    peer.say(b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nDATA", replies=3)
    line = b"x" * 98 + b"\r\n"
    peer.socket.sendall(line * (octets // len(line)))
    return peer


def not_reading(server: PeerServer) -> Peer:
    """It sends as many commands as smtpd and the kernel take, and reads no reply."""
    peer = idle(server)
    peer.socket.setblocking(False)
    sent, text = 0, b"HELP\r\n" * UNREAD
    try:
        while sent < len(text):
            sent += peer.socket.send(text[sent:])
    except BlockingIOError:
        pass
    return peer


@dataclass(frozen=True, slots=True)
class Phase:
    """Where the peers stop. At most `most` of them are measured, after `warm_up` others; `settle`
    are the seconds after which smtpd has done all that it does for them."""

    name: str
    reach: Callable[[PeerServer], Peer]
    most: int = 1_000_000
    settle: float = 0.3
    warm_up: int = WARM_UP


PHASES = (
    Phase("before its PROXY header", lambda server: connected(server.proxy)),
    Phase("before its TLS handshake", lambda server: connected(server.tls)),
    Phase("in its TLS handshake", in_handshake),
    Phase("after the banner", greeted),
    Phase("idle after EHLO", idle),
    Phase("idle after EHLO, TLS", secured),
    Phase("in AUTH, before its response", in_auth),
    Phase("a wrong password", unverified, most=9, settle=2.0, warm_up=1),
    Phase(f"a transaction with {RECIPIENTS:,} recipients", with_recipients, most=50),
    Phase(f"in content, {SMALL:,} octets", partial(in_content, SMALL), most=200),
    Phase(f"in content, {LARGE:,} octets", partial(in_content, LARGE), most=200, settle=2.0),
    Phase("a flood whose replies it does not read", not_reading, most=100, settle=1.0),
)


@contextmanager
def served(top: Path, peers: int) -> Iterator[PeerServer]:
    """An smtpd on a new SQLite database and spool."""
    directory = Path(tempfile.mkdtemp(dir=top))
    authority = trustme.CA()
    pair = authority.issue_cert("localhost")
    files = {"chain.pem": pair.cert_chain_pems[0], "key.pem": pair.private_key_pem}
    for name, blob in files.items():
        blob.write_to_path(directory / name)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    plain, tls, proxy = (free_port() for _ in range(3))
    url = f"sqlite:///{directory}/relay.db"
    migrate(url)
    environment = services.clean_environment() | {
        "PYTHONPATH": str(services.ROOT),
        "RELAY_STATE_DIR": str(directory),
        "RELAY_DATABASE_URL": url,
        "RELAY_SMTP_LISTEN": f"127.0.0.1:{plain} 127.0.0.1:{tls}/tls 127.0.0.1:{proxy}/proxy",
        "RELAY_PROXY_NETWORKS": "127.0.0.1",
        "RELAY_TLS_CERTIFICATE": str(directory / "chain.pem"),
        "RELAY_TLS_KEY": str(directory / "key.pem"),
        "RELAY_CLIENT_NETWORKS": "192.0.2.0/24",
        "RELAY_AUTH_PLAINTEXT_NETWORKS": "127.0.0.1",
        "RELAY_RECIPIENT_DOMAINS": "example.org",
        "RELAY_HOSTNAME": "relay.example.net",
        "RELAY_MAX_CONNECTIONS": str(2 * (peers + WARM_UP)),
        "RELAY_MAX_CONNECTIONS_PER_CLIENT": str(2 * (peers + WARM_UP)),
        "RELAY_UNSAFE_DURABILITY": "1",
        "RELAY_LOG_FORMAT": "json",
    }
    command = (*services.RELAY, "smtpd")
    log = directory / "smtpd.log"
    ports = plain, tls, proxy
    with running(
        command, log, lambda: all(map(listens, ports)), env=environment, cwd=services.ROOT
    ) as child:
        yield PeerServer(child.pid, directory, plain, tls, proxy, context)
    shutil.rmtree(directory)


@dataclass(frozen=True, slots=True)
class PeerCost:
    """What one peer costs in a phase."""

    phase: str
    peers: int
    memory: float  # octets
    descriptors: float
    disk: float  # octets
    cpu: float  # seconds

    def __str__(self) -> str:
        return (
            f"{self.phase:<42}{self.peers:>6}{self.memory / 1024:>10.1f}{self.descriptors:>7.1f}"
            f"{self.disk / 1024:>9.1f}{self.cpu * 1e3:>9.2f}"
        )


def measured(phase: Phase, server: PeerServer, count: int) -> PeerCost:
    """Brings so many peers into the phase, and leaves them there until all is read."""
    peers = min(count, phase.most)
    with ExitStack() as stack:
        for _ in range(phase.warm_up):
            stack.enter_context(phase.reach(server).socket)
        time.sleep(phase.settle)
    time.sleep(phase.settle)
    before = server.memory(), server.descriptors(), server.disk(), cpu_seconds([server.pid])
    with ExitStack() as stack:
        for _ in range(peers):
            stack.enter_context(phase.reach(server).socket)
        wait(lambda: server.descriptors() >= before[1] + peers, f"smtpd has accepted {peers} peers")
        time.sleep(phase.settle)
        after = server.memory(), server.descriptors(), server.disk(), cpu_seconds([server.pid])
    gained = [(late - early) / peers for early, late in zip(before, after, strict=True)]
    return PeerCost(phase.name, peers, *gained)


def main(
    peers: Annotated[int, typer.Option(min=1, help="Connections at once.")] = 500,
    phases: Annotated[str, typer.Option(help="Only phases whose name contains this text.")] = "",
    directory: Annotated[Path, typer.Option(help="A directory on the disk to use.")] = Path(
        "/var/tmp"
    ),
) -> None:
    """Measure what a peer costs smtpd that sends no whole message."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4 * peers + 500), hard), hard))
    titles = "peers", "KiB", "files", "disk KiB", "CPU ms"
    print(f"{'a peer':<42}{titles[0]:>6}{titles[1]:>10}{titles[2]:>7}{titles[3]:>9}{titles[4]:>9}")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=directory.resolve()) as name:
        for phase in PHASES:
            if phases in phase.name:
                with served(Path(name), peers) as server:
                    print(measured(phase, server, peers), flush=True)
    print(f"{psutil.cpu_count()} processors, {psutil.cpu_freq() or 'frequency unknown'}")


if __name__ == "__main__":
    typer.run(main)
