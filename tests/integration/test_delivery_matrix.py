"""The matrix of faults and phases of a transfer, as in `docs/delivery.md`.

Every case is a real transfer to a server that misbehaves in one way in one phase, once without
another server and once with a working one behind it. The table in the document is the result;
RELAY_TESTS_WRITE=1 writes it again.
"""

import asyncio
import os
import re
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from qmqp.body import BodyFile
from qmqp.sink import Answer, MagicRecipients, Rule, Sink
from relay.queue.model import Claim, Completion
from relay.queue.outcome import Outcome
from relay.queue.states import State
from relay.routes import Route, Server
from relay.settings import WorkerSettings, load
from worker.circuit_breaker import ServerPool
from worker.delivery import DeliveryTask, TransferConfig

PAGE = Path(__file__).parents[2] / "docs" / "delivery.md"
BEGIN, END = "<!-- made by tests/integration/test_delivery_matrix.py: begin -->", "<!-- end -->"
SETTINGS = load(
    WorkerSettings,
    retry_min=10.0,
    retry_max=20.0,
    uncertain_delay=1000.0,
    connect_timeout=0.5,
    io_timeout=1.0,
    reply_timeout=1.5,
    session_timeout=30.0,
    block_size=65536,
)
SMALL, BIG = 100, 12_000_000  # the kernel's buffers hold the one and not the other
US = b"Error: relay.example[192.0.2.1] is not authorized to use this service"
NOBODY = b"sorry, no mailbox here by that name (#5.1.1)"
CONNECTING, WAITING, BODY, LAST, REPLY = (
    "connecting",
    "connected, before the first byte is read",
    "in the body",
    "at the commit point",
    "after the commit point",
)


@dataclass(frozen=True, slots=True)
class Case:
    """A fault in a phase: the behaviour of the server, or another fault."""

    phase: str
    fault: str
    answer: Answer | str = ""  # or the reason why no server is reached
    size: int = SMALL
    recipients: int = 1
    cut: int = 0  # so many bytes of the body file are missing
    may_commit: bool = True
    stop_when: str = ""  # our own stop


def early(status: bytes, text: bytes, at: int) -> Answer:
    return Answer(status, text, at=at)


def _early_cases(phase: str, at: int) -> list[Case]:
    return [
        Case(phase, "the server closes", Answer(raw=b"", at=at), BIG),
        Case(phase, "the server resets", Answer(raw=b"", at=at, end="reset"), BIG),
        Case(phase, "D about the mail", early(b"D", b"message too large", at), BIG),
        Case(
            phase,
            "D about an address, several recipients",
            early(b"D", NOBODY, at),
            BIG,
            recipients=4,
        ),
        Case(phase, "D: the relay is not authorized", early(b"D", US, at), BIG),
        Case(phase, "Z", early(b"Z", b"busy", at), BIG),
        Case(phase, "K", early(b"K", b"Ok", at), BIG),
        Case(
            phase,
            "not a QMQP reply (`220 ...`)",
            Answer(raw=b"220 mx ESMTP\r\n", at=at, end="stay"),
            BIG,
        ),
        Case(phase, "the server stops reading", Answer(raw=b"", at=at, end="stay"), BIG),
    ]


