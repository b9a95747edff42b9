"""Why a delivery is where it is: one sentence, from what the tables, the settings and the clock say.

It answers what people ask before anything else: is it being sent, if not why not, and when will it be. The broker is
never the reason: it carries hints, and workers find the mail without them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from commands.tables import Row, ago, span, stamp
from relay.queue import Queue
from relay.routes import Routes
from relay.schema import Outcome, State
from relay.settings import SettingsError, WorkerSettings, load


@dataclass(frozen=True, slots=True)
class Facts:
    """What else there is to know: living workers, pauses by subject, servers by route, notices."""

    workers: Sequence[Row]
    pauses: Mapping[str, Row]
    servers: Mapping[str, Sequence[str]]
    tried: bool  # whether any server was, in the last hour
    notices: Sequence[Row]
    far: float  # seconds between a claim and the time when it is given up


def gather(queue: Queue, message_id: str) -> Facts:
    """Look at everything that a reason may be found in."""
    settings = load(WorkerSettings)
    servers: dict[str, tuple[str, ...]]
    try:
        servers = {route.name: tuple(server.name for server in route.servers) for route in Routes.load(settings).all()}
    except SettingsError:
        servers = {}  # `check` tells of it
    far = 2 * settings.session_timeout + 2 * settings.lease
    pauses = {row["subject"]: row for row in queue.pauses()}
    return Facts(
        queue.workers(),
        pauses,
        servers,
        any(row["attempts"] for row in queue.servers()),
        queue.notices(message_id),
        far,
    )


def sentences(message: dict[str, Any], facts: Facts) -> Iterator[tuple[Row, str]]:
    """For each delivery that was not split: (its row, why it is where it is)."""
    rows = [row for row in message["deliveries"] if row["state"] != State.SPLIT]
    for row in rows:
        people = [r["address"] for r in message["recipients"] if r["delivery"] == row["number"]]
        whom = people[0] if people else "nobody"
        more = f" and {len(people) - 1} more" if len(people) > 1 else ""
        words = _REASONS[State(row["state"])](row, message, facts)
        yield row, f"{whom}{more}: {words}."


def _queued(row: Row, _message: Row, facts: Facts) -> str:
    if reasons := _hindrances(row, facts):
        return f"queued, and not sent because {reasons}"
    late = (datetime.now(UTC) - row["due_at"]).total_seconds()
    if late <= 0:
        return f"queued: a worker takes it when it is hinted at, and without a hint in {span(-late)}"
    paused = [subject for subject in facts.pauses if subject.startswith("server:")]
    rest = f"rest or are paused ({', '.join(paused)})" if paused else "rest"
    busy = f"no worker has a free connection for route {row['route']}, or its servers {rest}"
    return f"queued, and overdue for {span(late)}: {busy}"


def _sending(row: Row, _message: Row, facts: Facts) -> str:
    worker = next((w for w in facts.workers if w["id"] == row["worker"]), None)
    who = f"{row['worker'][-12:]} ({worker['host']} {worker['pid']})" if worker else row["worker"][-12:]
    since = row["due_at"] - timedelta(seconds=facts.far)
    words = f"being sent by worker {who}"
    if since <= datetime.now(UTC):
        words += f" since {stamp(since)} ({ago(since)})"
    if worker is None or not worker["alive"]:
        words += ", which does not renew its lease: another one will declare it dead and call this try uncertain"
    if row["wanted"]:
        words += f"; unless it is accepted, then comes what an operator wants: {row['wanted']}"
    return words


def _deferred(row: Row, _message: Row, facts: Facts) -> str:
    when = row["due_at"]
    words = f"deferred until {stamp(when)} ({ago(when)})"
    if when <= datetime.now(UTC):
        words = f"deferred, and due for {ago(when)}"
    words += f", because {_last(row)} (try {row['claims']}); a failure after {stamp(row['expires_at'])} is the last"
    reasons = _hindrances(row, facts)
    return words + (f"; and now {reasons}" if reasons else "")


def _held(row: Row, _message: Row, _facts: Facts) -> str:
    reply, outcome = row["last_reply"] or "", row["last_outcome"]
    if reply.startswith("held by "):
        cause = reply
    elif outcome == Outcome.UNSENDABLE:
        cause = f"held because it cannot be sent: {reply}; put the file back and release it, or drop it"
    elif row["vanished"] > 1:
        cause = f"held because {row['vanished']} workers in a row were lost over it"
    elif outcome in (Outcome.UNCERTAIN, Outcome.MALFORMED):
        cause = f"held because {_last(row)}"
    else:
        cause = "held, and nothing says by whom" + (f"; before that {_last(row)}" if outcome else "")
    return f"{cause}. It stays until it is released, bounced or dropped"


def _delivered(row: Row, _message: Row, _facts: Facts) -> str:
    tries = f"try {row['claims']}"
    return f"delivered {ago(row['finished_at'])} ago to {row['last_server']} ({tries}): {row['last_reply']}"


def _failed(row: Row, message: Row, facts: Facts) -> str:
    words = f"{row['state']} {ago(row['finished_at'])} ago, because {_last(row)}"
    if row["due_at"] is not None:
        makes = "a worker makes it" if _living(facts) else "no worker is alive to make it"
        return f"{words}; a notice to the sender is owed since {ago(row['due_at'])}, and {makes}"
    told = [notice["queue_id"] for notice in facts.notices]
    if told:
        return f"{words}; the sender was told by {', '.join(told)}"
    return words + "; nobody is told" + (", it has the null sender" if not message["sender"] else "")


def _dropped(row: Row, _message: Row, _facts: Facts) -> str:
    reply = row["last_reply"] or ""
    words = reply if reply.startswith("dropped by ") else "dropped by an operator while it was being sent"
    return f"{words}, {ago(row['finished_at'])} ago; nobody is told"


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


def _last(row: Row) -> str:
    """What the last try came to."""
    server, reply = row["last_server"] or "a server", row["last_reply"] or "no words"
    if reply.startswith("bounced by "):
        return reply
    told = {
        Outcome.DEFERRED: f"{server} deferred it: {reply}",
        Outcome.REJECTED: f"{server} refused it: {reply}",
        Outcome.UNREACHABLE: f"no server took a connection: {reply}",
        Outcome.INTERRUPTED: f"the transfer to {server} broke off: {reply}",
        Outcome.UNCERTAIN: f"nobody knows whether {server} has it: {reply}",
        Outcome.MALFORMED: f"nobody knows whether {server} has it, its reply is none: {reply}",
    }
    return told.get(row["last_outcome"], reply)


def _living(facts: Facts) -> bool:
    return any(worker["alive"] for worker in facts.workers)


def _hindrances(row: Row, facts: Facts) -> str:
    """What keeps mail of that route from being sent, whatever its time; empty when nothing does."""
    route, found = row["route"], list[str]()
    if pause := facts.pauses.get(f"route:{route}"):
        reason = f" ({pause['reason']})" if pause["reason"] else ""
        found.append(f"{pause['actor']} paused route {route} {ago(pause['since_at'])} ago{reason}")
    servers = facts.servers.get(route, ())
    if route in facts.servers and not servers and not facts.tried:  # the workers' settings may say more than ours
        found.append(f"no QMQP server is configured for route {route} (RELAY_QMQP_SERVERS)")
    if servers and all(f"server:{server}" in facts.pauses for server in servers):
        found.append(f"every server of route {route} is paused")
    if not _living(facts):
        found.append("no worker is alive")
    return " and ".join(found)
