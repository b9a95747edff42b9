"""`qmqp-relay up`: the whole relay on this machine, in the foreground, below one directory.

`up` locks STATE_DIR, checks that its addresses are free, and then starts Valkey (unless
RELAY_BROKER_URL names a broker), the migrations, the sink with `--demo`, `smtpd` and a worker.
While the database is away, smtpd starts alone if the spool is known, and the others follow the
migrations. Each process logs to this terminal and is restarted when it crashes. One that exits for
a bad setting or a port in use ends `up`, because a restart would fail too. The first Ctrl-C stops
the processes in the order in which a message passes them, so that the queue drains; the second
kills them. SIGHUP goes to smtpd, which reads its certificate again; it stops all if the terminal
has been closed.

What must stay true: no process starts that cannot run beside what already runs; the files of a
killed `up` never hinder the next; without a broker all mail is delivered, so a Valkey that does not
start is reported and ends nothing.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import smtplib
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import typer

from commands import healthcheck
from commands.errors import OUT_OF_REACH, WRONG_USE, CommandError
from commands.standalone import valkey
from commands.standalone.supervisor import Child
from relay.listeners import Listener, format_address
from relay.log import configure, get_logger
from relay.redaction import redacted
from relay.settings import (
    SmtpdSettings,
    WorkerSettings,
    load,
    unknown_names,
)
from relay.spool.store import Spool

log = get_logger(__name__)
ROOT = Path(__file__).resolve().parents[2]
SINK_PORT = 6280
MIGRATE_PAUSE = 1.0  # seconds between two tries while the database is away
MIGRATE_WAIT = 3600  # seconds of a try
STOP_ORDER = ("migrate", "smtpd", "worker", "sink", "valkey")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A parent process may pass on a signal that the terminal has sent already. Within this time
# (seconds) both count as one.
ONE_SIGNAL = 0.5
# In a demo people wait for a retry, so it comes soon. A setting in the environment wins.
DEMO_SETTINGS = {"RELAY_RETRY_MIN": "5s", "RELAY_UNCERTAIN_DELAY": "30s"}


class Stack:
    """The processes of one relay."""

    def __init__(self, smtpd: SmtpdSettings, worker: WorkerSettings, *, demo: bool) -> None:
        self.smtpd = smtpd
        self.worker = worker
        self.sink_address = f"127.0.0.1:{free_port(SINK_PORT)}" if demo else ""
        self.children: dict[str, Child] = {}
        self.environ = DEMO_SETTINGS.copy() if demo else {}
        self.environ |= {
            name: value for name, value in os.environ.items() if not unknown_names({name: value})
        }
        # The children run this code, not a module of the directory in which `up` was called.
        paths = (str(ROOT), os.environ.get("PYTHONPATH"))
        self.environ |= {
            "RELAY_STATE_DIR": str(smtpd.state_dir),
            "RELAY_BROKER_URL": valkey.url(smtpd) or smtpd.broker_url,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        if demo:
            self.environ["RELAY_QMQP_SERVERS"] = self.sink_address

    async def run(self) -> None:
        """Start everything and keep it running until it is cancelled; raises CommandError."""
        state_dir = self.smtpd.state_dir
        try:
            async with asyncio.TaskGroup() as tasks:
                if valkey.url(self.smtpd):
                    await self._start_valkey(tasks)
                await self._migrate(tasks)
                if self.sink_address:
                    options = ("--listen", self.sink_address, "--dump", str(state_dir / "sink"))
                    tasks.create_task(_require(self._child("sink", *options, stop_timeout=5)))
                self._accept(tasks)
                worker = self._child("worker", stop_timeout=self.worker.drain_timeout + 15)
                tasks.create_task(_require(worker))
        except* Exception as group:
            raise group.exceptions[0] from None

    async def _migrate(self, tasks: asyncio.TaskGroup) -> None:
        """Migrate the database. While it is away, smtpd accepts mail into a spool that is known."""
        status = await self._run_migrations()
        if status == OUT_OF_REACH and self._spool_is_known():
            log.warning("accepting without the database", reason="the migrations wait for it")
            self._accept(tasks)
            while status == OUT_OF_REACH:
                await asyncio.sleep(MIGRATE_PAUSE)
                status = await self._run_migrations("--wait", str(MIGRATE_WAIT))
        if status:
            text = f"the migrations failed with exit status {status}; the reason is above"
            raise CommandError(WRONG_USE, text)

    async def _run_migrations(self, *options: str) -> int:
        migrate = self._child("migrate", *options, stop_timeout=30)
        await migrate.start()
        return await migrate.wait()

    def _spool_is_known(self) -> bool:
        unsafe = self.smtpd.unsafe_durability
        return Spool.known(self.smtpd.spool_dir, unsafe=unsafe) is not None

    def _accept(self, tasks: asyncio.TaskGroup) -> None:
        """Start smtpd, unless it runs."""
        if "smtpd" not in self.children:
            smtpd = self._child("smtpd", stop_timeout=self.smtpd.drain_timeout + 5)
            tasks.create_task(_require(smtpd))
            tasks.create_task(self._announce())

    async def stop(self) -> None:
        """Stop the processes in order; one that was killed meanwhile counts as stopped."""
        for name in STOP_ORDER:
            if name in self.children:
                await self.children[name].stop()

    def kill(self) -> None:
        """End all processes at once."""
        for child in self.children.values():
            child.signal(signal.SIGKILL)

    def reload(self) -> None:
        """Pass SIGHUP on to smtpd."""
        if "smtpd" in self.children:
            self.children["smtpd"].signal(signal.SIGHUP)

    def _child(
        self, name: str, *options: str, stop_timeout: float, program: list[str] | None = None
    ) -> Child:
        command = program or [sys.executable, "-P", "-m", "commands.cli.start", name, *options]
        child = self.children[name] = Child(name, command, self.environ, stop_timeout)
        return child

    async def _announce(self) -> None:
        listen = str(self.smtpd.smtp_listen[0])
        if not await _until(lambda: _smtpd_answers(listen), 60):
            log.error("smtpd not ready", address=listen)
        typer.echo(banner(self))

    async def _start_valkey(self, tasks: asyncio.TaskGroup) -> None:
        program = valkey.program()
        if program is None:
            hint = "install valkey-server or redis-server; without it mail is some seconds late"
            log.warning("broker not installed", hint=hint)
            return
        state_dir = self.smtpd.state_dir
        command = valkey.command(program, state_dir)
        tasks.create_task(self._child("valkey", stop_timeout=5, program=command).keep())
        if not await _until(lambda: valkey.answers(state_dir), 10):
            log_file = str(state_dir / "valkey.log")
            log.error("valkey not ready", log=log_file)


async def _require(child: Child) -> None:
    """Keep a child running that the relay needs; raises CommandError if it cannot run here."""
    await child.keep(refusal=WRONG_USE)
    raise CommandError(
        WRONG_USE,
        f"{child.name} cannot run here, so it is not started again; the reason is above",
    )


def run(*, demo: bool) -> int:
    """Run the relay until a signal stops it; the exit status.

    Raises CommandError or SettingsError."""
    smtpd, worker = load(SmtpdSettings), load(WorkerSettings)
    configure(smtpd)
    with _locked(smtpd.state_dir):
        _refuse_taken(smtpd.smtp_listen, "RELAY_SMTP_LISTEN")
        _refuse_taken(smtpd.qmqp_listen, "RELAY_QMQP_LISTEN")
        asyncio.run(_supervise(Stack(smtpd, worker, demo=demo)))
    return 0


async def _supervise(stack: Stack) -> None:
    running = asyncio.ensure_future(stack.run())
    first = 0.0

    def on_signal() -> None:
        nonlocal first
        if not first:
            first = time.monotonic()
            log.warning(
                "stopping children",
                drain_timeout=stack.worker.drain_timeout,
                hint="a second signal kills them",
            )
            running.cancel()
        elif time.monotonic() > first + ONE_SIGNAL:
            stack.kill()

    on_terminal = os.isatty(sys.stderr.fileno())

    def on_hangup() -> None:
        if on_terminal and not os.isatty(sys.stderr.fileno()):
            on_signal()
        else:
            stack.reload()

    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, on_hangup if number == signal.SIGHUP else on_signal)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await running
    finally:
        await stack.stop()
        for number in SIGNALS:  # one more Ctrl-C must not change the exit status now
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
    log.warning("stopped")


@contextlib.contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    """Lock STATE_DIR for this process; the kernel removes the lock when the process ends."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (state_dir / "up.lock").open("a+")
    except OSError as error:
        text = f"cannot use RELAY_STATE_DIR = {state_dir}: {error.strerror}"
        raise CommandError(WRONG_USE, text) from None
    with file:
        file.seek(0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = file.read().strip() or "unknown"
            raise CommandError(
                WRONG_USE,
                f"{state_dir} is in use by another `qmqp-relay up`, pid {pid}: stop that one,"
                " or set RELAY_STATE_DIR to another directory",
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _refuse_taken(listeners: Iterable[Listener], setting: str) -> None:
    """Raise CommandError for an address that cannot be listened on."""
    for listener in listeners:
        host, port = listener.host, listener.port
        if listener.socket_name:
            text = "systemd passes its sockets to one process: run `qmqp-relay smtpd` in its unit"
            raise CommandError(WRONG_USE, f"{setting} = {listener}: {text}")
        # The children of an `up` that was just killed may not have ended yet.
        deadline = time.monotonic() + 1
        while error := _bind_error(host, port):
            taken = error.errno == errno.EADDRINUSE
            if taken and time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            why = "is taken by another program" if taken else f"cannot be used: {error.strerror}"
            other = f"{setting}={format_address(host, port + 1 if port > 1023 else 2525)}"
            text = f"{format_address(host, port)} {why}; choose another, such as {other}"
            raise CommandError(WRONG_USE, text)


def _bind_error(host: str, port: int) -> OSError | None:
    try:
        for family, *_, address in socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            socket.create_server(address[:2], family=family).close()
    except OSError as error:
        return error
    return None


def free_port(preferred: int = 0) -> int:
    """A free port of this machine: the preferred one if it is free."""
    if preferred and not _bind_error("127.0.0.1", preferred):
        return preferred
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


async def _until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True


def smtp_answers(host: str, port: int) -> bool:
    """Whether an SMTP server accepts connections there."""
    with contextlib.suppress(OSError), smtplib.SMTP(host, port, timeout=5):  # 220, then QUIT
        return True
    return False


def _smtpd_answers(listen: str) -> bool:
    """Whether smtpd answers at this listener, with whatever options it has."""
    try:
        healthcheck.smtp(listen)
    except (healthcheck.Unhealthy, OSError):
        return False
    return True


def _reachable(listener: Listener) -> tuple[str, int]:
    """The address at which a client of this machine reaches a listener, also one that listens on
    all addresses."""
    host = listener.host
    if host.strip("0.:"):
        return host, listener.port
    return "::1" if ":" in host else "127.0.0.1", listener.port


def _short(path: str | Path) -> str:
    """The path as one types it here: absolute or relative, whichever is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


def banner(stack: Stack) -> str:
    """What listens where, and which commands to try."""
    url = format_address(*_reachable(stack.smtpd.smtp_listen[0]))
    database = stack.smtpd.database_url
    servers = " ".join(stack.worker.qmqp_servers)
    demo = ""
    if stack.sink_address:
        dump = _short(stack.smtpd.state_dir / "sink")
        servers = f"{stack.sink_address}, a test server that keeps mail in {dump}"
        demo = (
            "The recipient decides what the test server does: defer-2@ (or any number) is\n"
            "deferred twice and then accepted, reject@ is rejected, slow@ is accepted late,\n"
            "drop-reply@ gets no reply, and any other is accepted.\n"
        )
    qmqp_in = " ".join(map(str, stack.smtpd.qmqp_listen))
    facts = {
        "SMTP": " ".join(map(str, stack.smtpd.smtp_listen)),
        **({"QMQP in": qmqp_in} if qmqp_in else {}),
        "QMQP": servers or "no server yet: mail waits until RELAY_QMQP_SERVERS names one",
        "database": redacted(database),
        "broker": redacted(valkey.url(stack.smtpd) or stack.smtpd.broker_url),
    }
    commands = ["make status" if Path("Makefile").exists() else "qmqp-relay list"]
    if database.startswith("sqlite:///"):
        path = _short(database.removeprefix("sqlite:///"))
        commands.append(f'{_short(sys.executable)} -m sqlite3 {path} "select * from mail_queue"')
    return "\n".join(
        [
            "",
            "qmqp-relay is up"
            + (": DEMO, no mail leaves this machine" if stack.sink_address else ""),
            *(f"  {name:9} {value}" for name, value in facts.items()),
            f"{demo}Send a message (--crlf gives curl's text the line ends of SMTP):",
            f"  curl --crlf smtp://{url} --mail-from me@example.com --mail-rcpt you@example.org"
            " -T README.md",
            "See its state:",
            *(f"  {command}" for command in commands),
            "Press Ctrl-C to stop.",
            "",
        ]
    )
