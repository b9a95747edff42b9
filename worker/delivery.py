"""One claim on its way: which servers it is tried at, and what its outcome means.

A transfer goes through the servers of its route in order. What fails before the commit point goes
on to the next one at once, and so does a Z, or a D about us: nothing was accepted. After the commit
point a try without a whole reply ends the transfer, because only its server can tell what became of
the message. Whatever happens, a transfer ends with a `Completion`: the state that the delivery
should have next, and a row for each try.

What an outcome leads to stands in one table (`states.OUTCOME_POLICY`), and `next_state` is the only place
that reads it. What must stay true: only a whole reply that says that nothing was accepted lets
another try follow one that was past its commit point; only a D that came whole bounces; no fault of
ours (a body, a local error, our own stop) is ever held against the mail.
"""

import os
import re
import time
from asyncio import CancelledError
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from qmqp import client
from qmqp.request import NO_REQUEST, Request
from relay import metrics
from relay.db.schema import LONGEST_TEXT
from relay.log import escaped, first_line, get_logger
from relay.queue.model import Attempt, Claim, Completion, waits_for
from relay.queue.split import TOO_MANY_RECIPIENTS, can_carry
from relay.queue.states import OUTCOME_POLICY, Outcome, State, Wait
from relay.routes import NO_SERVER, Route, Server
from relay.settings import WorkerSettings, unwanted
from worker.backoff import delay, jitter
from worker.circuit_breaker import ConnectionSlot, ServerPool

log = get_logger(__name__)

# RFC 3463: x.1.y is about an address. What is part of a longer number is an IP address or a
# version.
ABOUT_AN_ADDRESS = re.compile(rb"(?<![\w.])[45]\.1\.\d{1,3}(?!\.?\w)")


# What goes on to the next server, before its commit point or (a Z, a D about us) also after it. The
# more a try tells about the mail, the later it stands: what is recorded when no server is left.
_MOVES_ON = (
    Outcome.UNREACHABLE,
    Outcome.MALFORMED,
    Outcome.INTERRUPTED,
    Outcome.REJECTED,
    Outcome.DEFERRED,
)
_SAYS_LATER = {Outcome.REJECTED, Outcome.DEFERRED}  # of those
_WHOLE_REPLY = {Outcome.DELIVERED, Outcome.DEFERRED, Outcome.REJECTED}


def next_state(
    outcome: Outcome,
    settings: WorkerSettings,
    step: int,
    *,
    route: Route | None = None,
    committed: bool = True,
    unwanted: bool = False,
) -> tuple[State, float, int]:
    """The next state of a delivery after `step` deferrals in a row, the seconds until it is due,
    the next step.

    `route` may have delays of its own; `committed`: the try was past its commit point; `unwanted`:
    a D that was about us and not about the mail.
    """
    least = (route and route.retry_min) or settings.retry_min
    most = max(least, (route and route.retry_max) or settings.retry_max)
    if unwanted:
        outcome = Outcome.DEFERRED
    if outcome is Outcome.MALFORMED and not committed:
        outcome = Outcome.INTERRUPTED
    state, wait = OUTCOME_POLICY[outcome]
    growing = delay(step, least=least, most=most)
    match wait:
        case Wait.BACKOFF:
            return state, growing, step + 1
        case Wait.HEALTH:
            return state, jitter(least), step
        case Wait.UNCERTAIN if settings.uncertain == "hold":
            return State.HELD, 0.0, step
        case Wait.UNCERTAIN:
            return state, max(jitter(settings.uncertain_delay), growing), step + 1
        case _:
            return state, 0.0, step


def longest_wait(settings: WorkerSettings, routes: Iterable[Route]) -> float:
    """Seconds: `next_state` defers nothing for longer."""
    waits = [settings.retry_max, settings.uncertain_delay]
    for route in routes:
        waits += [route.retry_min or 0.0, route.retry_max or 0.0]
    return jitter(max(waits), draw=lambda: 1.0)


