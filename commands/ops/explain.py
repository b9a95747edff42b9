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
from typing import Any

from commands.output import Row, ago, counted, span, stamp
from relay.dsn.message import Enclosure, Withheld
from relay.queue.outcome import Outcome
from relay.queue.split import can_carry
from relay.queue.states import UNFINISHED, ReasonSource, State
from relay.report.queries import QueueReader
from relay.routes import Routes
from relay.settings import Settings, SettingsError


@dataclass(frozen=True, slots=True)
class Facts:
    """What a reason may depend on beside the rows of the message.

    `pauses` are keyed by subject (`route:NAME`, `server:NAME`). `routes` are the servers of each
    route, as all living workers together know them. `open_circuits` says for a server which workers
    do not try it now, and why. `dsns` are the DSNs about the message.
    """

    workers: Sequence[Row]
    pauses: Mapping[str, Row]
    routes: Mapping[str, Sequence[str]]
    open_circuits: Mapping[str, Mapping[str, str]]
    dsns: Sequence[Row]
    sends_dsns: bool

    @property
    def living(self) -> list[Row]:
        return [worker for worker in self.workers if worker["alive"]]


def gather(queue: QueueReader, queue_id: str, settings: Settings) -> Facts:
    """Read everything that a reason may depend on."""
    workers = queue.workers()
    open_circuits: dict[str, dict[str, str]] = {}
    for row in queue.open_circuits():
        open_circuits.setdefault(row["server"], {})[row["worker"]] = row["why"]
    return Facts(
        workers,
        {row["subject"]: row for row in queue.pauses()},
        _routes(workers, settings),
        open_circuits,
        queue.dsns(queue_id),
        settings.bounces == "dsn",
    )


def _routes(workers: Sequence[Row], settings: Settings) -> Mapping[str, Sequence[str]]:
    """The servers of each route, in order: those of the living workers, or of our settings while no
    worker is alive."""
    living = [worker for worker in workers if worker["alive"]]
    if not living:
        try:
            return Routes.load(settings).servers()
        except SettingsError:
            return {}  # `check` reports it
    routes: dict[str, dict[str, None]] = {}  # a dict without values is a set in order
    for worker in living:
        for name, servers in (worker["routes"] or {}).items():
            routes.setdefault(name, {}).update(dict.fromkeys(servers))
    return {name: list(servers) for name, servers in routes.items()}


def sentences(message: dict[str, Any], facts: Facts) -> Iterator[tuple[Row, str]]:
    """For each delivery that was not split: (its row, why it is in its state)."""
    for row in message["deliveries"]:
        if row["state"] == State.SPLIT:
            continue
        to = [r["address"] for r in message["recipients"] if r["delivery"] == row["number"]]
        recipients = to[0] if to else "no recipient"
        if len(to) > 1:
            recipients += f" and {len(to) - 1} more"
        reason = _REASONS[State(row["state"])](row, message, facts)
        dsn = f"; it is a DSN about {about(message)}" if message["dsn_of"] else ""
        yield row, f"{recipients}: {reason}{dsn}."


def about(message: Row) -> str:
    """The message that a DSN is about, and how much of it the DSN encloses."""
    content = message["dsn_content"]
    return str(message["dsn_of"]) + (f" and encloses {_ENCLOSED[content]}" if content else "")


def _queued(row: Row, _message: Row, facts: Facts) -> str:
    if cause := _obstacle(row["route"], facts):
        return f"queued, and not sent because {cause}"
    late = (datetime.now(UTC) - row["due_at"]).total_seconds()
    if late <= 0:
        return f"queued: a worker claims it when a hint arrives, or in {span(-late)} without one"
    sending = sum(worker["sending"] for worker in facts.living)
    alive = len(facts.living)
    workers = "1 worker is" if alive == 1 else f"{alive} workers are"
    cause = f"{workers} alive and reported no reason; read the workers' logs"
    if sending:
        cause = f"{workers} busy with {counted(sending)}, and mail that waits longer is sent first"
    return f"queued, and overdue for {span(late)}: {cause}"


