"""Connection probes: whether a server that could not be reached accepts connections again.

While mail waits for such a server, the worker connects to it every few seconds and closes the
connection: nothing is claimed, sent or logged. `ServerPool` says which servers, and allows a
transfer to one that accepted a connection.

What must stay true: at most one connection probe to a server is under way; it takes CONNECT_TIMEOUT
at most; a fault of this machine says nothing about the server. Belongs to the engine's loop.
"""

import asyncio
import time
from contextlib import suppress

from qmqp.connection import Unreachable, Wakeup, connect
from relay import metrics
from relay.routes import Server
from worker.circuit_breaker import ServerPool
from worker.delivery import report_failure


class Prober:
    """Probes the servers of a pool, each for at most `timeout` seconds."""

    def __init__(self, servers: ServerPool, timeout: float) -> None:
        self._servers = servers
        self._timeout = timeout
        self._probes: dict[Server, asyncio.Task[None]] = {}

    def start_due(self) -> None:
        """Begin the connection probes that are due."""
        self._probes = {key: probe for key, probe in self._probes.items() if not probe.done()}
        for server in self._servers.take_probes():
            if server not in self._probes:
                metrics.CONNECTION_PROBES.labels(server.name).inc()
                self._probes[server] = asyncio.get_running_loop().create_task(self._probe(server))

    def close(self) -> None:
        """End the connection probes under way."""
        for probe in self._probes.values():
            probe.cancel()

    async def _probe(self, server: Server) -> None:
        deadline = time.monotonic() + self._timeout
        # OSError: this process cannot open another socket.
        with suppress(OSError):
            try:
                connection = await connect(
                    server.host or "", server.port, server.path, deadline, Wakeup()
                )
            except Unreachable as error:
                # A transfer that began earlier may have succeeded meanwhile.
                if self._servers.state(server).breaker.unreachable:
                    report_failure(self._servers, server, str(error), unreachable=True)
            else:
                connection.close()
                self._servers.record_connection(server)
