"""`qmqp-relay probe SERVER`: what a QMQP server is, as `qmqp.probe` finds out without delivering
anything."""

import asyncio
from dataclasses import asdict

import typer

from commands import output as tables
from commands.errors import DONE, NOTHING_MATCHED, OUT_OF_REACH
from qmqp.probe import probe
from relay.log import escaped
from relay.routes import parse_server

_COLUMNS = {
    "SERVER": lambda row: row["server"],
    "REACHED": lambda row: "yes" if row["reachable"] else "no",
    "ALLOWED": lambda row: {True: "yes", False: "no", None: "?"}[row["allowed"]],
    "FAMILY": lambda row: row["family"],
    "FOUND": lambda row: row["words"] + (f": {row['said']}" if row["said"] else ""),
}


def run(text: str, *, json_lines: bool, timeout: float) -> int:
    """Ask, and print what was found; 0 if it may be sent to, 1 if not or nobody knows, 3 if it is
    out of reach."""
    try:
        server = parse_server(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    found = asyncio.run(
        probe(host=server.host, port=server.port, path=server.path, connect=timeout, reply=timeout)
    )
    row = {"server": server.name} | asdict(found) | {"said": escaped(found.said)}
    tables.write([row], _COLUMNS, json_lines=json_lines)
    if not found.reachable:
        return OUT_OF_REACH
    return DONE if found.allowed else NOTHING_MATCHED