def _sending(row: Row, _message: Row, facts: Facts) -> str:
    text = f"being sent by worker {row['worker'][-12:]}"
    worker = next((w for w in facts.workers if w["id"] == row["worker"]), None)
    if worker:
        text += f" ({worker['host']} {worker['pid']})"
    if worker and worker["claim_seconds"]:
        since = row["due_at"] - timedelta(seconds=worker["claim_seconds"])
        text += f" since {stamp(since)} ({ago(min(since, datetime.now(UTC)))})"
    if worker is None or not worker["alive"]:
        text += (
            "; this worker does not renew its lease, so another worker will record the attempt as"
            " uncertain"
        )
    if row["pending_operation"]:
        text += f"; {row['pending_operation']} follows unless the server accepts it"
    return text


def _deferred(row: Row, message: Row, facts: Facts) -> str:
    due = row["due_at"]
    text = f"deferred until {stamp(due)} ({ago(due)})"
    if due <= datetime.now(UTC):
        text = f"deferred, and due for {ago(due)}"
    text += f", because {_last(row)} (try {row['claim_count']})"
    if cause := _obstacle(row["route"], facts):
        text += f"; now {cause}"
    told = "and the sender is told" if message["sender"] and facts.sends_dsns else "without a DSN"
    return f"{text}. If it still fails after {stamp(row['expires_at'])} it expires, {told}"


def _held(row: Row, message: Row, _facts: Facts) -> str:
    reply, outcome = row["last_reply"] or "", row["last_outcome"]
    if row["reason_source"] == ReasonSource.OPERATOR:
        cause = reply
    elif outcome == Outcome.UNSENDABLE:
        mine = [r["address"] for r in message["recipients"] if r["delivery"] == row["number"]]
        advice = "put the file back and release it, or drop it"
        if not all(map(can_carry, [*mine, message["sender"]])):
            advice = "release it: what can be sent is sent, and the rest bounces"
        cause = f"held because it cannot be sent: {reply}; {advice}"
    elif row["crash_count"] > 1:
        cause = (
            f"held because {row['crash_count']} workers in a row ended while they were sending it"
        )
    elif outcome in (Outcome.UNCERTAIN, Outcome.MALFORMED):
        cause = f"held because {_last(row)}"
    else:
        cause = "held, and no reason is recorded" + (f"; before, {_last(row)}" if outcome else "")
    return f"{cause}. It stays until an operator releases, bounces or drops it"


def _delivered(row: Row, _message: Row, _facts: Facts) -> str:
    to = f"{row['last_server']} (try {row['claim_count']})"
    return f"delivered {ago(row['finished_at'])} ago to {to}: {row['last_reply']}"


def _failed(row: Row, message: Row, facts: Facts) -> str:
    told = _sender_is_told(row, message, facts)
    return f"{row['state']} {ago(row['finished_at'])} ago, because {_last(row)}; {told}"


def _sender_is_told(row: Row, message: Row, facts: Facts) -> str:
    """What the sender learns of a failed delivery. `due_at` is set while its DSN is pending."""
    if row["due_at"] is not None:
        if message["dsn_content"]:
            return "a worker replaces it with a DSN that encloses less, or gives up"
        generated = "a worker generates it" if facts.living else "no worker is alive to generate it"
        return f"its DSN has been pending for {ago(row['due_at'])}, and {generated}"
    if row["dsn_withheld"]:
        return f"the sender is not told: {_WITHHELD[row['dsn_withheld']]}"
    if facts.dsns:
        return "; ".join(map(_dsn, facts.dsns))
    if message["dsn_content"]:
        return _after(row, message["dsn_content"])
    return "no DSN is sent" + ("" if message["sender"] else ", because the sender is null")


def _dsn(dsn: Row) -> str:
    """What became of a DSN."""
    queue_id, state = dsn["queue_id"], dsn["state"]
    if state == State.DELIVERED:
        return f"the sender was told by {queue_id}"
    if state in UNFINISHED:
        return f"the sender is told by {queue_id}, which is {state}"
    text = f"DSN {queue_id} is {state}, because {_last(dsn)}"
    if state == State.DROPPED or dsn["due_at"] is not None:
        return text
    return f"{text}, and {_after(dsn, dsn['dsn_content'])}"


