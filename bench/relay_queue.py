"""The queue of the relay through SQL alone: the statements of smtpd and of a worker, without either
process. Messages have one recipient, and a place in a journal that has no files."""

import os
from collections.abc import Sequence
from pathlib import Path

from relay.db.engine import connect
from relay.ids import new_id
from relay.queue.accept import (
    Acceptor,
    EncodedMessage,
    NewMessage,
    NewRecipient,
    SegmentSpan,
    encode,
)
from relay.queue.claim import WorkerQueue
from relay.queue.model import Attempt, Claim, ClaimRequest, Command, Completion
from relay.queue.outcome import Outcome
from relay.queue.states import State
from relay.settings import WorkerSettings, load
from relay.spool.journal.format import BLOCK


class RelayQueue:
    """A registered worker, and the acceptor of a smtpd, on a database with the schema."""

    def __init__(self, url: str, directory: Path) -> None:
        self.settings = load(WorkerSettings, state_dir=directory, delay_warning=4 * 3600.0)
        self.engine = connect(url, hot=True)
        self._acceptor = Acceptor(
            self.engine,
            lifetime=self.settings.queue_lifetime,
            grace=self.settings.grace,
        )
        self._segment, self._position = new_id(), BLOCK
        self._acceptor.open_segment(self._segment, self._position)
        self.queue = WorkerQueue(self.engine, self.settings)
        self.worker = new_id()
        self.queue.register(self.worker, "bench", os.getpid())

    def accept(self, count: int) -> list[str]:
        """Accept so many messages in one batch; return their ids."""
        recipients = [NewRecipient("b@example.org")]
        messages = [
            NewMessage(new_id(), "a@example.com", 4096, recipients, "192.0.2.1", "c", "ESMTP")
            for _ in range(count)
        ]
        warning = self.settings.delay_warning
        encoded = [
            EncodedMessage(encode(message, delay_warning=warning), self._position)
            for message in messages
        ]
        end = self._position + BLOCK
        self._acceptor.commit(encoded, SegmentSpan(self._segment, self._position, end))
        self._position = end
        return [message.id for message in messages]

    def complete_and_claim(self, claims: Sequence[Claim], ids: Sequence[str]) -> list[Claim]:
        """Complete claims after a K, and claim the messages of `ids`, in one COMMIT. Raises
        RuntimeError if not all are claimed."""
        attempt = Attempt(1, "192.0.2.1:628", Outcome.DELIVERED, "ok", 4200, 0.1, 0.0)
        commands: list[Command] = [
            Completion(
                self.worker,
                claim.queue_id,
                claim.number,
                claim.claim,
                State.DELIVERED,
                Outcome.DELIVERED,
                "ok",
                attempts=[attempt],
                in_journal=True,
            )
            for claim in claims
        ]
        if ids:
            commands.append(ClaimRequest(self.worker, ids, {"default": len(ids)}))
        last = self.queue.commit(commands)[-1]
        claimed = last if isinstance(last, list) else []
        if len(claimed) != len(ids):
            raise RuntimeError(f"{len(claimed)} of {len(ids)} messages were claimed")
        return claimed
