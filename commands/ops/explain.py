"""Why a delivery is where it is: one sentence, from what the tables and the clock say.

It answers what people ask before anything else: is it being sent, if not why not, and when will it
be. The broker is never the reason: it carries hints, and workers find the mail without them. Which
servers a route has, which of them rest, and how long a claim is for, workers have written down; the
settings of who asks may be others, and count only while no worker is alive. What must stay true:
one cause is told, and it is one that a table holds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from commands.output import Row, ago, span, stamp
from relay.dsn.message import Enclosure, Withheld
from relay.queue.split import can_carry
from relay.queue.states import UNFINISHED, Outcome, ReasonSource, State
from relay.report.queries import QueueReader
from relay.routes import NO_SERVER, Routes
from relay.settings import Settings, SettingsError


@dataclass(frozen=True, slots=True)
class Facts:
    """What else there is to know.

    `routes` are the servers of each route, as all living workers together know them; `rests` says
    of a server by which workers it is left alone, and why.
    """

    workers: Sequence[Row]
    pauses: Mapping[str, Row]
    routes: Mapping[str, Sequence[str]]
    rests: Mapping[str, Mapping[str, str]]
    notices: Sequence[Row]

    @property
    def living(self) -> list[Row]:
        return [worker for worker in self.workers if worker["alive"]]


def gather(queue: QueueReader, queue_id: str, settings: Settings) -> Facts:
    """Look at everything that a reason may be found in."""
    workers = queue.workers()
    rests: dict[str, dict[str, str]] = {}
    for row in queue.rests():
        rests.setdefault(row["server"], {})[row["worker"]] = row["why"]
    return Facts(
        workers,
        {row["subject"]: row for row in queue.pauses()},
        _routes(workers, settings),
        rests,
        queue.notices(queue_id),
    )


def _routes(workers: Sequence[Row], settings: Settings) -> Mapping[str, Sequence[str]]:
    """The servers of each route as the living workers know them, in order; as our settings do where
    none is alive."""
    living = [worker for worker in workers if worker["alive"]]
    routes: dict[str, list[str]] = {}
    for worker in living:
        for name, servers in (worker["routes"] or {}).items():
            known = routes.setdefault(name, [])
            known += [server for server in servers if server not in known]
    if living:
        return routes
    try:
        return Routes.load(settings).servers()
    except SettingsError:
        return {}  # `check` tells of it


def sentences(message: dict[str, Any], facts: Facts) -> Iterator[tuple[Row, str]]:
    """For each delivery that was not split: (its row, why it is where it is)."""
    rows = [row for row in message["deliveries"] if row["state"] != State.SPLIT]
    for row in rows:
        people = [r["address"] for r in message["recipients"] if r["delivery"] == row["number"]]
        whom = people[0] if people else "nobody"
        more = f" and {len(people) - 1} more" if len(people) > 1 else ""
        words = _REASONS[State(row["state"])](row, message, facts)
        notice = f"; it is a notice about {about(message)}" if message["dsn_of"] else ""
        yield row, f"{whom}{more}: {words}{notice}."


def about(message: Row) -> str:
    """Which message a notice is about, and what it encloses of it."""
    content = message["dsn_content"]
    return str(message["dsn_of"]) + (f" and encloses {_ENCLOSED[content]}" if content else "")


def _queued(row: Row, _message: Row, facts: Facts) -> str:
    if cause := _hindrance(row["route"], facts):
        return f"queued, and not sent because {cause}"
    late = (datetime.now(UTC) - row["due_at"]).total_seconds()
    if late <= 0:
        return (
            f"queued: a worker takes it when it is hinted at, and without a hint in {span(-late)}"
        )
    sending, count = sum(worker["sending"] for worker in facts.living), len(facts.living)
    workers = "1 worker is" if count == 1 else f"{count} workers are"
    if sending:
        others = f"{sending} other{'s' * (sending > 1)}"
        cause = f"its turn has not come: {workers} busy with {others}, and what is due longest comes first"
    else:
        cause = (
            f"{workers} alive and nothing hinders them that they have told of: look at their logs"
        )
    return f"queued, and overdue for {span(late)}: {cause}"


def _sending(row: Row, _message: Row, facts: Facts) -> str:
    worker = next((w for w in facts.workers if w["id"] == row["worker"]), None)
    who = (
        f"{row['worker'][-12:]} ({worker['host']} {worker['pid']})"
        if worker
        else row["worker"][-12:]
    )
    words = f"being sent by worker {who}"
    if worker and worker["claim_seconds"]:
        since = row["due_at"] - timedelta(seconds=worker["claim_seconds"])
        words += f" since {stamp(since)} ({ago(min(since, datetime.now(UTC)))})"
    if worker is None or not worker["alive"]:
        words += ", which does not renew its lease: another one will declare it dead and call this try uncertain"
    if row["pending_operation"]:
        words += f"; unless it is accepted, then comes what an operator wants: {row['pending_operation']}"
    return words


def _deferred(row: Row, _message: Row, facts: Facts) -> str:
    when = row["due_at"]
    words = f"deferred until {stamp(when)} ({ago(when)})"
    if when <= datetime.now(UTC):
        words = f"deferred, and due for {ago(when)}"
    words += f", because {_last(row)} (try {row['claim_count']}); a failure after {stamp(row['expires_at'])} is the last"
    cause = _hindrance(row["route"], facts)
    return words + (f"; and now {cause}" if cause else "")


def _held(row: Row, message: Row, _facts: Facts) -> str:
    reply, outcome = row["last_reply"] or "", row["last_outcome"]
    if row["reason_source"] == ReasonSource.OPERATOR:
        cause = reply
    elif outcome == Outcome.UNSENDABLE:
        mine = [r["address"] for r in message["recipients"] if r["delivery"] == row["number"]]
        advice = (
            "put the file back and release it, or drop it"
            if all(map(can_carry, [*mine, message["sender"]]))
            else "release it: what can be sent is sent, and the rest bounces"
        )
        cause = f"held because it cannot be sent: {reply}; {advice}"
    elif row["crash_count"] > 1:
        cause = f"held because {row['crash_count']} workers in a row were lost over it"
    elif outcome in (Outcome.UNCERTAIN, Outcome.MALFORMED):
        cause = f"held because {_last(row)}"
    else:
        cause = "held, and nothing says by whom" + (
            f"; before that {_last(row)}" if outcome else ""
        )
    return f"{cause}. It stays until it is released, bounced or dropped"


def _delivered(row: Row, _message: Row, _facts: Facts) -> str:
    tries = f"try {row['claim_count']}"
    return f"delivered {ago(row['finished_at'])} ago to {row['last_server']} ({tries}): {row['last_reply']}"


def _failed(row: Row, message: Row, facts: Facts) -> str:
    words = f"{row['state']} {ago(row['finished_at'])} ago, because {_last(row)}"
    if row["due_at"] is not None and message["dsn_content"]:
        return f"{words}; a worker makes one with less of the original in its place, or gives it up"
    if row["due_at"] is not None:
        makes = "a worker makes it" if facts.living else "no worker is alive to make it"
        return f"{words}; a notice to the sender is owed since {ago(row['due_at'])}, and {makes}"
    if row["dsn_withheld"]:
        return f"{words}; the sender is not told: {_WITHHELD[row['dsn_withheld']]}"
    if facts.notices:
        return "; ".join([words, *map(_notice, facts.notices)])
    if message["dsn_content"]:
        return f"{words}; {_after(row, message['dsn_content'])}"
    return (
        words + "; nobody is told" + (", it has the null sender" if not message["sender"] else "")
    )


def _notice(notice: Row) -> str:
    """What became of a notice to the sender."""
    queue_id, state = notice["queue_id"], notice["state"]
    if state == State.DELIVERED:
        return f"the sender was told by {queue_id}"
    if state in UNFINISHED:
        return f"the sender is told by {queue_id}, which is {state}"
    words = f"notice {queue_id} is {state}, because {_last(notice)}"
    if state == State.DROPPED or notice["due_at"] is not None:
        return words
    return f"{words}, and {_after(notice, notice['dsn_content'])}"


def _after(notice: Row, content: str | None) -> str:
    """What followed when a notice had failed (relay/dsn/generator.py)."""
    refused = notice["state"] == State.BOUNCED and notice["last_outcome"] == Outcome.REJECTED
    if (
        refused
        and content in (Enclosure.FULL, Enclosure.HEADER)
        and notice["reason_source"] == ReasonSource.SERVER
    ):
        return "a notice with less of the original was made in its place"
    return "it was given up: the sender of the original is not told by it"


_ENCLOSED = {
    Enclosure.FULL: "the whole message",
    Enclosure.HEADER: "its header",
    Enclosure.NONE: "nothing of it",
}
_WITHHELD = {
    Withheld.RATE: "it had a notice about mail from an untrusted client less than a minute before",
    Withheld.POSTMASTER: "the mail came from an untrusted client and was for our own postmaster",
    Withheld.ADDRESS: "no mail server can be given its address",
}


def _dropped(row: Row, _message: Row, _facts: Facts) -> str:
    return f"{row['last_reply'] or 'dropped by an operator'}, {ago(row['finished_at'])} ago; nobody is told"


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
    if row["reason_source"] == ReasonSource.OPERATOR:
        return reply
    told = {
        Outcome.DEFERRED: f"{server} deferred it: {reply}",
        Outcome.REJECTED: f"{server} refused it: {reply}",
        Outcome.UNREACHABLE: _unreachable(reply),
        Outcome.INTERRUPTED: f"the transfer to {server} broke off: {reply}",
        Outcome.UNCERTAIN: f"nobody knows whether {server} has it: {reply}",
        Outcome.MALFORMED: f"nobody knows whether {server} has it, its reply is none: {reply}",
    }
    return told.get(row["last_outcome"], reply)


def _unreachable(reply: str) -> str:
    """Why there was no connection; some replies say what they are about."""
    if reply == NO_SERVER or "is left alone" in reply:
        return reply
    return f"no server took a connection: {reply.removeprefix('no connection: ')}"


def _hindrance(route: str, facts: Facts) -> str:
    """What keeps mail of that route from being sent, whatever its time; empty when nothing does."""
    if pause := facts.pauses.get(f"route:{route}"):
        return f"route {route} is paused until `resume` {_by(pause)}"
    if not facts.living:
        besides = _way(route, facts)
        return "no worker is alive" + (f", and {besides}" if besides else "")
    if not any(worker["routes"] for worker in facts.living):
        return ""  # they have just begun, and not said yet
    return _way(route, facts)


def _way(route: str, facts: Facts) -> str:
    """What is wrong with a route and its servers; empty when one of them takes mail."""
    if route not in facts.routes:
        return f"no worker knows a route {route}: `retry --reroute` gives it another"
    if not facts.routes[route]:
        return f"no QMQP server is configured for route {route} (RELAY_QMQP_SERVERS)"
    causes = [_without(server, facts) for server in facts.routes[route]]
    return " and ".join(causes) if all(causes) else ""


def _without(server: str, facts: Facts) -> str:
    """Why nothing is sent to a server; empty when some worker would."""
    if pause := facts.pauses.get(f"server:{server}"):
        return f"server {server} is paused until `resume` {_by(pause)}"
    wary = facts.rests.get(server, {})
    if not wary or any(
        worker["id"] not in wary for worker in facts.living if _knows(worker, server)
    ):
        return ""
    return f"server {server} is left alone until it is tried again, within a minute ({max(wary.values())})"


def _knows(worker: Row, server: str) -> bool:
    return any(server in servers for servers in (worker["routes"] or {}).values())


def _by(pause: Row) -> str:
    """Who paused it, when and why."""
    return f"(by {pause['actor']} {ago(pause['since_at'])} ago" + (
        f": {pause['reason']})" if pause["reason"] else ")"
    )