def _after(dsn: Row, content: str | None) -> str:
    """What followed when a DSN had failed (relay/dsn/generator.py)."""
    refused = dsn["state"] == State.BOUNCED and dsn["last_outcome"] == Outcome.REJECTED
    reducible = content in (Enclosure.FULL, Enclosure.HEADER)
    if refused and reducible and dsn["reason_source"] == ReasonSource.SERVER:
        return "a DSN that encloses less replaced it"
    return "no other DSN replaces it: the sender of the original is not told by it"


_ENCLOSED = {
    Enclosure.FULL: "the whole message",
    Enclosure.HEADER: "its header",
    Enclosure.NONE: "nothing of it",
}
_WITHHELD = {
    Withheld.RATE: "less than a minute before, a DSN about mail from an untrusted client was sent"
    " to this address",
    Withheld.POSTMASTER: "the mail came from an untrusted client and was for our own postmaster",
    Withheld.ADDRESS: "no mail server accepts its address",
}


def _dropped(row: Row, _message: Row, _facts: Facts) -> str:
    reply = row["last_reply"] or "dropped by an operator"
    return f"{reply}, {ago(row['finished_at'])} ago; no DSN is sent"


_REASONS = {
    State.QUEUED: _queued,
    State.SENDING: _sending,
    State.DEFERRED: _deferred,
    State.HELD: _held,
    State.DELIVERED: _delivered,
    State.BOUNCED: _failed,
    State.EXPIRED: _failed,
    State.DROPPED: _dropped,
}
_OUTCOMES = {
    Outcome.DEFERRED: "{server} deferred it: {reply}",
    Outcome.REJECTED: "{server} refused it: {reply}",
    Outcome.INTERRUPTED: "the transfer to {server} broke off: {reply}",
    Outcome.UNCERTAIN: "it is unknown whether {server} accepted it: {reply}",
    Outcome.MALFORMED: "it is unknown whether {server} accepted it, its reply is invalid: {reply}",
}


def _last(row: Row) -> str:
    """What the last attempt came to."""
    server, reply = row["last_server"] or "a server", row["last_reply"] or "no reply"
    if row["reason_source"] == ReasonSource.OPERATOR:
        return reply
    if row["last_outcome"] == Outcome.UNREACHABLE and reply.startswith("no connection: "):
        return f"no server accepted a connection: {reply.removeprefix('no connection: ')}"
    return _OUTCOMES.get(row["last_outcome"], "{reply}").format(server=server, reply=reply)


def _obstacle(route: str, facts: Facts) -> str:
    """What keeps mail of that route from being sent now; empty when it can be sent."""
    if pause := facts.pauses.get(f"route:{route}"):
        return f"route {route} is paused until `resume` {_paused_by(pause)}"
    if not facts.living:
        servers = _obstacle_at_servers(route, facts)
        return "no worker is alive" + (f", and {servers}" if servers else "")
    if not any(worker["routes"] for worker in facts.living):
        return ""  # the workers have just started, and have not published their routes
    return _obstacle_at_servers(route, facts)


def _obstacle_at_servers(route: str, facts: Facts) -> str:
    """Why no server of a route can be tried now; empty when one can."""
    if route not in facts.routes:
        return f"no worker knows a route {route}: `retry --reroute` gives the mail another"
    if not facts.routes[route]:
        return f"no QMQP server is configured for route {route} (RELAY_QMQP_SERVERS)"
    causes = [_obstacle_at(server, facts) for server in facts.routes[route]]
    return " and ".join(causes) if all(causes) else ""


def _obstacle_at(server: str, facts: Facts) -> str:
    """Why a server is not tried now; empty when a worker would try it."""
    if pause := facts.pauses.get(f"server:{server}"):
        return f"server {server} is paused until `resume` {_paused_by(pause)}"
    reasons = facts.open_circuits.get(server, {})
    knowing = [
        worker["id"]
        for worker in facts.living
        if any(server in servers for servers in (worker["routes"] or {}).values())
    ]
    if not reasons or any(worker not in reasons for worker in knowing):
        return ""
    reason = max(reasons.values())
    return f"the circuit to server {server} is open: it is tried again within a minute ({reason})"


def _paused_by(pause: Row) -> str:
    reason = f": {pause['reason']}" if pause["reason"] else ""
    return f"(by {pause['actor']} {ago(pause['since_at'])} ago{reason})"
