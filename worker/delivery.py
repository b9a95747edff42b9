"""One claim under way: which servers are tried, and what the outcome means.

What fails before the commit point is tried at the next server of the route at once; so is a Z, and
a D about this relay, because nothing was accepted. After the commit point only a whole reply
decides. Every delivery ends with one `Completion`: the next state, and a row for each attempt.

What must stay true: only a whole reply that says that nothing was accepted allows another try after
a commit point; only a whole D bounces; no local fault (a body, an error of this machine, a stop)
counts against the mail; only `next_state` reads `OUTCOME_POLICY`.
"""

import re
import time
from asyncio import CancelledError
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from qmqp import client
from qmqp.body import Body, BodyFile
from qmqp.request import Request
from relay import metrics
from relay.db.schema import LONGEST_TEXT
from relay.log import escaped, first_line, get_logger, named
from relay.queue.model import Attempt, Claim, Completion, waits_for
from relay.queue.outcome import NO_REQUEST, Outcome
from relay.queue.split import TOO_MANY_RECIPIENTS, can_carry
from relay.queue.states import OUTCOME_POLICY, State, Wait
from relay.routes import NO_SERVER, Route, Server
from relay.settings import WorkerSettings, unauthorized_pattern
from worker.backoff import delay, jitter
from worker.circuit_breaker import ConnectionSlot, ServerPool

log = get_logger(__name__)

# RFC 3463: x.1.y is about an address. A part of a longer number is an IP address or a version.
ABOUT_AN_ADDRESS = re.compile(rb"(?<![\w.])[45]\.1\.\d{1,3}(?!\.?\w)")


# These allow a try at the next server: the first three before the commit point only. The later one
# stands, the more it tells about the mail; the last is recorded when no server is left.
_FAILOVER = (
    Outcome.UNREACHABLE,
    Outcome.MALFORMED,
    Outcome.INTERRUPTED,
    Outcome.REJECTED,
    Outcome.DEFERRED,
)
_BEFORE_COMMIT = _FAILOVER[:3]
_ABOUT_THE_MAIL = {Outcome.REJECTED, Outcome.DEFERRED}
_WHOLE_REPLY = {Outcome.DELIVERED, Outcome.DEFERRED, Outcome.REJECTED}


def next_state(
    outcome: Outcome,
    settings: WorkerSettings,
    step: int,
    *,
    route: Route | None = None,
    committed: bool = True,
    unauthorized: bool = False,
) -> tuple[State, float, int]:
    """The next state after `step` deferrals in a row, the seconds until it is due, the next step.

    `route` may have delays of its own; `committed`: the try was past its commit point;
    `unauthorized`: a D about this relay and not about the mail.
    """
    least = (route and route.retry_min) or settings.retry_min
    most = max(least, (route and route.retry_max) or settings.retry_max)
    if unauthorized:
        outcome = Outcome.DEFERRED
    if outcome is Outcome.MALFORMED and not committed:
        outcome = Outcome.INTERRUPTED
    state, wait = OUTCOME_POLICY[outcome]
    backoff = delay(step, least=least, most=most)
    match wait:
        case Wait.BACKOFF:
            return state, backoff, step + 1
        case Wait.SERVER:
            return state, jitter(least), step
        case Wait.UNCERTAIN if settings.uncertain == "hold":
            return State.HELD, 0.0, step
        case Wait.UNCERTAIN:
            return state, max(jitter(settings.uncertain_delay), backoff), step + 1
        case _:
            return state, 0.0, step


def longest_wait(settings: WorkerSettings, routes: Iterable[Route]) -> float:
    """Seconds: `next_state` defers nothing for longer."""
    waits = [settings.retry_max, settings.uncertain_delay]
    for route in routes:
        waits += [route.retry_min or 0.0, route.retry_max or 0.0]
    return jitter(max(waits), draw=lambda: 1.0)


def report_failure(
    servers: ServerPool,
    server: Server,
    reply: str,
    *,
    unauthorized: bool = False,
    unreachable: bool = False,
) -> None:
    """Record, count and log that a server failed: without a connection (`unreachable`), or because
    it does not authorize the relay (`unauthorized`)."""
    name, closed = server.name, servers.closed(server)
    if unauthorized:
        log.critical("relay not authorized", server=name, reply=reply)
    seconds = servers.record_failure(
        server, reply, unauthorized=unauthorized, unreachable=unreachable
    )
    if seconds is None:
        return
    metrics.CIRCUIT_OPENED.labels(name, "unauthorized" if unauthorized else "failing").inc()
    metrics.CIRCUIT_OPEN.labels(name).set_function(partial(servers.circuit_open, name))
    if closed:
        log.warning("circuit opened", server=name, seconds=round(seconds, 1), reason=reply)


