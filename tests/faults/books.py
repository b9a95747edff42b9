"""The books of a run: what clients were told, against what servers received.

A client sends each message once, to recipients that no other message has, so every copy that a
server keeps belongs to one transaction. `balance` compares the transactions with the copies, with
the uncertain attempts of the database, and with what is unfinished there.

What must stay true: lost, invented, altered and stuck are zero; a second copy needs an uncertain
attempt of its own; each message that bounced leads to one DSN. A transaction without a definite
reply may have been accepted or not, so it may have one copy or none.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

JOURNAL = True
"""Whether the relay has its journal: then it accepts mail while the database is away, and a 451
after the final dot says for certain that the message is not stored. Today such a message may be
committed although its client was told 451 (RELAY_ACCEPT_DEADLINE, a spooler that died)."""
RECIPIENT_DOMAIN = "example.org"
SENDER_DOMAIN = "example.com"
LISTED = 5  # addresses that a complaint names


class MailStatus(StrEnum):
    """What the client knows about its transaction."""

    ACCEPTED = "accepted"  # 250 after the final dot
    REFUSED = "refused"  # a definite 4xx or 5xx
    UNSENT = "unsent"  # the connection ended before the final dot
    UNKNOWN = "unknown"  # no reply after the final dot, or one that leaves it open


@dataclass(slots=True)
class SentMail:
    """One transaction. `bounces`: the recipients that every server rejects; `reply`: the code,
    `lost`, or `gave up`; `phase`: before, during or after the fault, when it ended."""

    number: int
    sender: str
    recipients: tuple[str, ...]
    bounces: frozenset[str]
    size: int
    phase: str = "before"
    dot_sent: bool = False  # the final dot may have left
    status: MailStatus = MailStatus.UNSENT
    reply: str = "lost"
    queue_id: str = ""

    @property
    def delivered_to(self) -> tuple[str, ...]:
        """The recipients that get a copy."""
        return tuple(one for one in self.recipients if one not in self.bounces)

    @property
    def dsn_due(self) -> bool:
        """Whether its sender is told of a failure once it is accepted."""
        return bool(self.bounces and self.sender)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What servers and database show at the end.

    `kept`: complete requests that a server did not refuse, by recipient; `replied_k`: those of
    them with the reply K; `uncertain`: uncertain attempts in the database, by recipient;
    `altered`: numbers of messages of which a copy has other bytes; `unfinished`: deliveries that
    are not final, or held.
    """

    kept: Mapping[str, int]
    replied_k: Mapping[str, int]
    uncertain: Mapping[str, int]
    altered: frozenset[int] = frozenset()
    unfinished: int = 0


@dataclass(slots=True)
class Books:
    """The result. `complaints` names what does not balance, a line each."""

    accepted: int = 0
    refused: int = 0
    unknown: int = 0
    unknown_delivered: int = 0
    delivered: int = 0  # accepted messages whose recipients all have their copy or their DSN
    doubles: int = 0
    doubles_uncertain: int = 0
    lost: int = 0
    invented: int = 0
    altered: int = 0
    stuck: int = 0
    dsns_due: int = 0
    dsns: int = 0
    complaints: list[str] = field(default_factory=list)

    @property
    def balanced(self) -> bool:
        return not self.complaints


def balance(
    mails: Sequence[SentMail], evidence: Evidence, *, definite_451: bool = JOURNAL
) -> Books:
    """Compare what clients were told with the evidence.

    Without `definite_451` a message that got 451 after its final dot and was delivered all the
    same counts as unknown.
    """
    if not definite_451:
        mails = [_left_open(mail, evidence.kept) for mail in mails]
    books = Books(stuck=evidence.unfinished, altered=len(evidence.altered))
    statuses = Counter(mail.status for mail in mails)
    books.accepted = statuses[MailStatus.ACCEPTED]
    books.refused = statuses[MailStatus.REFUSED] + statuses[MailStatus.UNSENT]
    books.unknown = statuses[MailStatus.UNKNOWN]
    lost, invented = _count_mail(books, mails, evidence)
    invented += _strangers(mails, evidence.kept)
    unexplained = _count_doubles(books, mails, evidence)
    books.lost, books.invented = len(lost), len(invented)
    for what, which in (
        ("lost", lost),
        ("invented", invented),
        ("doubled without an uncertain attempt", unexplained),
        ("altered", sorted(map(str, evidence.altered))),
    ):
        if which:
            books.complaints.append(f"{len(which)} {what}: {', '.join(which[:LISTED])}")
    if books.stuck:
        books.complaints.append(f"{books.stuck} deliveries are stuck")
    return books


def _left_open(mail: SentMail, kept: Mapping[str, int]) -> SentMail:
    """The transaction, as UNKNOWN if a 451 to its final dot did not keep it from delivery."""
    if (
        mail.reply == "451"
        and mail.dot_sent
        and any(map(kept.get, (mail.sender, *mail.recipients)))
    ):
        return replace(mail, status=MailStatus.UNKNOWN)
    return mail


def _count_mail(
    books: Books, mails: Iterable[SentMail], evidence: Evidence
) -> tuple[list[str], list[str]]:
    """Count copies and DSNs of each transaction; the addresses that lack one, and those that have
    one without a reason."""
    lost: list[str] = []
    invented: list[str] = []
    for mail in mails:
        due = [*mail.delivered_to, *([mail.sender] if mail.dsn_due else [])]
        have = [one for one in due if evidence.replied_k.get(one)]
        kept = [one for one in due if evidence.kept.get(one)]
        books.dsns += mail.dsn_due and bool(evidence.kept.get(mail.sender))
        if mail.status is MailStatus.ACCEPTED:
            books.dsns_due += mail.dsn_due
            books.delivered += len(have) == len(due)
            lost += [one for one in due if one not in have]
        elif mail.status is MailStatus.UNKNOWN:
            books.unknown_delivered += bool(kept)
            # It was accepted after all, so all of it is due.
            books.dsns_due += mail.dsn_due and bool(kept)
            lost += [one for one in due if kept and one not in have]
        else:
            invented += kept
        if mail.sender and not mail.dsn_due and evidence.kept.get(mail.sender):
            invented.append(mail.sender)
    return lost, invented


def _strangers(mails: Iterable[SentMail], kept: Mapping[str, int]) -> list[str]:
    """Addresses that got a copy and that no client has named."""
    known = {address for mail in mails for address in (mail.sender, *mail.recipients)}
    return sorted(kept.keys() - known)


def _count_doubles(books: Books, mails: Iterable[SentMail], evidence: Evidence) -> list[str]:
    """Count further copies; the addresses that have more than uncertain attempts explain."""
    unexplained = []
    for mail in mails:
        for address in filter(None, (mail.sender, *mail.recipients)):
            more = max(0, evidence.kept.get(address, 0) - 1)
            explained = min(more, evidence.uncertain.get(address, 0))
            books.doubles += more
            books.doubles_uncertain += explained
            if more > explained:
                unexplained.append(address)
    return unexplained
