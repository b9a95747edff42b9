"""What is wrong with the queue now, for the operator who was woken: `qmqp-relay problems`.

Each check reads the database and yields problems; a pause is a problem only after a
day. The statements are in `problems.<database>.sql`. A failure leaps if a route, a sender or a
domain has more than twice as many failed deliveries in the last hour as in any other hour of the
last week.

What must stay true: a problem names the next command to type, and a cause is reported once: mail
that only waits for a server that is down is part of that problem.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from relay.report.queries import Reader

type Kind = Literal[
    "server_down",
    "no_worker",
    "not_claimed",
    "overdue",
    "journal",
    "disk",
    "certificate",
    "held",
    "uncertain",
    "expiring",
    "certificate_ends",
    "paused_long",
    "webhook",
    "failures",
]
# In the order in which they are shown.
KINDS: tuple[Kind, ...] = Kind.__value__.__args__
CRITICAL = frozenset(
    {"server_down", "no_worker", "not_claimed", "overdue", "journal", "disk", "certificate"}
)
SLACK = 60.0  # seconds for which mail may be overdue: a worker is starting, or all are busy
SOON = 6 * 3600.0  # seconds before mail expires
LATE_EVENTS = 300.0  # seconds that an event may wait for its webhook
LEAST_FAILURES = 20  # failed deliveries of the last hour that may be a leap
MIN_FREE_BYTES, MIN_FREE_PART = 1e9, 0.05  # of the disk of the spool


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that an operator should look at.

    `subject`: the server, route, domain, directory or file that it is about, else empty. `since`:
    None if that is not known. `count`: how many deliveries it concerns, the free bytes of a disk,
    or the days that a certificate has left. `next`: the command to type.
    """

    kind: Kind
    subject: str
    since: datetime | None
    count: int
    text: str
    next: str


class Problems(Reader):
    """The checks of one database."""

    def all(self) -> list[Problem]:
        """Every problem, the most urgent kind first."""
        found = [
            *self.servers(),
            *self.workers(),
            *self.held(),
            *self.uncertain(),
            *self.expiring(),
            *self.pauses(),
            *self.webhooks(),
            *self.failures(),
        ]
        return sorted(found, key=lambda problem: KINDS.index(problem.kind))

    def waiting(self) -> int:
        """How many deliveries wait in all."""
        return int(self.read("workers")[0]["waiting"])

    def servers(self) -> Iterator[Problem]:
        """Servers that fail, or do not authorize the relay."""
        for row in self.read("down"):
            server, waiting = str(row["server"]), int(row["waiting"])
            text = f"{_count(waiting)} for it, which says: {row['reason']}"
            following = f"qmqp-relay probe {shlex.quote(server)}"
            yield Problem("server_down", server, row["failed_at"], waiting, text, following)

    def workers(self) -> Iterator[Problem]:
        """No worker; or mail that workers do not claim or requeue."""
        (total,) = self.read("workers")
        if not total["alive"]:
            text = f"no worker is alive, and {_count(total['waiting'])}"
            since, waiting = total["last_alive_at"], int(total["waiting"])
            yield Problem("no_worker", "", since, waiting, text, "qmqp-relay check")
            return
        for row in self.read("late", slack=SLACK):
            count, subject = int(row["deliveries"]), f"route:{row['route']}"
            following = (
                f"qmqp-relay list --state {row['state']} --route {shlex.quote(row['route'])}"
            )
            if row["state"] != "queued":
                text = f"sweepers have not handled {count} {row['state']} deliveries that are due"
                yield Problem("overdue", subject, row["due_at"], count, text, following)
            elif row["can_go"] and not total["sending"]:
                text = f"{_count(count)} for a worker, and nothing is being sent"
                yield Problem("not_claimed", subject, row["due_at"], count, text, following)

    def held(self) -> Iterator[Problem]:
        """Mail that the relay itself has held since yesterday."""
        (row,) = self.read("held")
        if count := int(row["deliveries"]):
            were = "was" if count == 1 else "were"
            text = f"{_many(count)} {were} held by the relay in the last day"
            text += "; only an operator ends that"
            following = "qmqp-relay list --state held --newest"
            yield Problem("held", "", row["held_at"], count, text, following)

    def uncertain(self) -> Iterator[Problem]:
        """Mail that may have arrived twice since yesterday."""
        (row,) = self.read("uncertain")
        if count := int(row["deliveries"]):
            text = f"{_many(count)} had an attempt in the last day that may have delivered the mail"
            following = "qmqp-relay list --all --uncertain --newest"
            yield Problem("uncertain", "", row["finished_at"], count, text, following)

    def expiring(self) -> Iterator[Problem]:
        """Mail that expires soon."""
        (row,) = self.read("expiring", soon=SOON)
        if count := int(row["deliveries"]):
            text = f"{_many(count)} will expire in less than six hours, unless an attempt succeeds"
            following = "qmqp-relay list --expires-within 6h"
            yield Problem("expiring", "", None, count, text, following)

    def pauses(self) -> Iterator[Problem]:
        """Pauses that are older than a day."""
        for row in self.read("paused_long"):
            kind, _, name = str(row["subject"]).partition(":")
            reason = f": {row['reason']}" if row["reason"] else ""
            text = f"paused by {row['actor']}{reason}; {_count(row['deliveries'])}"
            yield Problem(
                "paused_long",
                str(row["subject"]),
                row["paused_at"],
                int(row["deliveries"]),
                text,
                f"qmqp-relay resume --{kind} {shlex.quote(name)}",
            )

    def webhooks(self) -> Iterator[Problem]:
        """Webhooks, or plugins, that are disabled, or whose events wait for long."""
        for row in self.read("late_events", late=LATE_EVENTS):
            name, count = str(row["name"]), int(row["pending"])
            text = f"{count} events wait for it"
            if row["disabled_at"]:
                text += f", and nothing is recorded for it: it is disabled: {row['reason']}"
                following = f"qmqp-relay webhooks enable {shlex.quote(name)}"
                yield Problem("webhook", name, row["disabled_at"], count, text, following)
                continue
            if row["error"]:
                text += f": {row['error']}"
            following = f"qmqp-relay webhooks test {shlex.quote(name)}"
            if name.startswith("plugin:"):
                following = "qmqp-relay webhooks list"
            yield Problem("webhook", name, row["oldest_at"], count, text, following)

    def failures(self) -> Iterator[Problem]:
        """Routes, senders and domains whose failures leapt."""
        for row in self.read("leaps", least=LEAST_FAILURES):
            kind, name, failed = row["kind"], str(row["name"]), int(row["failed"])
            text = (
                f"{failed} deliveries failed in the last hour, and at most {row['most']} in any"
                " other hour of the last week"
            )
            following = f"qmqp-relay list --all --{kind} {shlex.quote(name or '<>')}"
            following += " --newer-than 1d --count-by reason"
            yield Problem("failures", f"{kind}:{name or '<>'}", None, failed, text, following)