CASES = [
    Case(CONNECTING, "nothing listens", "refused"),
    Case(CONNECTING, "no answer in CONNECT_TIMEOUT", "deaf"),
    Case(CONNECTING, "the Unix socket is not there", "no socket"),
    *_early_cases(WAITING, 0),
    *_early_cases(BODY, 20_000),
    Case(
        BODY, "the server reads too slowly for IO_TIMEOUT", Answer(read_size=1, read_pause=5.0), BIG
    ),
    Case(
        BODY, "the worker stops", Answer(read_size=512, read_pause=0.05), BIG, stop_when="sending"
    ),
    Case(BODY, "the body file is shorter than it was", Answer(), cut=10, size=50_000),
    Case(LAST, "the lease of the worker is too old", Answer(), may_commit=False),
    Case(REPLY, "K", Answer()),
    Case(REPLY, "K, and then a reset", Answer(end="reset")),
    Case(REPLY, "K, whose text is cut off", Answer(raw=b"20:KOk: qu")),
    Case(REPLY, "Z", Answer(b"Z", b"busy")),
    Case(REPLY, "D about the mail", Answer(b"D", b"go away (#5.7.1)"), recipients=4),
    Case(REPLY, "D about an address, one recipient", Answer(b"D", NOBODY)),
    Case(REPLY, "D about an address, several recipients", Answer(b"D", NOBODY), recipients=4),
    Case(REPLY, "D: the relay is not authorized", Answer(b"D", US)),
    Case(REPLY, "D or Z, whose text is cut off", Answer(raw=b"20:Dgo a")),
    Case(REPLY, "the server closes", Answer(raw=b"")),
    Case(REPLY, "the server resets", Answer(raw=b"", end="reset")),
    Case(REPLY, "no reply in REPLY_TIMEOUT", Answer(raw=b"", end="stay")),
    Case(REPLY, "an empty reply (`0:,`)", Answer(raw=b"0:,")),
    Case(REPLY, "not a QMQP reply (`250 ok`)", Answer(raw=b"250 ok\r\n")),
    Case(REPLY, "a reply that begins with another letter", Answer(raw=b"3:Xab,")),
    Case(
        REPLY,
        "the worker stops before the reply",
        Answer(raw=b"", end="stay"),
        stop_when="committed",
    ),
]


async def _listening(stack: AsyncExitStack, case: Case, directory: Path) -> Server:
    """The server of a case."""
    if isinstance(case.answer, Answer):
        sink = Sink([Rule(case.answer)], receive_buffer=4096)
        await sink.start()
        stack.push_async_callback(sink.close)
        return _server(sink.port)
    if case.answer == "no socket":
        return Server("unix:/none", None, 0, str(directory / "none"))
    taken = stack.enter_context(socket.socket())
    taken.bind(("127.0.0.1", 0))
    if case.answer == "deaf":
        taken.listen(0)
        for _ in range(2):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(taken.getsockname())
    return _server(taken.getsockname()[1])


def _server(port: int) -> Server:
    return Server(f"127.0.0.1:{port}", "127.0.0.1", port)


