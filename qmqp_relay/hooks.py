"""The hooks: what each is asked, when it runs, and what its answer means.

A hook takes any subset of its arguments, by name. It is `async def`, or `def`, and then it runs in
a thread. The first answer that is not None counts. `OK` ends the question: no other plugin is
asked. `Deny` and `DenySoft` refuse, with their reply. A hook that raises, takes too long or returns
something else counts as `DenySoft` 451, or as None with `fail=open` behind the plugin's name.

Built-in rules come first: a hook is asked about what the relay would accept, and cannot open it.
"""

from collections.abc import Awaitable, Mapping
from typing import Any

import pluggy

from qmqp_relay.answers import Answer
from qmqp_relay.events import Event
from qmqp_relay.registration import PluginArguments, Relay
from qmqp_relay.session import Address, RewritableAddress, Session, Transaction

PROJECT = "qmqp_relay"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin as a hook."""

type Answered = Awaitable[Answer | None] | Answer | None
type Ignored = Awaitable[Any] | Any


@hookspec
def register(relay: Relay, args: PluginArguments) -> None:
    """Runs once, when the process starts and in `qmqp-relay plugins` and `check`. It reads the
    arguments and raises for wrong ones. It is a `def`."""


@hookspec
def connect(session: Session) -> Answered:
    """A client has connected, and has sent nothing. By SMTP a refusal takes the place of the
    banner; in both protocols it ends the connection. On a listener with `/tls` the handshake comes
    before it."""


@hookspec
def helo(session: Session, name: str) -> Answered:
    """HELO or EHLO, with its name. SMTP only."""


@hookspec
def mail(transaction: Transaction, sender: Address, parameters: Mapping[str, str]) -> Answered:
    """MAIL, with its parameters (`SIZE`, `BODY`, `RET`, `ENVID`, ...). By QMQP the content has
    come before it."""


@hookspec
def rcpt(
    transaction: Transaction, recipient: RewritableAddress, parameters: Mapping[str, str]
) -> Answered:
    """RCPT, with its parameters (`NOTIFY`, `ORCPT`). `recipient.rewrite` changes where the mail
    goes. By QMQP there is one reply, so the refusal of one recipient refuses the message."""


@hookspec
def data(transaction: Transaction) -> Answered:
    """DATA, before the 354. SMTP only."""


@hookspec
def message(transaction: Transaction) -> Answered:
    """The content is complete and can be read; nothing is stored yet (qpsmtpd: data_post)."""


@hookspec
def queue(transaction: Transaction) -> Answered:
    """After `message`, and the last before the message is stored. `OK` says that the plugin has
    taken the message, and the relay does not store it."""


@hookspec
def queue_post(transaction: Transaction) -> Ignored:
    """The message is stored, and the client has its 250. What the hook returns is ignored."""


@hookspec
def deny(session: Session, reply: str) -> Ignored:
    """Something was refused, with this reply, by a plugin or by the relay itself. What the hook
    returns is ignored."""


@hookspec
def reset_transaction(transaction: Transaction) -> Ignored:
    """The transaction has ended, with a message or without. What the hook returns is ignored."""


@hookspec
def disconnect(session: Session) -> Ignored:
    """The connection has ended. What the hook returns is ignored."""


@hookspec
def event(event: Event) -> Ignored:
    """Something became of mail: it was accepted, delivered, deferred, bounced and so on. Runs in a
    worker, after the COMMIT, at least once for each event and in order for each message. A hook
    that raises or is late gets the event again, ten times in 75 hours, with the same `event.id`.
    What it returns is ignored."""


QUESTIONS = ("connect", "helo", "mail", "rcpt", "data", "message", "queue")
"""The hooks whose answer counts."""
NOTICES = ("queue_post", "deny", "reset_transaction", "disconnect")
"""The hooks that are told, and whose answer is ignored."""
SESSION_HOOKS = frozenset(QUESTIONS + NOTICES)
"""The hooks of smtpd. A session costs nothing more if no plugin has one of them."""
IN_WORKER = ("event",)
"""The hooks that run in workers, and not in a session."""
WITH_CONTENT = ("message", "queue")
"""The hooks that may read the content, and have more time."""