class TransferConfig:
    """What all deliveries of a worker share. `may_commit` is asked just before the last bytes of a
    request leave, with the id of the worker that holds the claim."""

    def __init__(
        self, settings: WorkerSettings, servers: ServerPool, may_commit: Callable[[str], bool]
    ) -> None:
        self.settings = settings
        self.servers = servers
        self.may_commit = may_commit
        self.unauthorized = unauthorized_pattern(settings)
        self.timeouts = client.Timeouts(
            connect=settings.connect_timeout,
            io=settings.io_timeout,
            reply=settings.reply_timeout,
            session=settings.session_timeout,
        )


class _Attempt(NamedTuple):
    """One try at one server; times are monotonic."""

    server: str
    outcome: Outcome
    reply: str
    bytes_sent: int
    started: float
    finished: float


@dataclass(slots=True, eq=False)
class DeliveryTask:
    """One claim, and its body; a file is closed at the end.

    `slot`: the one that was reserved for it, then that of its present connection.
    """

    claim: Claim
    worker: str
    body: Body
    route: Route
    config: TransferConfig
    slot: ConnectionSlot | None = None
    started: float = field(default_factory=time.monotonic, init=False)
    _connection: client.ClientConnection | None = field(default=None, init=False)
    _aborted: bool = field(default=False, init=False)
    _tried: set[str] = field(default_factory=set, init=False)
    _attempts: list[_Attempt] = field(default_factory=list, init=False)

    @property
    def committed(self) -> bool:
        """Whether the last bytes of the request may have left."""
        return self._connection is not None and self._connection.committed

    @property
    def bytes_sent(self) -> int:
        """How much of the current request has left."""
        return self._connection.bytes_sent if self._connection else 0

    def abort(self) -> None:
        """Close the connection before the commit point; after it nothing happens."""
        self._aborted = True
        if self._connection is not None:
            self._connection.abort()

    def close(self) -> None:
        """Close the body and release the slot. May be called again."""
        if self.slot is not None:
            self.slot.release()
        if isinstance(self.body, BodyFile):
            self.body.close()
        self.body = b""

    async def run(self) -> Completion:
        """Send to one server after the other. Raises client.BodyDamaged, and OSError for another
        local fault."""
        try:
            return await self._send()
        except client.BodyChanged as error:
            return self.unsendable(f"the body changed while it was read: {error}")
        finally:
            self.close()

    # Trying servers

    async def _send(self) -> Completion:
        claim = self.claim
        try:
            recipients = [address.encode("latin-1") for address in claim.recipients]
            sender = claim.sender.encode("latin-1")
            request = Request(claim.size, sender, recipients, claim.prefix)
        except ValueError as error:
            return self._no_request(error)
        while not self._aborted:
            self._take_slot()
            if self.slot is None:
                return self._no_server_left()
            if completion := await self._try(self.slot, request):
                return completion
        return self.requeued()

    def _take_slot(self) -> None:
        """Exchange the slot for one at the next server. A preconnection to that server goes
        along."""
        preconnection = None
        if (old := self.slot) is not None:
            preconnection = old.take_preconnection()
            old.release()
        self.slot = new = self.config.servers.take(self.route, self._tried)
        if old is None or preconnection is None:
            return
        if new is not None and new.server == old.server and not preconnection.stale:
            new.preconnection = preconnection
        else:
            preconnection.close()

    async def _try(self, slot: ConnectionSlot, request: Request) -> Completion | None:
        """Try one server; None if the next is to be tried."""
        server, started = slot.server, time.monotonic()
        self._tried.add(server.name)
        log.debug("sending", id=self.claim.queue_id, delivery=self.claim.number, server=server.name)
        self._connection = client.ClientConnection(
            host=server.host,
            port=server.port,
            path=server.path,
            request=request,
            body=self.body,
            block_size=self.config.settings.block_size,
            timeouts=self.config.timeouts,
            may_commit=self._may_commit,
            hold_back=self.config.servers.hold_back(server),
            preconnection=slot.take_preconnection(),
        )
        try:
            result = await self._connection.run()
        except CancelledError:  # the end of a drain: the reply could not be recorded any more
            self._record(server, self._broken_off(), "stopped before the reply came", started)
            if not self.committed:
                return self.requeued()
            return self._decide(Outcome.UNCERTAIN, server.name)
        except Exception as error:
            if self.bytes_sent:
                self._record(server, self._broken_off(), first_line(error), started)
            raise
        return self._evaluate(slot, result, started)

    def _may_commit(self) -> bool:
        return not self._aborted and self.config.may_commit(self.worker)

    def _evaluate(
        self, slot: ConnectionSlot, result: client.Result, started: float
    ) -> Completion | None:
        """What the result of a try means; None if the next server is to be tried."""
        server, outcome = slot.server, self._outcome(slot.server, result)
        reply = escaped(result.text, LONGEST_TEXT)
        # A server that is away is tested about once a minute while other servers of the route get
        # the mail. Such a test proves nothing about its message, and is not recorded.
        if not (slot.test and outcome is Outcome.UNREACHABLE):
            self._record(server, outcome, reply, started)
        if result.ours:
            return self.requeued()
        unauthorized = outcome is Outcome.REJECTED and bool(self.config.unauthorized.search(reply))
        self._report_health(server, result, outcome, reply, unauthorized)
        if (
            unauthorized
            or outcome is Outcome.DEFERRED
            or (outcome in _BEFORE_COMMIT and not result.committed)
        ):
            return None
        completion = self._decide(outcome, server.name, committed=result.committed)
        if completion.state is State.BOUNCED and self._may_split(result):
            completion.state = State.SPLIT
        return completion

    def _outcome(self, server: Server, result: client.Result) -> Outcome:
        """The outcome to record. A server that closes before it reads, as it did the last time,
        refuses the connection like one on which nothing listens."""
        if "closed-at-once" not in result.flags:
            return Outcome(result.outcome)
        refused = self.config.servers.hold_back(server) > 0 and not result.committed
        self.config.servers.record_close(server, result.seconds)
        return Outcome.UNREACHABLE if refused else Outcome(result.outcome)

    def _may_split(self, result: client.Result) -> bool:
        """Whether a D may be about some of the recipients, or about their number
        (relay/queue/split.py).

        A server that says D early has not seen the recipients. One recipient cannot be split, but a
        part of a message (never its first delivery) may decide what happens to the other parts.
        """
        divisible = len(self.claim.recipients) > 1 or self.claim.number > 1
        if not (self.route.bisect and divisible and result.committed):
            return False
        too_many = TOO_MANY_RECIPIENTS.search(result.text.decode("latin-1"))
        return bool(too_many or ABOUT_AN_ADDRESS.search(result.text))

    def _report_health(
        self,
        server: Server,
        result: client.Result,
        outcome: Outcome,
        reply: str,
        unauthorized: bool,
    ) -> None:
        servers = self.config.servers
        if outcome in _WHOLE_REPLY and not unauthorized:
            if servers.record_success(server):
                log.info("circuit closed", server=server.name)
            return
        if outcome is Outcome.UNREACHABLE and servers.closed(server):
            host = server.host or server.path
            log.warning("connect failed", host=host, port=server.port, reason=reply)
        # A server that closes before it reads has accepted the connection.
        unreachable = result.outcome is client.SendOutcome.UNREACHABLE
        report_failure(servers, server, reply, unauthorized=unauthorized, unreachable=unreachable)

    def _broken_off(self) -> Outcome:
        """The outcome of a try that ended without a result."""
        return Outcome.UNCERTAIN if self.committed else Outcome.INTERRUPTED

    def _record(self, server: Server, outcome: Outcome, reply: str, started: float) -> None:
        sent = self.bytes_sent
        self._attempts.append(
            _Attempt(server.name, outcome, reply, sent, started, time.monotonic())
        )
        metrics.attempts(server.name, outcome).inc()
        metrics.SENT_BYTES.inc(sent)

    # Completions

    def requeued(self) -> Completion:
        """Nothing was decided, for a reason that is not the mail's: `queued` again at once."""
        return self._completion(State.QUEUED)

    def postponed(self) -> Completion:
        """Nothing was decided: deferred, for longer each time."""
        settings, step = self.config.settings, self.claim.deferrals
        state, wait, step = next_state(Outcome.DEFERRED, settings, step, route=self.route)
        return self._completion(state, delay=wait, step=step)

    def broken(self) -> Completion:
        """A defect of the program."""
        reply = "internal error, see the log"
        return self._decide(self._broken_off(), None, reply, committed=self.committed)

    def unsendable(self, reason: str) -> Completion:
        """It can never be sent as it is: held until an operator decides."""
        return self._completion(State.HELD, Outcome.UNSENDABLE, reason)

    def recheck(self, reason: str, delay: float) -> Completion:
        """The body does not verify: it is read again after `delay` seconds."""
        return self._completion(State.DEFERRED, Outcome.UNSENDABLE, reason, delay=delay)

    def _no_request(self, error: ValueError) -> Completion:
        """The envelope cannot be sent, and waiting does not change an address. It bounces, or is
        split so that the other recipients get the message. It is held only without recipients."""
        claim = self.claim
        sendable = [can_carry(address) for address in claim.recipients]
        if claim.sender and not can_carry(claim.sender):
            state, code = State.BOUNCED, "5.1.7"  # RFC 3463: bad sender's mailbox address syntax
        elif not all(sendable):
            state = State.SPLIT if any(sendable) else State.BOUNCED
            code = "5.1.3"  # RFC 3463: bad destination mailbox address syntax
        else:
            return self.unsendable(f"{NO_REQUEST}: {error}")
        return self._completion(state, Outcome.UNSENDABLE, f"{NO_REQUEST} (#{code}): {error}")

    def _no_server_left(self) -> Completion:
        """All servers were tried, or none has a free slot."""
        server: str | None = None
        outcome, reply = Outcome.UNREACHABLE, self.config.servers.open_reason(self.route)
        if not self.route.servers:
            reply = NO_SERVER
        elif self._attempts:  # the one that tells most; of equal ones the last
            best = max(
                reversed(self._attempts), key=lambda attempt: _FAILOVER.index(attempt.outcome)
            )
            server, outcome, reply = best.server, best.outcome, best.reply
        down = self.config.servers.down(self.route, self._tried)
        if outcome not in _ABOUT_THE_MAIL and not down:
            # A server is only full or paused. (After a Z the delivery waits all the same, or the
            # server that deferred it would get it again at once.)
            return self.requeued()
        unauthorized = outcome is Outcome.REJECTED
        completion = self._decide(
            outcome, server, reply, committed=False, unauthorized=unauthorized
        )
        if unauthorized or outcome is Outcome.UNREACHABLE:
            completion.waiting_for = waits_for(self.claim.route)
        return completion

    def _decide(
        self,
        outcome: Outcome,
        server: str | None,
        reply: str = "",
        *,
        committed: bool = True,
        unauthorized: bool = False,
    ) -> Completion:
        """The completion that an outcome leads to; without a reply that of the last try."""
        state, wait, step = next_state(
            outcome,
            self.config.settings,
            self.claim.deferrals,
            route=self.route,
            committed=committed,
            unauthorized=unauthorized,
        )
        reply = reply or (self._attempts[-1].reply if self._attempts else "")
        return self._completion(state, outcome, reply, server, wait, step)

    def _completion(
        self,
        state: State,
        outcome: Outcome | None = None,
        reply: str = "",
        server: str | None = None,
        delay: float = 0.0,
        step: int | None = None,
    ) -> Completion:
        claim, now = self.claim, time.monotonic()
        if step is None:
            step = claim.deferrals
        attempts = [
            Attempt(
                n,
                one.server,
                one.outcome,
                one.reply,
                one.bytes_sent,
                now - one.started,
                now - one.finished,
            )
            for n, one in enumerate(self._attempts, 1)
        ]
        return Completion(
            self.worker,
            claim.queue_id,
            claim.number,
            claim.claim,
            state,
            outcome,
            reply,
            server,
            delay,
            step,
            attempts,
            in_journal=claim.place is not None,
        )


def log_outcome(task: DeliveryTask, completion: Completion) -> None:
    """Log what became of a claim, and observe how long a delivered message took."""
    seconds = time.monotonic() - task.started
    if completion.state is State.DELIVERED:
        metrics.DELIVERY_SECONDS.observe(task.claim.received_ago + seconds)
    if completion.outcome is not None:
        metrics.outcomes(task.claim.route, completion.outcome).inc()
    event = "requeued" if completion.state is State.QUEUED else str(completion.state)
    if completion.outcome in (Outcome.UNCERTAIN, Outcome.MALFORMED):
        event = str(completion.outcome)
    level = log.warning if completion.state is State.HELD or event == "uncertain" else log.info
    again = {"again_in": round(completion.delay, 1)} if completion.delay else {}
    level(
        event,
        id=completion.queue_id,
        delivery=completion.number,
        to=named(task.claim.recipients),
        recipients=len(task.claim.recipients),
        route=task.claim.route,
        attempt=task.claim.claim,
        server=completion.server,
        reply=completion.reply,
        ms=round(seconds * 1000),
        bytes=sum(attempt.bytes_sent for attempt in completion.attempts),
        tries=len(completion.attempts),
        **again,
    )