def journal(messages: int, seconds: float) -> Iterator[Problem]:
    """Accepted mail that has had no rows for longer than a minute."""
    if messages and seconds > SLACK:
        text = f"{messages} accepted messages have no rows yet, the oldest for {seconds:.0f} s"
        yield Problem("journal", "", None, messages, text, "qmqp-relay check")


def disk(directory: str, free: int, total: int) -> Iterator[Problem]:
    """The disk of the spool, if there is little room for bodies."""
    if free < MIN_FREE_BYTES or free < MIN_FREE_PART * total:
        text = f"{free / 1e9:.1f} GB of {total / 1e9:.1f} GB are free for bodies; clients get 452"
        text += " when it is full"
        yield Problem("disk", directory, None, free, text, f"df -h {shlex.quote(directory)}")


def certificate(file: str, days: float, warn_days: float, fault: str) -> Iterator[Problem]:
    """A certificate with so many days left, fewer than `warn_days`; or the fault for which its file
    cannot be used."""
    following = "qmqp-relay check"
    if fault:
        text = f"{fault}; processes that run keep the pair that they have, and others do not start"
        yield Problem("certificate", file, None, 0, text, following)
    elif days < 0:
        ended = datetime.now(UTC) + timedelta(days=days)
        text = "the certificate has ended, and clients refuse TLS; renew it"
        yield Problem("certificate", file, ended, 0, text, following)
    elif days < warn_days:
        text = f"the certificate ends in {days:.0f} days, and is not renewed yet"
        yield Problem("certificate_ends", file, None, int(days), text, following)


def _many(deliveries: int) -> str:
    return "1 delivery" if deliveries == 1 else f"{deliveries} deliveries"


def _count(deliveries: int) -> str:
    return "1 delivery waits" if deliveries == 1 else f"{deliveries} deliveries wait"
