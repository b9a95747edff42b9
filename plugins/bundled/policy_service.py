"""Asks a Postfix policy service about each recipient: postgrey, policyd-spf and their like.

    RELAY_PLUGINS=policy_service 127.0.0.1:10023

The word is `host:port` or `unix:/path`. The protocol is that of Postfix' SMTPD_POLICY_README:
attributes `name=value`, one a line, and an empty line; the service replies `action=...` and an
empty line, and the connection stays open. The actions are those of access(5) that make sense here.
Clients that may relay are not asked about, as behind Postfix' permit_mynetworks; with `trusted=yes`
they are. Without the service the client gets a 451; with `fail=open` the recipient passes.
"""

import asyncio
import re
from collections.abc import Mapping
from uuid import uuid4

from qmqp_relay import (
    OK,
    Address,
    Answer,
    Deny,
    DenySoft,
    PluginArgumentError,
    PluginArguments,
    Relay,
    Session,
    Transaction,
    hookimpl,
)
from relay.routes import Server, parse_server

type Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class PolicyService:
    """The service; its connections are kept for the next question."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._idle: list[Connection] = []

    async def ask(self, attributes: Mapping[str, str]) -> str:
        """The action. Raises OSError, EOFError, ValueError."""
        lines = [f"{name}={re.sub('[^ -~]', '?', value)}\n" for name, value in attributes.items()]
        request = "".join([*lines, "\n"]).encode()
        while self._idle:
            try:
                return await self._exchange(self._idle.pop(), request)
            except (OSError, asyncio.IncompleteReadError):
                continue  # the service has closed a connection that was idle
        return await self._exchange(await self._connect(), request)

    async def _connect(self) -> Connection:
        if self._server.path is not None:
            return await asyncio.open_unix_connection(self._server.path)
        return await asyncio.open_connection(self._server.host, self._server.port)

    async def _exchange(self, connection: Connection, request: bytes) -> str:
        reader, writer = connection
        reply = b""
        try:
            writer.write(request)
            await writer.drain()
            reply = await reader.readuntil(b"\n\n")
        finally:
            if reply:
                self._idle.append(connection)
            else:
                writer.close()
        name, _, action = reply.decode("ascii", "replace").strip().partition("=")
        if name != "action" or not action:
            raise ValueError(f"the policy service replied {reply[:100]!r}, which is no action=")
        return action

    async def close(self) -> None:
        """Closes the connections."""
        while self._idle:
            _, writer = self._idle.pop()
            writer.close()
            await writer.wait_closed()


service: PolicyService
ask_trusted: bool


@hookimpl
def register(relay: Relay, args: PluginArguments) -> None:
    """Reads the arguments."""
    global service, ask_trusted
    args.check_known("trusted", words=1)
    address = args.word(0)
    try:
        if not re.match(r"unix:|.+:\d+$", address):
            raise ValueError(address)
        server = parse_server(address)
    except ValueError:
        raise PluginArgumentError(f"{address}: write host:port, or unix:/path") from None
    if args.option("trusted", "no") not in ("yes", "no"):
        raise PluginArgumentError("trusted=: write yes, or no")
    ask_trusted = args.option("trusted", "no") == "yes"
    service = PolicyService(server)
    relay.at_stop(service.close)


@hookimpl
async def mail(transaction: Transaction, parameters: Mapping[str, str]) -> None:
    """Remembers the size. It does not run if a plugin before it has answered OK."""
    transaction.notes["policy_service_size"] = parameters.get("SIZE", "0")


@hookimpl
async def rcpt(transaction: Transaction, recipient: Address) -> Answer | None:
    """Asks the service about the recipient. Raises OSError, EOFError, ValueError."""
    session = transaction.session
    if session.trusted and not ask_trusted:
        return None
    notes = transaction.notes
    question = attributes(session) | {
        "instance": notes.setdefault("policy_service_instance", uuid4().hex),
        "size": notes.get("policy_service_size", "0"),
        "sender": transaction.sender.address,
        "recipient": recipient.address,
    }
    return answer(await service.ask(question), transaction)


def attributes(session: Session) -> dict[str, str]:
    """What the service is told about the client. Its name is not looked up."""
    version, _, cipher = (session.tls or "").partition(" ")
    return {
        "request": "smtpd_access_policy",
        "protocol_state": "RCPT",
        "protocol_name": "ESMTP" if session.door == "smtp" else "QMQP",
        "client_address": session.client_address,
        "client_name": "unknown",
        "reverse_client_name": "unknown",
        "helo_name": session.helo,
        "queue_id": "",
        "recipient_count": "0",
        "sasl_username": session.user or "",
        "encryption_protocol": version,
        "encryption_cipher": cipher,
    }


def answer(action: str, transaction: Transaction) -> Answer | None:
    """What an action of access(5) means. Raises ValueError for one that the relay does not have."""
    verb, _, text = action.partition(" ")
    match verb.upper(), text.strip():
        case (("DUNNO" | "DEFER_IF_REJECT" | "INFO" | "WARN"), _):
            return None
        case "OK", _:
            return OK()
        case "PREPEND", field if ":" in field:
            name, _, value = field.partition(":")
            transaction.add_header(name, value.strip())
            return None
        case "HOLD", reason:
            transaction.hold(reason)
            return None
        case "DISCARD", _:
            transaction.discard()
            return None
        case "REJECT", reason:
            return refusal(554, reason)
        case (("DEFER" | "DEFER_IF_PERMIT"), reason):
            return refusal(450, reason)
        case code, reason if re.fullmatch("[45][0-9][0-9]", code):
            return refusal(int(code), reason)
    raise ValueError(f"the policy service replied action={action[:100]}, which is unknown here")


def refusal(code: int, text: str) -> Answer:
    """A refusal; the text may begin with an enhanced code."""
    match = re.fullmatch(r"[245](\.\d{1,3}\.\d{1,3})\s+(.*)", text)
    tail, reason = match.groups() if match else (".7.1", text or "Access denied")
    kind = Deny if code >= 500 else DenySoft
    return kind(reason, code=code, enhanced=f"{code // 100}{tail}")
