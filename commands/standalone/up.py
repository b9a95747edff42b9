"""`qmqp-relay up`: the whole relay on this machine, in the foreground, below one directory.

How it works: `up` takes a lock on STATE_DIR, looks whether its addresses are free, and only then
starts anything: Valkey (unless RELAY_BROKER_URL names a broker), the migrations, with `--demo` the
sink, `smtpd` and a Celery worker. Each is a process that logs to this terminal and is started again
when it crashes. One that ends for a bad setting or a port in use ends `up`, because the next one
would end as well. The first Ctrl-C stops them in the order of a message's road, so that nothing new
comes in while what is there drains; the second kills.

What must stay true: nothing is started that cannot run beside what is there; what a killed `up`
left behind (lock file, socket) never hinders the next; without a broker everything is delivered all
the same, so a Valkey that does not start is said aloud and stops nobody.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from commands.errors import WRONG_USE
from commands.standalone import valkey
from commands.standalone.supervisor import Child
from relay.log import configure, get_logger
from relay.settings import SmtpdSettings, WorkerSettings, load, redacted, unknown_names

log = get_logger(__name__)
ROOT = Path(__file__).resolve().parents[2]
SINK_PORT = 6280
STOP_ORDER = ("migrate", "smtpd", "worker", "sink", "valkey")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ONE_SIGNAL = 0.5  # seconds in which a signal is the same one, also passed on by whoever started us
# In a demo people watch: a deferred message comes back while they do. What is given explicitly
# wins.
DEMO_SETTINGS = {"RELAY_RETRY_MIN": "5s", "RELAY_UNCERTAIN_DELAY": "30s"}


class UpError(Exception):
    """Why the relay cannot start here, and what would help."""


class Stack:
    """The processes of one relay."""

    def __init__(self, smtpd: SmtpdSettings, worker: WorkerSettings, *, demo: bool) -> None:
        self.smtpd, self.worker, self.demo = smtpd, worker, demo
        self.state_dir = smtpd.state_dir
        self.sink_address = f"127.0.0.1:{free_port(SINK_PORT)}" if demo else ""
        self.environ = self._environ()
        self.children: dict[str, Child] = {}
        self.keepers: list[asyncio.Task[object]] = []

    def _environ(self) -> dict[str, str]:
        known = {
            name: value for name, value in os.environ.items() if not unknown_names({name: value})
        }
        environ = DEMO_SETTINGS | known if self.demo else known
        environ["RELAY_STATE_DIR"] = str(self.state_dir)
        # The children run this code, wherever `up` was called from, and nothing that lies about
        # there.
        environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
        )
        if embedded := valkey.url(self.smtpd):
            environ["RELAY_BROKER_URL"] = embedded
        if self.demo:
            environ["RELAY_QMQP_SERVERS"] = self.sink_address
        return environ

    async def run(self) -> None:
        """Start everything and keep it running; ends only by being cancelled, or by UpError."""
        if valkey.url(self.smtpd):
            await self._start_valkey()
        migrate = self._child("migrate", patience=30)
        await migrate.start()
        if status := await migrate.wait():
            raise UpError(
                f"the migrations failed with exit status {status}; the reason stands above"
            )
        if self.demo:
            where = ("--listen", self.sink_address, "--dump", str(self.state_dir / "sink"))
            self._keep(self._insist(self._child("sink", *where, patience=5)))
        self._keep(self._insist(self._child("smtpd", patience=self.smtpd.drain_timeout + 5)))
        self._keep(self._insist(self._child("worker", patience=self.worker.drain_timeout + 15)))
        self._keep(self._announce())
        await asyncio.gather(*self.keepers)

    async def stop(self) -> None:
        """Stop everything in order; what was killed meanwhile counts as stopped."""
        for name in STOP_ORDER:
            if name in self.children:
                await self.children[name].stop()
        for keeper in self.keepers:
            keeper.cancel()
        await asyncio.gather(*self.keepers, return_exceptions=True)

    def kill(self) -> None:
        """End everything at once."""
        for child in self.children.values():
            child.stopping.set()
            child.signal(signal.SIGKILL)

    def _child(
        self, name: str, *options: str, patience: float, program: list[str] | None = None
    ) -> Child:
        command = program or [sys.executable, "-P", "-m", "commands.cli.main", name, *options]
        child = self.children[name] = Child(name, command, self.environ, patience)
        return child

    def _keep(self, life: Coroutine[Any, Any, object]) -> None:
        self.keepers.append(asyncio.create_task(life))

    async def _insist(self, child: Child) -> None:
        """Keep a child that nothing works without; raises UpError when it says that it cannot run
        here."""
        if await child.keep(refusal=WRONG_USE) == WRONG_USE and not child.stopping.is_set():
            raise UpError(
                f"{child.name} cannot run here, so it is not started again; the reason stands above"
            )

    async def _announce(self) -> None:
        address = self.smtpd.smtp_listen[0]
        if not await _until(lambda: smtp_answers(*_reachable(*address)), 60):
            log.error("smtpd does not answer yet", address=shown(*address))
        typer.echo(banner(self))

    async def _start_valkey(self) -> None:
        program, log_file = valkey.program(), str(self.state_dir / "valkey.log")
        if program is None:
            log.warning("no valkey-server or redis-server found: delivering without a broker")
            return
        self._keep(
            self._child(
                "valkey", patience=5, program=valkey.command(program, self.state_dir)
            ).keep()
        )
        if not await _until(lambda: valkey.answers(self.state_dir), 10):
            log.error("valkey does not answer; going on without it", log=log_file)


def run(*, demo: bool) -> int:
    """Run the relay until it is told to stop; the exit status. Raises UpError or SettingsError."""
    smtpd, worker = load(SmtpdSettings), load(WorkerSettings)
    configure(smtpd)
    with _locked(smtpd.state_dir):
        _refuse_taken(smtpd.smtp_listen, "RELAY_SMTP_LISTEN")
        asyncio.run(_supervise(Stack(smtpd, worker, demo=demo)))
    return 0


async def _supervise(stack: Stack) -> None:
    running = asyncio.ensure_future(stack.run())

    first = 0.0

    def asked() -> None:
        nonlocal first
        if not first:
            first = time.monotonic()
            log.warning("stopping; once more to kill", drain_timeout=stack.worker.drain_timeout)
            running.cancel()
        elif time.monotonic() > first + ONE_SIGNAL:
            stack.kill()

    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, asked)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await running
    finally:
        await stack.stop()
        for (
            number
        ) in SIGNALS:  # nothing is left to stop: one more Ctrl-C must not spoil the exit status
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
    log.warning("stopped")


@contextlib.contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    """Hold STATE_DIR for this process alone; the kernel lets go of it however the process ends."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (state_dir / "up.lock").open("a+")
    except OSError as error:
        raise UpError(f"cannot use RELAY_STATE_DIR = {state_dir}: {error.strerror}") from None
    with file:
        file.seek(0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UpError(
                f"{state_dir} is in use by another `qmqp-relay up`, pid {file.read().strip() or 'not known yet'}:"
                " stop that one, or set RELAY_STATE_DIR to another directory"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _refuse_taken(addresses: Iterable[tuple[str, int]], setting: str) -> None:
    """Raise UpError for an address that cannot be listened on."""
    for host, port in addresses:
        deadline = (
            time.monotonic() + 1
        )  # the children of an `up` that was killed this moment are still dying
        while error := _bind_error(host, port):
            taken = error.errno == errno.EADDRINUSE
            if not taken or time.monotonic() > deadline:
                why = (
                    "is taken by another program" if taken else f"cannot be used: {error.strerror}"
                )
                other = f"{setting}={shown(host, port + 1 if port > 1023 else 2525)}"
                raise UpError(
                    f"{shown(host, port)} {why}; choose another address with {setting}, such as {other}"
                )
            time.sleep(0.05)


def _bind_error(host: str, port: int) -> OSError | None:
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        return error
    return None


def free_port(wanted: int = 0) -> int:
    """A port of this machine that nobody listens on: the wanted one if it is free."""
    if wanted and not _bind_error("127.0.0.1", wanted):
        return wanted
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True


def smtp_answers(host: str, port: int) -> bool:
    """Whether an SMTP server takes clients there."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), 5) as client:
        greeting = client.recv(1000)
        client.sendall(b"QUIT\r\n")
        return greeting.startswith(b"220 ") and bool(client.recv(1000))
    return False


def _reachable(host: str, port: int) -> tuple[str, int]:
    """Where a client on this machine finds a listener; the addresses that mean all of them are no
    place to go to."""
    return ("::1" if ":" in host else "127.0.0.1") if host.strip("0.:") == "" else host, port


def shown(host: str, port: int) -> str:
    """An address as settings spell it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _near(path: str | Path) -> str:
    """A path as one would type it here."""
    return min(str(path), os.path.relpath(path), key=len)


def banner(stack: Stack) -> str:
    """What listens where, and what to type next."""
    servers = (
        " ".join(stack.worker.qmqp_servers)
        or "none yet: mail waits until RELAY_QMQP_SERVERS names one"
    )
    url, database = shown(*_reachable(*stack.smtpd.smtp_listen[0])), stack.smtpd.database_url
    if stack.demo:
        servers = f"{stack.sink_address}, a sink that dumps to {_near(stack.state_dir / 'sink')}"
    facts = {
        "SMTP": " ".join(shown(*address) for address in stack.smtpd.smtp_listen),
        "QMQP": servers,
        "database": redacted(database),
        "broker": redacted(valkey.url(stack.smtpd) or stack.smtpd.broker_url),
    }
    magic = (
        "The recipient says what the sink does: defer-2@ (or any number) defers twice and then accepts,\n"
        "reject@ refuses, slow@ takes its time, drop-reply@ never replies, any other is accepted.\n"
    )
    see = ["make status" if Path("Makefile").exists() else "qmqp-relay list"]
    if database.startswith("sqlite:///"):
        path = _near(database.removeprefix("sqlite:///"))
        see.append(f'{_near(sys.executable)} -m sqlite3 {path} "select * from mail_queue"')
    return "\n".join([
        "",
        "qmqp-relay is up" + (": DEMO, no mail leaves this machine" if stack.demo else ""),
        *(f"  {name:9} {value}" for name, value in facts.items()),
        (magic if stack.demo else "") + "Send a message (curl leaves the line ends to --crlf):",
        f"  curl --crlf smtp://{url} --mail-from me@example.com --mail-rcpt you@example.org -T README.md",
        "See what became of it:",
        *(f"  {line}" for line in see),
        "Ctrl-C stops.",
        "",
    ])  # fmt: skip
