"""Connection probes: by TCP and Unix sockets, within their time, and without a line in the log."""

import asyncio
import errno
import socket
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from relay.routes import Route, Server, parse_server
from tests.services import free_port
from worker.circuit_breaker import FAILURES_TO_OPEN, ServerPool
from worker.prober import Prober


def awaited(server: Server, failures: int = FAILURES_TO_OPEN) -> ServerPool:
    """A pool with a server that cannot be reached and for which mail waits."""
    servers = ServerPool(5)
    for _ in range(failures):
        servers.record_failure(server, "refused", unreachable=True)
    servers.wake_limits([Route("default", (server,))])
    return servers


def probed(servers: ServerPool, timeout: float = 5.0) -> list[dict[str, object]]:
    """Make the probes that are due; what was logged."""

    async def run() -> None:
        Prober(servers, timeout).start_due()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})

    with capture_logs() as logged:
        asyncio.run(run())
    return list(map(dict, logged))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_a_connection_allows_a_transfer(family: socket.AddressFamily, tmp_path: Path) -> None:
    with socket.socket(family) as listener:
        unix = family == socket.AF_UNIX
        listener.bind(str(tmp_path / "socket") if unix else ("127.0.0.1", 0))
        name = listener.getsockname()
        server = parse_server(f"unix:{name}" if unix else f"127.0.0.1:{name[1]}")
        servers = awaited(server)
        assert probed(servers) == []
        assert servers.free(server) == 0, "it does not listen"
        listener.listen()
        servers.state(server).breaker.probe_at = 0.0
        assert probed(servers) == []
        assert servers.free(server) == 1


def test_a_probe_that_opens_the_circuit_is_logged_once_and_each_is_counted() -> None:
    server = parse_server(f"127.0.0.1:{free_port()}")
    servers = awaited(server, 1)
    logged = []
    for _ in range(6):
        servers.state(server).breaker.probe_at = 0.0
        logged += probed(servers)
    assert [line["event"] for line in logged] == ["circuit opened"]
    labels = {"server": server.name}
    assert REGISTRY.get_sample_value("relay_connection_probes_total", labels) == 6
    assert REGISTRY.get_sample_value("relay_circuit_open", labels) == 1


def test_a_server_that_does_not_answer_is_probed_for_the_connect_timeout_and_once_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = parse_server("192.0.2.1:628")
    servers = awaited(server)
    begun = []

    async def never(*arguments: object) -> None:
        begun.append(arguments)
        await asyncio.Event().wait()

    monkeypatch.setattr("worker.prober.connect", never)

    async def run() -> None:
        prober = Prober(servers, 5.0)
        for _ in range(3):
            servers.state(server).breaker.probe_at = 0.0
            prober.start_due()
            await asyncio.sleep(0)
        prober.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    asyncio.run(run())
    ((host, port, path, _, _),) = begun
    assert (host, port, path) == ("192.0.2.1", 628, None)
    assert servers.free(server) == 0


def test_a_fault_of_this_machine_says_nothing_about_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = parse_server("192.0.2.1:628")
    servers = awaited(server)

    async def connect(*_: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr("worker.prober.connect", connect)
    assert probed(servers) == []
    assert servers.open_circuits() == {server.name: "refused"}
