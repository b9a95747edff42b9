"""Sends each message to a QMQP server while the SMTP client waits, as qpsmtpd's plugin did.

    RELAY_PLUGINS=qmqp_forward 10.0.0.7 628

The words are the host and the port (628 without one). The client gets the reply of the server: K is
a 250, Z a 451, D a 550. If the server cannot be reached, or its reply is no reply, the message goes
to the queue of the relay; with `only=yes` the client gets a 451 instead. A message that another
plugin holds is not sent.

docs/plugins.md writes this file step by step, and a test compares them.
"""

from qmqp import PORT
from qmqp.client import BodyStream, ClientConnection, Result, SendOutcome, Timeouts
from qmqp.request import Request
from qmqp_relay import (
    OK,
    Answer,
    Deny,
    DenySoft,
    PluginArgumentError,
    PluginArguments,
    PluginLog,
    Relay,
    Transaction,
    hookimpl,
)
from relay.routes import Server, parse_server

TIMEOUT = 120.0
BLOCK_SIZE = 4096
MESSAGE_HOOK_TIMEOUT = 300.0
"""Seconds for the hook, unless `message_timeout=` says otherwise: more than one TIMEOUT."""

log: PluginLog
server: Server
only: bool


@hookimpl
def register(relay: Relay, args: PluginArguments) -> None:
    """Reads the arguments. A wrong one stops the relay, which shows the reason."""
    global log, server, only
    args.check_known("only", words=2)
    host, port = args.word(0), args.word(1, str(PORT))
    try:
        server = parse_server(f"{host}:{int(port)}")
    except ValueError:
        raise PluginArgumentError(f"{host} {port}: write a host, and a port if not 628") from None
    if args.option("only", "no") not in ("yes", "no"):
        raise PluginArgumentError("only=: write yes, or no")
    only = args.option("only", "no") == "yes"
    log = relay.log


@hookimpl
async def queue(transaction: Transaction) -> Answer | None:
    """Sends the message, and answers what the server has replied."""
    if transaction.hold_reason is not None:
        return None
    body = BodyStream(transaction.content.size, transaction.content.read)
    log.info("forwarding", id=transaction.queue_id, server=server.name)
    return answer(await connection(request_for(transaction), body).run())


def connection(request: Request, body: bytes | BodyStream) -> ClientConnection:
    """The connection that sends the request with the message in it."""
    return ClientConnection(
        request=request,
        body=body,
        host=server.host,
        port=server.port,
        block_size=BLOCK_SIZE,
        timeouts=Timeouts(connect=TIMEOUT, io=TIMEOUT, reply=TIMEOUT),
    )


def request_for(transaction: Transaction) -> Request:
    """The request around a message: all lengths are known before the message is read."""
    recipients = [one.address.encode("latin-1") for one in transaction.recipients]
    sender = transaction.sender.address.encode("latin-1")
    return Request(transaction.content.size, sender, recipients)


def answer(result: Result) -> Answer | None:
    """What the reply of the server means to the client."""
    text = result.text.decode("ascii", "replace")
    match result.outcome:
        case SendOutcome.DELIVERED:
            return OK(text)
        case SendOutcome.DEFERRED:
            return DenySoft(text, enhanced="4.0.0")
        case SendOutcome.REJECTED:
            return Deny(text, enhanced="5.0.0")
    log.warning("not forwarded", server=server.name, outcome=result.outcome.value, error=text)
    return DenySoft("Cannot forward the message now", enhanced="4.4.0") if only else None
