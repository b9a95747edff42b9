"""Why a delivery is in its state: one sentence, made from the tables and the clock.

`why` answers what people ask first: is the mail being sent, if not why not, and when will it be
sent. The broker is never the reason: it carries hints, and workers find mail without them. Workers
publish their routes, their open circuits and how long a claim lasts. The settings of the process
that asks may differ, so they count only while no worker is alive.

What must stay true: the sentence names one cause, and a table holds that cause.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from commands.output import ago, counted, span, stamp
from relay.dsn.message import Enclosure, Withheld
from relay.queue.outcome import Outcome
from relay.queue.split import can_carry
from relay.queue.states import UNFINISHED, ReasonSource, State
from relay.report.queries import QueueReader
from relay.report.records import DeliveryRow, DsnRow, MessageRow, PauseRow, WorkerRow
from relay.routes import Routes
from relay.settings import Settings, SettingsError


@dataclass(frozen=True, slots=True)
class Facts:
    """What a reason may depend on beside the delivery.

    `workers` are by id; `living` are those whose lease has not expired. `pauses` are keyed by
    subject (`route:NAME`, `server:NAME`). `routes` are the servers of each route, as all living
    workers together know them. `open_circuits` says for a server which workers do not try it now,
    and why. `dsns` are the DSNs about the message.
    """

    message: MessageRow
    workers: Mapping[str, WorkerRow]
    living: Sequence[WorkerRow]
    pauses: Mapping[str, PauseRow]
    routes: Mapping[str, Sequence[str]]
    open_circuits: Mapping[str, Mapping[str, str]]
    dsns: Sequence[DsnRow]
    sends_dsns: bool


def gather(queue: QueueReader, message: MessageRow, settings: Settings) -> Facts:
    """Read everything that a reason may depend on."""
    workers = queue.workers()
    living = [worker for worker in workers if worker.alive]
    open_circuits: dict[str, dict[str, str]] = {}
    for row in queue.read("open_circuits"):
        open_circuits.setdefault(row["server"], {})[row["worker"]] = row["why"]
    return Facts(
        message,
        {worker.id: worker for worker in workers},
        living,
        {pause.subject: pause for pause in queue.pauses()},
        _routes(living, settings),
        open_circuits,
        queue.dsns(message.queue_id),
        settings.bounces == "dsn",
    )


def _routes(living: Sequence[WorkerRow], settings: Settings) -> Mapping[str, Sequence[str]]:
    """The servers of each route, in order: those of the living workers, or of our settings while no
    worker is alive."""
    if not living:
        try:
            return Routes.load(settings).servers()
        except SettingsError:
            return {}  # `check` reports it
    routes: dict[str, dict[str, None]] = {}  # a dict without values is a set in order
    for worker in living:
        for name, servers in (worker.routes or {}).items():
            routes.setdefault(name, {}).update(dict.fromkeys(servers))
    return {name: list(servers) for name, servers in routes.items()}


def sentences(facts: Facts) -> Iterator[tuple[DeliveryRow, str]]:
    """For each delivery that was not split: (its row, why it is in its state)."""
    dsn = f"; it is a DSN about {about(facts.message)}" if facts.message.dsn_of else ""
    for row in facts.message.deliveries:
        if row.state != State.SPLIT:
            first, *others = _addresses(row, facts) or ["no recipient"]
            more = f" and {len(others)} more" if others else ""
            yield row, f"{first}{more}: {_reason(row, facts)}{dsn}."


def _addresses(row: DeliveryRow, facts: Facts) -> list[str]:
    return [to.address for to in facts.message.recipients if to.delivery == row.number]


def about(message: MessageRow) -> str:
    """The message that a DSN is about, and how much of it the DSN encloses."""
    content = message.dsn_content
    return f"{message.dsn_of}" + (f" and encloses {_ENCLOSED[content]}" if content else "")


def _reason(row: DeliveryRow, facts: Facts) -> str:
    match row.state:
        case State.QUEUED:
            return _queued(row, facts)
        case State.SENDING:
            return _sending(row, facts)
        case State.DEFERRED:
            return _deferred(row, facts)
        case State.HELD:
            cause = _held(row, facts)
            return f"{cause}. It stays until an operator releases, bounces or drops it"
        case State.DELIVERED:
            to = f"{row.last_server} (try {row.claim_count})"
            return f"delivered {ago(row.finished_at)} ago to {to}: {row.last_reply}"
        case State.DROPPED:
            cause = row.last_reply or "dropped by an operator"
            return f"{cause}, {ago(row.finished_at)} ago; no DSN is sent"
    when = f"{row.state} {ago(row.finished_at)} ago"
    return f"{when}, because {_last(row)}; {_sender_is_told(row, facts)}"


def _queued(row: DeliveryRow, facts: Facts) -> str:
    if cause := _obstacle(row.route, facts):
        return f"queued, and not sent because {cause}"
    late = _seconds_since(row.due_at)
    if late <= 0:
        return f"queued: a worker claims it when a hint arrives, or in {span(-late)} without one"
    sending = sum(worker.sending for worker in facts.living)
    alive = len(facts.living)
    workers = "1 worker is" if alive == 1 else f"{alive} workers are"
    cause = f"{workers} alive and reported no reason; read the workers' logs"
    if sending:
        cause = f"{workers} busy with {counted(sending)}, and mail that waits longer is sent first"
    return f"queued, and overdue for {span(late)}: {cause}"


def _seconds_since(when: datetime | None) -> float:
    return (datetime.now(UTC) - when).total_seconds() if when else 0.0


def _sending(row: DeliveryRow, facts: Facts) -> str:
    text = f"being sent by worker {(row.worker or '')[-12:]}"
    worker = facts.workers.get(row.worker or "")
    if worker:
        text += f" ({worker.host} {worker.pid})"
    if worker and worker.claim_seconds and row.due_at:
        since = row.due_at - timedelta(seconds=worker.claim_seconds)
        text += f" since {stamp(since)} ({ago(min(since, datetime.now(UTC)))})"
    if worker is None or not worker.alive:
        text += (
            "; this worker does not renew its lease, so another worker will record the attempt as"
            " uncertain"
        )
    if row.pending_operation:
        text += f"; {row.pending_operation} follows unless the server accepts it"
    return text


def _deferred(row: DeliveryRow, facts: Facts) -> str:
    text = f"deferred until {stamp(row.due_at)} ({ago(row.due_at)})"
    if _seconds_since(row.due_at) >= 0:
        text = f"deferred, and overdue for {ago(row.due_at)}"
        if _is_paused(row.route, facts):
            text = f"deferred, due {ago(row.due_at)} ago"
    text += f", because {_last(row)} (try {row.claim_count})"
    if cause := _obstacle(row.route, facts):
        text += f"; now {cause}"
    report = "without a DSN"
    if facts.message.sender and facts.sends_dsns:
        report = "and the sender is told"
    return f"{text}. If it still fails after {stamp(row.expires_at)} it expires, {report}"


def _held(row: DeliveryRow, facts: Facts) -> str:
    if row.reason_source == ReasonSource.OPERATOR:
        return row.last_reply or ""
    if row.last_outcome == Outcome.UNSENDABLE:
        advice = "put the file back and release it, or drop it"
        if not all(map(can_carry, [*_addresses(row, facts), facts.message.sender])):
            advice = "release it: recipients that can be sent are sent, the others bounce"
        return f"held because it cannot be sent: {row.last_reply or ''}; {advice}"
    if row.crash_count > 1:
        return f"held because {row.crash_count} workers in a row ended while they were sending it"
    if row.last_outcome in (Outcome.UNCERTAIN, Outcome.MALFORMED):
        return f"held because {_last(row)}"
    before = f"; before, {_last(row)}" if row.last_outcome else ""
    return f"held, and no reason is recorded{before}"


def _sender_is_told(row: DeliveryRow, facts: Facts) -> str:
    """What the sender learns of a failed delivery. `due_at` is set while its DSN is pending."""
    message = facts.message
    if row.due_at is not None:
        if message.dsn_content:
            return "a worker replaces it with a smaller DSN, or gives up"
        generated = "a worker generates it" if facts.living else "no worker is alive to generate it"
        return f"its DSN has been pending for {ago(row.due_at)}, and {generated}"
    if row.dsn_withheld:
        return f"the sender is not told: {_WITHHELD[row.dsn_withheld]}"
    if facts.dsns:
        return "; ".join(map(_dsn, facts.dsns))
    if message.dsn_content:
        return _after(row, message.dsn_content)
    return "no DSN is sent" + ("" if message.sender else ", because the sender is null")


def _dsn(dsn: DsnRow) -> str:
    """What became of a DSN."""
    if dsn.state == State.DELIVERED:
        return f"the sender was told by {dsn.queue_id}"
    if dsn.state in UNFINISHED:
        return f"the sender is told by {dsn.queue_id}, which is {dsn.state}"
    text = f"DSN {dsn.queue_id} is {dsn.state}, because {_last(dsn)}"
    if dsn.state == State.DROPPED or dsn.due_at is not None:
        return text
    return f"{text}, and {_after(dsn, dsn.dsn_content)}"


def _after(dsn: DeliveryRow | DsnRow, content: str | None) -> str:
    """What followed when a DSN had failed (relay/dsn/generator.py)."""
    rejected = dsn.state == State.BOUNCED and dsn.last_outcome == Outcome.REJECTED
    reducible = content in (Enclosure.FULL, Enclosure.HEADER)
    if rejected and reducible and dsn.reason_source == ReasonSource.SERVER:
        return "a smaller DSN replaced it"
    return "no other DSN replaces it: the sender of the original is not told by it"


_ENCLOSED: dict[str, str] = {
    Enclosure.FULL: "the whole message",
    Enclosure.HEADER: "its header",
    Enclosure.NONE: "nothing of it",
}
_WITHHELD: dict[str, str] = {
    Withheld.RATE: "less than a minute before, a DSN about mail from an untrusted client was sent"
    " to this address",
    Withheld.POSTMASTER: "the mail came from an untrusted client and was for our own postmaster",
    Withheld.ADDRESS: "no mail server accepts its address",
}
_OUTCOMES: dict[str | None, str] = {
    Outcome.DEFERRED: "{server} deferred it: {reply}",
    Outcome.REJECTED: "{server} rejected it: {reply}",
    Outcome.INTERRUPTED: "the transfer to {server} broke off: {reply}",
    Outcome.UNCERTAIN: "it is unknown whether {server} accepted it: {reply}",
    Outcome.MALFORMED: "it is unknown whether {server} accepted it, its reply is invalid: {reply}",
}


def _last(row: DeliveryRow | DsnRow) -> str:
    """What the last attempt came to."""
    reply = row.last_reply or "no reply"
    if row.reason_source == ReasonSource.OPERATOR:
        return reply
    text = _OUTCOMES.get(row.last_outcome, "{reply}")
    return text.format(server=row.last_server or "a server", reply=reply)


def _obstacle(route: str, facts: Facts) -> str:
    """What keeps mail of that route from being sent now; empty when it can be sent."""
    if paused := _pause(f"route:{route}", facts):
        return paused
    causes = [_obstacle_at(server, facts) for server in facts.routes.get(route, ())]
    cause = " and ".join(causes) if all(causes) else ""
    if route not in facts.routes:
        cause = (
            f"no worker has route {route}; `retry --reroute` moves the mail to its route of today"
        )
    elif not causes:
        cause = f"no QMQP server is configured for route {route} (RELAY_QMQP_SERVERS)"
    if not facts.living:
        return "no worker is alive" + (f", and {cause}" if cause else "")
    # Workers that have just started have not published their routes.
    return cause if any(worker.routes for worker in facts.living) else ""


def _obstacle_at(server: str, facts: Facts) -> str:
    """Why a server is not tried now; empty when a worker would try it."""
    if paused := _pause(f"server:{server}", facts):
        return paused
    reasons = facts.open_circuits.get(server, {})
    knowing = {
        worker.id
        for worker in facts.living
        if any(server in servers for servers in (worker.routes or {}).values())
    }
    if not reasons or knowing - reasons.keys():
        return ""
    reason = max(reasons.values())
    return f"the circuit of server {server} is open: it is tried again within a minute ({reason})"


def _is_paused(route: str, facts: Facts) -> bool:
    """Whether a pause alone keeps mail of that route."""
    servers = [f"server:{server}" in facts.pauses for server in facts.routes.get(route, ())]
    return f"route:{route}" in facts.pauses or (bool(servers) and all(servers))


def _pause(subject: str, facts: Facts) -> str:
    """Who paused a route or a server, and why; empty when it is not paused."""
    if not (pause := facts.pauses.get(subject)):
        return ""
    reason = f": {pause.reason}" if pause.reason else ""
    by = f"(by {pause.actor} {ago(pause.since_at)} ago{reason})"
    return f"{subject.replace(':', ' ', 1)} is paused until `resume` {by}"