async def _carried(
    case: Case, servers: tuple[Server, ...], pool: ServerPool, path: Path
) -> Completion:
    """The end of one message."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(handle, case.size)
    recipients = tuple(f"{n}@example.org" for n in range(case.recipients))
    claim = Claim("01" * 16, 1, 1, "r", "a@example.com", case.size, recipients, 0, 0, 0.0)
    config = TransferConfig(SETTINGS, pool, lambda worker: case.may_commit)
    transfer = DeliveryTask(
        claim, "02" * 16, BodyFile(handle, case.size), Route("r", servers), config
    )
    os.ftruncate(handle, case.size - case.cut)
    run = asyncio.create_task(transfer.run())
    if case.stop_when:
        await _until(
            lambda: transfer.committed if case.stop_when == "committed" else transfer.bytes_sent > 0
        )
        if transfer.committed:
            run.cancel()  # the end of a drain
        else:
            transfer.abort()
    return await run


async def _until(condition: Callable[[], bool]) -> None:
    """Run the loop until the condition is true; no time passes except for the other tasks."""
    async with asyncio.timeout(10):
        while not condition():
            turned = asyncio.Event()
            asyncio.get_running_loop().call_later(0.005, turned.set)
            await turned.wait()


def _next(alone: Completion, spare: Completion, pool: ServerPool, server: Server) -> str:
    """The text of the column `next`."""
    steps = []
    if len(spare.attempts) > 1:
        assert (spare.state, [one.outcome for one in spare.attempts][1]) == (
            State.DELIVERED,
            Outcome.DELIVERED,
        )
        steps.append("the next server at once; if none is left,")
    else:
        assert spare.state is alone.state
    match alone.state:
        case State.DELIVERED:
            steps.append("the body is removed")
        case State.BOUNCED:
            steps.append("a DSN to the sender")
        case State.SPLIT:
            steps.append("each half is sent again at once")
        case State.HELD:
            steps.append("an operator decides")
        case State.QUEUED:
            steps.append("any worker may send it at once")
        case _ if alone.delay >= SETTINGS.uncertain_delay:
            steps.append("again after UNCERTAIN_DELAY, never another server at once")
        case _:
            steps.append(
                "again after a backoff"
                if alone.deferrals
                else "again after RETRY_MIN; the wait does not grow"
            )
            assert SETTINGS.retry_min <= alone.delay <= SETTINGS.retry_max
    if pool.state(server).breaker.open_until is not None:
        steps.append("(the circuit of the server opens)")
    return " ".join(steps)


async def _row(case: Case, number: int, directory: Path) -> str:
    async with AsyncExitStack() as stack:
        server = await _listening(stack, case, directory)
        good = Sink([MagicRecipients()])
        await good.start()
        stack.push_async_callback(good.close)
        pool, other = ServerPool(50), ServerPool(50)
        alone, spare = await asyncio.gather(
            _carried(case, (server,), pool, directory / f"{number}-alone"),
            _carried(case, (server, _server(good.port)), other, directory / f"{number}-spare"),
        )
        failed = pool.state(server).breaker.failures
        assert good.count == (1 if len(spare.attempts) > 1 else 0)
        with suppress(IndexError):
            assert alone.attempts[0].server == server.name
        blamed = "yes" if failed else "no"
        tried = alone.attempts[-1].outcome if alone.attempts else alone.outcome
        then = _next(alone, spare, pool, server)
        return f"| {case.phase} | {case.fault} | `{tried}` | `{alone.state}` | {then} | {blamed} |"


async def _table(directory: Path) -> str:
    some = asyncio.Semaphore(6)  # so that no good server is late only because this process is busy

    async def row(case: Case, number: int) -> str:
        async with some:
            return await _row(case, number, directory)

    rows = await asyncio.gather(*(row(case, number) for number, case in enumerate(CASES)))
    head = (
        "| phase | fault | outcome | state | next | a failure of the server |\n"
        "|---|---|---|---|---|---|"
    )
    return "\n".join([head, *rows])


def test_the_matrix_of_faults_and_phases_is_that_of_the_page(tmp_path: Path) -> None:
    in_page(BEGIN, asyncio.run(_table(tmp_path)))


def in_page(begin: str, found: str) -> None:
    """Assert that the table after this mark of the page is the measured one; or write it there, on
    request."""
    before, rest = PAGE.read_text().split(begin)
    table, after = rest.split(END, 1)
    if os.environ.get("RELAY_TESTS_WRITE"):
        PAGE.write_text(f"{before}{begin}\n\n{found}\n\n{END}{after}")
        table = found
    assert table.strip().splitlines() == found.splitlines()


def test_only_faults_after_the_commit_point_are_uncertain_and_none_of_them_fails_over() -> None:
    """Rules that the table must keep."""
    rows = [
        re.split(r" *\| *", line)[1:-1]
        for line in PAGE.read_text().split(BEGIN)[1].split(END)[0].splitlines()
        if line.startswith(("| connect", "| in the", "| at the", "| after"))
    ]
    assert len(rows) == len(CASES)
    for phase, fault, outcome, state, following, _ in rows:
        after = phase == REPLY
        if not after:
            assert outcome not in ("`uncertain`", "`delivered`"), fault
            assert state != "`delivered`", fault
            assert "UNCERTAIN_DELAY" not in following, fault
        else:  # only after a reply that accepts nothing another server gets it
            assert ("next server at once" in following) == (
                fault in ("Z", "D: the relay is not authorized")
            ), fault
        if state in ("`bounced`", "`split`"):
            assert outcome == "`rejected`", fault
        if outcome == "`uncertain`":
            assert "UNCERTAIN_DELAY" in following, fault
