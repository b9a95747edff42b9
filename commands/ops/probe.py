"""`qmqp-relay probe SERVER`: what `qmqp.probe` finds out about a QMQP server without delivering
anything."""

import asyncio
from dataclasses import asdict

import typer

from commands.errors import DONE, NOTHING_MATCHED, OUT_OF_REACH
from commands.output import write
from qmqp.probe import probe
from relay.log import escaped
from relay.routes import parse_server

_COLUMNS = {
    "SERVER": lambda row: row["server"],
    "REACHED": lambda row: "yes" if row["reachable"] else "no",
    "ALLOWED": lambda row: {True: "yes", False: "no", None: "?"}[row["allowed"]],
    "FAMILY": lambda row: row["family"],
    "RESULT": lambda row: row["words"] + (f": {row['said']}" if row["said"] else ""),
}


def run(text: str, *, json_lines: bool, timeout: float) -> int:
    """Probe and print the result; 0 if the server accepts this client, 1 if it does not or that is
    unknown, 3 if it is out of reach."""
    try:
        server = parse_server(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    result = asyncio.run(
        probe(host=server.host, port=server.port, path=server.path, connect=timeout, reply=timeout)
    )
    row = {"server": server.name} | asdict(result) | {"said": escaped(result.said)}
    write([row], _COLUMNS, json_lines=json_lines)
    if not result.reachable:
        return OUT_OF_REACH
    return DONE if result.allowed else NOTHING_MATCHED
