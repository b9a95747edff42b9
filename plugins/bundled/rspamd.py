"""Has rspamd check each message, over its HTTP interface.

    RELAY_PLUGINS=rspamd http://127.0.0.1:11333 delay=5m

The word is the address of rspamd's normal worker. `reject` is a 550 and `soft reject` a 451.
`greylist` is a 451 until the same envelope comes again after `delay`. Otherwise the message passes,
with the fields X-Spam-Action and X-Spam-Score, `X-Spam: Yes` for `add header` and `rewrite
subject`, and the fields that rspamd adds itself. `password=` is that of rspamd. Without rspamd the
client gets a 451; with `fail=open` the message passes unchecked.
"""

from collections import OrderedDict
from collections.abc import Iterator
from time import monotonic
from typing import Any

import httpx

from qmqp_relay import (
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

KEPT_ENVELOPES = 20_000
"""Envelopes that are remembered because of `greylist`; the oldest is forgotten first."""

log: PluginLog
client: httpx.AsyncClient
mta_name: str
delay: float
greylisted: OrderedDict[int, float]


@hookimpl
def register(relay: Relay, args: PluginArguments) -> None:
    """Reads the arguments, and makes a client that keeps its connections."""
    global log, client, mta_name, delay, greylisted
    args.check_known("password", "delay", words=1)
    url = args.word(0, "http://127.0.0.1:11333")
    if not url.startswith(("http://", "https://")):
        raise PluginArgumentError(f"{url}: write it like http://127.0.0.1:11333")
    log, mta_name, delay = relay.log, relay.hostname, args.seconds("delay", 300.0)
    greylisted = OrderedDict()
    client = httpx.AsyncClient(
        base_url=url,
        headers={"Password": args.option("password")} if "password" in args.options else None,
        timeout=httpx.Timeout(None, connect=5.0),  # the time limit of the hook ends the rest
        trust_env=False,
    )
    relay.at_stop(client.aclose)


@hookimpl
async def message(transaction: Transaction) -> Answer | None:
    """Has the content checked. Raises ConnectionError if rspamd does not do it."""
    content = transaction.content
    headers = [*envelope(transaction), ("Content-Length", str(content.size))]
    blocks = (block async for block in content.blocks())
    try:
        response = await client.post("/checkv2", headers=headers, content=blocks)
        result = response.raise_for_status().json()
    except httpx.HTTPError as error:  # whose own traceback is long
        raise ConnectionError(f"rspamd at {client.base_url}: {error!r:.200}") from None
    action, text = result["action"], result.get("messages", {}).get("smtp_message")
    if action == "reject":
        return Deny(text or "The message looks like spam")
    if action == "soft reject" or (action == "greylist" and must_wait(transaction)):
        return DenySoft(text or "Greylisted, try again later")
    add_headers(transaction, action, result)
    return None


def envelope(transaction: Transaction) -> Iterator[tuple[str, str]]:
    """What rspamd is told beside the content."""
    session = transaction.session
    version, _, cipher = (session.tls or "").partition(" ")
    fields = {
        "IP": session.client_address,
        "Helo": session.helo,
        "User": session.user,
        "From": transaction.sender.address,
        "Queue-Id": transaction.queue_id,
        "MTA-Name": mta_name,
        "TLS-Version": version,
        "TLS-Cipher": cipher,
    }
    yield from ((name, value) for name, value in fields.items() if value)
    yield from (("Rcpt", one.address) for one in transaction.recipients)


def must_wait(transaction: Transaction) -> bool:
    """Whether the envelope has come for the first time, or too soon after it."""
    key = hash((transaction.sender, *transaction.recipients))
    first = greylisted.setdefault(key, monotonic())
    if len(greylisted) > KEPT_ENVELOPES:
        greylisted.popitem(last=False)
    return monotonic() - first < delay


def add_headers(transaction: Transaction, action: str, result: dict[str, Any]) -> None:
    """Adds the fields. One that is not valid is logged and left out."""
    fields = [
        ("X-Spam-Action", action),
        ("X-Spam-Score", f"{result['score']:.2f} / {result['required_score']:.2f}"),
    ]
    if action in ("add header", "rewrite subject"):
        fields.append(("X-Spam", "Yes"))
    for name, values in result.get("milter", {}).get("add_headers", {}).items():
        for one in values if isinstance(values, list) else [values]:
            value = one["value"] if isinstance(one, dict) else one
            fields.append((name, str(value).replace("\r\n", "\n")))
    for name, value in reversed(fields):  # each is added at the top
        try:
            transaction.add_header(name, value)
        except ValueError as error:
            log.warning("header not added", id=transaction.queue_id, error=str(error))