def record_failure(servers: ServerPool, server: Server, reply: str, *, unwanted: bool) -> None:
    """A server failed, or (`unwanted`) said that it is not for us: tell its breaker, the metrics
    and the log."""
    if unwanted:
        log.critical("server does not want us", server=server.name, reply=reply)
    rest = servers.failed(server, reply, at_once=unwanted)
    if rest is not None:
        metrics.rests(server.name, "refuses us" if unwanted else "failing").inc()
        metrics.RESTING.labels(server.name).set_function(partial(servers.rests, server.name))
        log.warning("server left alone", server=server.name, seconds=round(rest, 1), reason=reply)


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """What all transfers of a worker share. `may_commit` is asked, with the id of the worker that
    holds the claim, just before the last bytes of a request leave."""

    settings: WorkerSettings
    timeouts: client.Timeouts
    servers: ServerPool
    may_commit: Callable[[str], bool]
    not_wanted: re.Pattern[str]

    @classmethod
    def of(
        cls, settings: WorkerSettings, servers: ServerPool, may_commit: Callable[[str], bool]
    ) -> "TransferConfig":
        timeouts = client.Timeouts(
            connect=settings.connect_timeout,
            io=settings.io_timeout,
            reply=settings.reply_timeout,
            session=settings.session_timeout,
        )
        return cls(settings, timeouts, servers, may_commit, unwanted(settings))


