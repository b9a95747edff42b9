"""The clients: they send known messages at a bounded rate, and note what they were told.

Half of the clients keep a connection for twenty messages, the others open one for each message.
`Plan` decides what the message of a number is like, so the body of a copy can be compared with
what was sent. A message is sent once: if its connection breaks, the client does not send it again.

What must stay true: a transaction is UNSENT only if its final dot never left; it is ACCEPTED only
after the 250 to that dot. A client that loses its patience leaves a transaction UNKNOWN.
"""

import itertools
import random
import smtplib
import threading
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

from tests.faults.books import RECIPIENT_DOMAIN, SENDER_DOMAIN, MailStatus, SentMail
from tests.waiting import until

CLIENTS = 6
PER_CONNECTION = 20  # messages on a connection that is kept
TIMEOUT = 20.0  # seconds that most clients wait for a reply
IMPATIENT = 4.0  # and the last client
GAVE_UP = "gave up"  # the reply that the last client notes when its patience ends
_PIECE = 32 * 1024


@dataclass(frozen=True, slots=True)
class Plan:
    """What is sent: message `number` of the run with this seed."""

    seed: str

    def mail(self, number: int) -> SentMail:
        """Most messages are small and go to one recipient. Some are large, some are deferred at
        first, some have two recipients, and some bounce, of which some have the null sender."""
        name, large = f"m{number}", number % 11 == 5
        sender = f"{name}@{SENDER_DOMAIN}"
        recipients = [f"{name}@{RECIPIENT_DOMAIN}"]
        if number % 12 == 3:
            recipients = [f"busy.{name}@{RECIPIENT_DOMAIN}"]
        elif number % 12 == 7:
            recipients.append(f"second.{name}@{RECIPIENT_DOMAIN}")
        elif number % 12 == 9:
            recipients = [f"reject.{name}@{RECIPIENT_DOMAIN}"]
            sender = "" if number % 36 == 9 else sender
        elif number % 24 == 11:
            recipients.append(f"bad.{name}@{RECIPIENT_DOMAIN}")
        bounces = frozenset(one for one in recipients if one.startswith(("reject.", "bad.")))
        size = 150_000 + number % 7 * 20_000 if large else 500 + number % 13 * 300
        return SentMail(number, sender, tuple(recipients), bounces, size)

    def body(self, number: int, size: int) -> bytes:
        """The content in LF form: lines that no other message of the run has."""
        line = sha256(f"{self.seed} {number}".encode()).hexdigest().encode() + b"\n"
        return b"Subject: m%d\n\n" % number + line * (size // len(line) + 1)


class MailTraffic:
    """Clients of the smtpd on `port`. `rate`: messages a second in all; 0: as fast as they can.
    `first`: the number of the first message."""

    def __init__(
        self, port: int, plan: Plan, *, rate: float, clients: int = CLIENTS, first: int = 1
    ) -> None:
        self.mails: list[SentMail] = []  # each is added when its transaction has ended
        self.accepted = 0
        self.phase = "before"
        self.plan = plan
        self._port = port
        self._pause = clients / rate if rate else 0.0
        self._numbers = itertools.count(first)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=partial(self._run, client, clients), name=f"client-{client}")
            for client in range(clients)
        ]

    def __enter__(self) -> "MailTraffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop sending; returns when the open transactions have ended."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def until_accepted(self, more: int, timeout: float = 60.0) -> None:
        """Wait until this many more messages are accepted. Raises AssertionError."""
        goal = self.accepted + more
        until(lambda: self.accepted >= goal, timeout, what=self.replies_text)

    def until_tried(self, more: int, timeout: float = 60.0) -> None:
        """Wait until this many more transactions have ended, well or not. Raises
        AssertionError."""
        goal = len(self.mails) + more
        until(lambda: len(self.mails) >= goal, timeout, what=self.replies_text)

    def replies(self, *phases: str) -> Counter[str]:
        """How often each reply was heard in these phases: a code, or `lost`."""
        return Counter(mail.reply for mail in list(self.mails) if mail.phase in phases)

    def replies_text(self) -> str:
        return f"clients heard {dict(self.replies('before', 'during', 'after'))}"

    def _run(self, client: int, clients: int) -> None:
        rng = random.Random(f"{self.plan.seed} client {client}")
        timeout = IMPATIENT if client == clients - 1 else TIMEOUT
        connection: smtplib.SMTP | None = None
        left = 0  # messages that this connection may still carry
        self._stopping.wait(rng.random() * self._pause)
        while not self._stopping.is_set():
            due = time.monotonic() + self._pause
            mail = self._next()
            try:
                if connection is None:
                    connection = smtplib.SMTP(
                        "127.0.0.1", self._port, "client.example.com", timeout
                    )
                    connection.ehlo_or_helo_if_needed()
                    left = PER_CONNECTION if client % 2 else 1
                _send(connection, mail, self.plan.body(mail.number, mail.size))
                left -= 1
                if not left:
                    connection.quit()
                    connection = None
            except (OSError, smtplib.SMTPException) as error:
                if isinstance(error, smtplib.SMTPResponseException) and not mail.dot_sent:
                    mail.reply, mail.status = str(error.smtp_code), MailStatus.REFUSED
                elif timeout == IMPATIENT and _timed_out(error):
                    mail.reply = GAVE_UP
                if connection is not None:
                    connection.close()
                connection = None
                due += 0.1  # smtpd may be out of reach: do not turn in circles
            self._ended(mail)
            self._stopping.wait(max(0.0, due - time.monotonic()))
        if connection is not None:
            connection.close()

    def _next(self) -> SentMail:
        with self._lock:
            return self.plan.mail(next(self._numbers))

    def _ended(self, mail: SentMail) -> None:
        with self._lock:
            mail.phase = self.phase
            self.mails.append(mail)
            self.accepted += mail.status is MailStatus.ACCEPTED


def _timed_out(error: BaseException) -> bool:
    """Whether the client gave up. smtplib reports that as a lost connection, with the cause."""
    return isinstance(error, TimeoutError) or isinstance(error.__context__, TimeoutError)


def _send(connection: smtplib.SMTP, mail: SentMail, body: bytes) -> None:
    """One transaction. Raises what smtplib raises when the connection cannot go on, and
    SMTPResponseException for a refusal before the content."""
    for command in (
        partial(connection.mail, mail.sender),
        *(partial(connection.rcpt, recipient) for recipient in mail.recipients),
        partial(connection.docmd, "DATA"),
    ):
        code, reply = command()
        if code >= 400:
            raise smtplib.SMTPResponseException(code, reply)
    lines = body.replace(b"\n", b"\r\n")
    for start in range(0, len(lines), _PIECE):
        connection.send(lines[start : start + _PIECE])
    mail.dot_sent, mail.status = True, MailStatus.UNKNOWN
    connection.send(b".\r\n")
    code, reply = connection.getreply()
    mail.reply = str(code)
    mail.status = MailStatus.ACCEPTED if code == 250 else MailStatus.REFUSED
    mail.queue_id = reply.rpartition(b" ")[2].decode() if code == 250 else ""
