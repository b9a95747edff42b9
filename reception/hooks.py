"""The hooks of one connection: what its plugins are asked and told, one after the other.

A connection has one `ConnectionHooks` if some plugin has a hook for sessions, and none otherwise.
Questions and notices run in the order in which they were made, in one task; the answer to a
question comes by a callback. The public objects `Session` and `Transaction` live here too.

What must stay true: nothing calls back while the caller is still at work, so a batch of pipelined
commands does not recurse; after `close` no answer comes any more, but notices still run.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from plugins.runner import Plugins, Verdict
from qmqp_relay import OK, Deny, DenySoft, MessageContent, Session, Transaction
from qmqp_relay.hooks import WITH_CONTENT
from reception.envelope import Envelope
from relay.log import get_logger

log = get_logger(__name__)
STOP_TIMEOUT = 5.0
"""Seconds for the hooks that run when the process stops, such as `disconnect`."""


@dataclass(frozen=True, slots=True)
class HookHost:
    """The plugins of the process, and the names of the routes that they may choose."""

    plugins: Plugins
    routes: Callable[[], Collection[str]]
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """Those of connections whose hooks run; the loop has only weak references."""

    async def stop(self) -> None:
        """Lets hooks that run finish, for at most STOP_TIMEOUT, and stops the plugins."""
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=STOP_TIMEOUT)
        await self.plugins.stop()


class Decision(NamedTuple):
    """What the plugins have decided about a message. `reply`: it is refused, or a plugin has taken
    or discarded it, and it is not stored. Otherwise it is, with the other values."""

    reply: str = ""
    prefix: str = ""
    route: str | None = None
    hold_reason: str | None = None

    def route_for(self, _address: str) -> str:
        """The route of every recipient, if the plugins have set one."""
        assert self.route is not None
        return self.route


class ConnectionHooks:
    """The hooks of one connection. `on_idle` is called when nothing is asked or told any more."""

    def __init__(self, host: HookHost, session: Session, on_idle: Callable[[], None]) -> None:
        self.session = session
        self.hooks = host.plugins.hooks
        self._host = host
        self._on_idle = on_idle
        self._waiting: deque[Callable[[], Awaitable[None]]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._running: asyncio.Task[Verdict | None] | None = None
        self._transaction: Transaction | None = None
        self._envelope: Envelope | None = None  # of the transaction
        self._open = True
        self.ends_session = False
        """Whether a plugin wants the session to end with the reply to the message."""

    @property
    def busy(self) -> bool:
        """Whether something is asked or told."""
        return self._task is not None

    def transaction(self, envelope: Envelope) -> Transaction:
        """The transaction of an envelope; it begins with the first call."""
        if self._envelope is not envelope or self._transaction is None:
            self.end_transaction()
            self._envelope = envelope
            self._transaction = Transaction(
                self.session,
                envelope.sender,
                lambda: [one.address for one in envelope.recipients],
                self._host.routes,
            )
        return self._transaction

    def end_transaction(self) -> None:
        """The transaction has ended, if there was one."""
        transaction, self._transaction = self._transaction, None
        self._envelope = None
        if transaction is not None:
            self.tell("reset_transaction", transaction=transaction)

    def end_message(self, reply: str) -> None:
        """The message of the transaction has this reply."""
        transaction = self._transaction
        if not reply.startswith("2"):
            self.tell("deny", session=self.session, reply=reply)
        elif transaction is not None and not transaction.discarded:
            self.tell("queue_post", transaction=transaction)
        self.end_transaction()

    def ask(self, hook: str, then: Callable[[Verdict | None], None], **arguments: Any) -> None:
        """Asks a question; `then` gets the answer, unless the connection is closed before that."""
        self._put(lambda: self._question(hook, arguments, then, lambda: None))

    async def decide(self, envelope: Envelope, queue_id: str, content: MessageContent) -> Decision:
        """Asks `message` and `queue` about a message that is complete. Raises ConnectionError if
        the connection is closed meanwhile."""
        transaction = self.transaction(envelope)
        transaction.queue_id = queue_id
        transaction.content = content
        reply = ""
        try:
            for hook in WITH_CONTENT:
                if hook in self.hooks and not reply and not transaction.discarded:
                    verdict = await self._asked(hook, transaction)
                    reply = self._reply(hook, verdict, queue_id)
        finally:
            transaction.content = None
            content.close()
        if transaction.discarded and not reply:
            log.info("discarded", id=queue_id, client=self.session.client_address)
            reply = f"250 2.0.0 Ok: queued as {queue_id}"
        return Decision(
            reply, transaction.prefix.decode(), transaction.route, _hold_reason(transaction)
        )

    async def _asked(self, hook: str, transaction: Transaction) -> Verdict | None:
        answered: asyncio.Future[Verdict | None] = asyncio.get_running_loop().create_future()

        def then(verdict: Verdict | None) -> None:
            if not answered.done():
                answered.set_result(verdict)

        def gone() -> None:
            if not answered.done():
                answered.set_exception(ConnectionError("the client has gone"))

        self._put(lambda: self._question(hook, {"transaction": transaction}, then, gone))
        return await answered

    def _reply(self, hook: str, verdict: Verdict | None, queue_id: str) -> str:
        """The reply that an answer about a message means; '' if it shall be stored."""
        match verdict:
            case Verdict(Deny() | DenySoft() as answer):
                self.ends_session = answer.disconnect
                return answer.reply
            case Verdict(OK(text), plugin) if hook == "queue":
                log.info(
                    "taken by a plugin",
                    id=queue_id,
                    plugin=plugin,
                    client=self.session.client_address,
                    reply=text,
                )
                return f"250 2.0.0 Ok{text and ': '}{text}"
        return ""

    async def _question(
        self,
        hook: str,
        arguments: dict[str, Any],
        then: Callable[[Verdict | None], None],
        gone: Callable[[], None],
    ) -> None:
        if not self._open:
            gone()
            return
        self._running = asyncio.create_task(self._host.plugins.ask(hook, **arguments))
        await asyncio.wait((self._running,))
        if self._running.cancelled() or not self._open:
            gone()
            return
        verdict = self._running.result()
        self._log(hook, verdict)
        then(verdict)

    def tell(self, hook: str, **arguments: Any) -> None:
        """Tells the plugins; nothing comes back."""
        if hook not in self.hooks:
            return

        async def notice() -> None:
            await self._host.plugins.tell(hook, **arguments)

        self._put(notice)

    def close(self) -> None:
        """The connection has ended."""
        if not self._open:
            return
        self._open = False
        if self._running is not None:
            self._running.cancel()
        self.end_transaction()
        self.tell("disconnect", session=self.session)

    def _put(self, work: Callable[[], Awaitable[None]]) -> None:
        self._waiting.append(work)
        if self._task is None:
            self._task = asyncio.create_task(self._work())
            self._host.tasks.add(self._task)
            self._task.add_done_callback(self._host.tasks.discard)

    async def _work(self) -> None:
        while self._waiting:
            try:
                await self._waiting.popleft()()
            except Exception:  # what follows still runs
                log.exception("answer of a plugin not used")
        self._task = None
        if self._open:
            self._on_idle()

    def _log(self, hook: str, verdict: Verdict | None) -> None:
        if verdict is not None and isinstance(verdict.answer, Deny | DenySoft):
            log.info(
                "denied by a plugin",
                plugin=verdict.plugin,
                hook=hook,
                client=self.session.client_address,
                reply=verdict.answer.reply,
            )


def _hold_reason(transaction: Transaction) -> str | None:
    """Why the message is held, as the operator sees it."""
    reason = transaction.hold_reason
    return None if reason is None else f"held by plugin {transaction.held_by}: {reason}"