class DeliveryTask:
    """One claim and the open body `handle` (-1: none), which it closes when it ends.

    `slot_taken` is called once, as soon as the transfer holds a place at a server or will never
    hold one.
    """

    __slots__ = ("_aborted", "_current", "_handle", "_placed", "_route", "_terms", "_tried", "_tries", "claim",
                 "started", "worker")  # fmt: skip

    def __init__(
        self,
        claim: Claim,
        worker: str,
        handle: int,
        route: Route | None,
        terms: TransferConfig,
        slot_taken: Callable[[], object] | None = None,
    ) -> None:
        self.claim, self.worker = claim, worker
        self._handle, self._terms = handle, terms
        self._route = route or Route(claim.route, ())  # one that vanished has no servers
        self._placed = slot_taken
        self._current: client.ClientConnection | None = None
        self._aborted = False
        self._tried: set[str] = set()
        self._tries: list[tuple[Server, Outcome, str, int, float, float]] = []
        self.started = time.monotonic()

    @property
    def committed(self) -> bool:
        """Whether the last bytes of the request may have left."""
        return self._current is not None and self._current.committed

    def abort(self) -> None:
        """Close now if that is before the commit point; after it nothing happens."""
        self._aborted = True
        if self._current is not None:
            self._current.abort()

    def close(self) -> None:
        """Let go of the body and of the room that was kept for it."""
        self._report_slot_taken()
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            os.close(handle)

    def _report_slot_taken(self) -> None:
        if self._placed is not None:
            slot_taken, self._placed = self._placed, None
            slot_taken()

    async def run(self) -> Completion:
        """Send, at one server after the other; what became of it. Raises OSError for a fault of
        this machine."""
        try:
            return await self._send()
        except client.BodyChanged as error:
            return self.unsendable(f"the body changed while it was read: {error}")
        finally:
            self.close()

    async def _send(self) -> Completion:
        claim = self.claim
        try:
            recipients = [address.encode("latin-1") for address in claim.recipients]
            request = Request(claim.size, claim.sender.encode("latin-1"), recipients)
        except ValueError as error:
            return self._no_request(error)
        while not self._aborted:
            place = self._terms.servers.take(self._route, self._tried)
            self._report_slot_taken()
            if place is None:
                return self._nowhere()
            try:
                record = await self._at(place, request)
            finally:
                place.release()
            if record is not None:
                return record
        return self.requeued()

    async def _at(self, place: ConnectionSlot, request: Request) -> Completion | None:
        """One try; None when the next server is to be tried."""
        server, started = place.server, time.monotonic()
        self._tried.add(server.name)
        log.debug("sending", id=self.claim.queue_id, delivery=self.claim.number, server=server.name)
        self._current = client.ClientConnection(
            host=server.host, port=server.port, path=server.path, request=request, fd=self._handle,
            block_size=self._terms.settings.block_size, timeouts=self._terms.timeouts, may_commit=self._may_commit,
            hold_back=self._terms.servers.holds_back(server),
        )  # fmt: skip
        try:
            result = await self._current.run()
        except CancelledError:
            # Only the end of a drain cancels: nobody will hear the reply any more.
            outcome = Outcome.UNCERTAIN if self.committed else Outcome.INTERRUPTED
            self._note(
                server, outcome, "stopped before the reply came", self._current.bytes_sent, started
            )
            return self._record(outcome, server) if self.committed else self.requeued()
        except Exception as error:
            if sent := self._current.bytes_sent:  # our fault, but a try all the same
                doubt = Outcome.UNCERTAIN if self.committed else Outcome.INTERRUPTED
                self._note(server, doubt, first_line(error), sent, started)
            raise
        outcome, reply = self._outcome(server, result), escaped(result.text, LONGEST_TEXT)
        # A server that is away is tried every few seconds while mail waits for it. Such a try says
        # nothing about the message that it is made with, and a row for each would come to tens of
        # thousands a day.
        if not (place.probe and outcome is Outcome.UNREACHABLE):
            self._note(server, outcome, reply, result.bytes_sent, started)
        if result.ours:
            return self.requeued()
        unwanted = outcome is Outcome.REJECTED and self._terms.not_wanted.search(reply) is not None
        self._health(server, outcome, reply, unwanted)
        if (
            unwanted
            or outcome is Outcome.DEFERRED
            or (outcome in _MOVES_ON[:3] and not result.committed)
        ):
            return None
        record = self._record(outcome, server, committed=result.committed)
        if record.state is State.BOUNCED and self._may_split(result):
            record.state = State.SPLIT
        return record

    def _outcome(self, server: Server, result: client.Result) -> Outcome:
        """What a result is recorded as. A server that closes before it reads, as it did the last
        time, refuses the connection as one does on which nothing listens."""
        if "closed-at-once" not in result.flags:
            return result.outcome
        servers = self._terms.servers
        refused = servers.holds_back(server) > 0 and not result.committed
        servers.closed(server, result.seconds)
        return Outcome.UNREACHABLE if refused else result.outcome

    def _may_split(self, result: client.Result) -> bool:
        """Whether a D may be about some of the recipients only, or about their number
        (relay/queue/split.py).

        An early one has not seen them. One recipient cannot be cut, but a piece of a message (never
        its first delivery) may decide what becomes of the other pieces.
        """
        cut = self._route.bisect and (len(self.claim.recipients) > 1 or self.claim.number > 1)
        too_many = TOO_MANY_RECIPIENTS.search(result.text.decode("latin-1"))
        return (
            cut
            and result.committed
            and (ABOUT_AN_ADDRESS.search(result.text) or too_many) is not None
        )

    def _may_commit(self) -> bool:
        return not self._aborted and self._terms.may_commit(self.worker)

    def _health(self, server: Server, outcome: Outcome, reply: str, unwanted: bool) -> None:
        if outcome in _WHOLE_REPLY and not unwanted:
            if self._terms.servers.succeeded(server):
                log.info("server is back", server=server.name)
            return
        if outcome is Outcome.UNREACHABLE:
            log.warning(
                "connect failed", host=server.host or server.path, port=server.port, reason=reply
            )
        record_failure(self._terms.servers, server, reply, unwanted=unwanted)

    def _note(
        self, server: Server, outcome: Outcome, reply: str, sent: int, started: float
    ) -> None:
        self._tries.append((server, outcome, reply, sent, started, time.monotonic()))
        metrics.attempts(server.name, outcome).inc()
        metrics.SENT_BYTES.inc(sent)

    def _nowhere(self) -> Completion:
        """No server is left to be tried."""
        if not self._route.servers:
            return self._waiting(self._record(Outcome.UNREACHABLE, None, NO_SERVER))
        server, outcome, reply = None, Outcome.UNREACHABLE, self._terms.servers.why(self._route)
        if self._tries:  # of equal ones the last
            server, outcome, reply = max(
                reversed(self._tries), key=lambda one: _MOVES_ON.index(one[1])
            )[:3]
        if outcome not in _SAYS_LATER and not self._terms.servers.down(self._route, self._tried):
            # One is merely full, or paused. After a Z it is the backoff that is waited for all the
            # same: the server that asked for it would have the message again at once.
            return self.requeued()
        return self._waiting(
            self._record(
                outcome, server, reply, committed=False, unwanted=outcome is Outcome.REJECTED
            )
        )

    def _waiting(self, record: Completion) -> Completion:
        """Nothing is known against the mail of such a record, if no server had it: it waits for its
        route alone."""
        if record.outcome in (Outcome.UNREACHABLE, Outcome.REJECTED):
            record.waiting_for = waits_for(self.claim.route)
        return record

    def _record(
        self, outcome: Outcome, server: Server | None, reply: str = "", **how: bool
    ) -> Completion:
        state, wait, step = self._judged(outcome, **how)
        reply = reply or (self._tries[-1][2] if self._tries else "")
        return self._made(state, outcome, reply, server.name if server else None, wait, step)

    def _judged(
        self, outcome: Outcome, *, committed: bool = True, unwanted: bool = False
    ) -> tuple[State, float, int]:
        step, settings = self.claim.backoff_step, self._terms.settings
        return next_state(
            outcome, settings, step, route=self._route, committed=committed, unwanted=unwanted
        )

    def requeued(self) -> Completion:
        """Nothing was decided, and not for the mail's sake: `queued` again at once."""
        return self._made(State.QUEUED, None, "", None, 0.0, self.claim.backoff_step)

    def postponed(self) -> Completion:
        """Not for the mail's sake, and not at once: deferred for longer each time."""
        state, wait, step = self._judged(Outcome.DEFERRED)
        return self._made(state, None, "", None, wait, step)

    def broken(self) -> Completion:
        """Our own program failed."""
        outcome = Outcome.UNCERTAIN if self.committed else Outcome.INTERRUPTED
        return self._record(outcome, None, "internal error, see the log", committed=self.committed)

    def unsendable(self, why: str) -> Completion:
        """It can never be sent as it is: held, for a person to look at."""
        return self._made(State.HELD, Outcome.UNSENDABLE, why, None, 0.0, self.claim.backoff_step)

    def _no_request(self, error: ValueError) -> Completion:
        """The envelope cannot be sent. Waiting mends no address, so none of it is held: it bounces,
        and recipients that can be sent to are cut off and sent. A person has to look only where
        recipients are missing."""
        claim, carried = self.claim, [can_carry(one) for one in self.claim.recipients]
        if claim.sender and not can_carry(claim.sender):
            state, code = State.BOUNCED, "5.1.7"  # RFC 3463: bad sender's mailbox address syntax
        elif not all(carried):
            state, code = (
                State.SPLIT if any(carried) else State.BOUNCED,
                "5.1.3",
            )  # bad destination address syntax
        else:
            return self.unsendable(f"{NO_REQUEST}: {error}")
        return self._made(
            state,
            Outcome.UNSENDABLE,
            f"{NO_REQUEST} (#{code}): {error}",
            None,
            0.0,
            claim.backoff_step,
        )

    def _made(
        self,
        state: State,
        outcome: Outcome | None,
        reply: str,
        server: str | None,
        wait: float,
        step: int,
    ) -> Completion:
        claim, now = self.claim, time.monotonic()
        tries = [
            Attempt(attempt_index, one.name, outcome_, words, sent, now - began, now - ended)
            for attempt_index, (one, outcome_, words, sent, began, ended) in enumerate(
                self._tries, 1
            )
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
            wait,
            step,
            tries,
        )
