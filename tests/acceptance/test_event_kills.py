"""Any process may be killed while events flow: none is lost, an event that comes twice has the same
id, and the events of a message arrive in their order.

Clients send all the time, and a server replies after a moment, so that a killed worker leaves
transfers of every phase. The webhook of the test takes a moment too, so that a kill also hits
events that are claimed, posted, and not recorded. In the end the table of events is compared with
what became of mail, and what the receiver got with the table. A receiver that never replies costs
mail nothing.
"""

import os
import signal
import threading
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from sqlalchemy import text

from qmqp.sink import Answer, Rule, running_sink
from relay.db.engine import writing
from tests.acceptance.installation import Feeder, Install, Installation
from tests.integration.webhook_receiver import OK, WebhookReceiver, running_receiver
from tests.waiting import until
from worker.notifier import CONCURRENCY

pytestmark = pytest.mark.timeout(300)  # an adoption may be ten seconds away
SETTINGS = {
    "LEASE": "2s",
    "GRACE": "1s",
    "UNCERTAIN_DELAY": "1s",
    "RETRY_MIN": "200ms",
    "RETRY_MAX": "400ms",
    "DRAIN_TIMEOUT": "3s",
    "ACCEPT_DEADLINE": "5s",
}


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_no_event_is_lost_or_reordered_by_kills(
    database: str, install: Install, tmp_path: Path
) -> None:
    pause = threading.Event()
    with (
        running_receiver(answer=lambda _id, _data: (pause.wait(0.02), (200, OK))[1]) as receiver,
        running_sink(Rule(Answer(delay=0.05))) as sink,
    ):
        relay = install(
            database,
            QMQP_SERVERS=f"127.0.0.1:{sink.port}",
            WEBHOOKS=str(receiver.write_file(tmp_path)),
            **SETTINGS,
        )
        workers = [relay.worker(), relay.worker()]
        smtpd = relay.smtpd()
        with Feeder(relay.port) as feeder:
            for _ in range(3):
                feeder.until_accepted(40)
                posted = len(receiver.received)
                until(lambda posted=posted: len(receiver.received) > posted + 20, 30)  # type: ignore[misc]
                relay.end(workers.pop(0), signal.SIGKILL)
                workers.append(relay.worker(wait=False))
                feeder.until_accepted(20)
                (spooler,) = children(smtpd.pid)
                os.kill(spooler, signal.SIGKILL)
                feeder.until_accepted(20)
                relay.end(smtpd, signal.SIGKILL)
                smtpd = relay.smtpd()
        relay.until_all_recorded()
        until(lambda: not pending(relay), 60, what=relay.log_text)
        recorded = {row[0] for row in relay.rows("SELECT address FROM recipients")}
        assert feeder.accepted <= recorded
    compare(relay, receiver)


def test_receiver_that_never_replies_delays_no_mail(install: Install, tmp_path: Path) -> None:
    go_on = threading.Event()
    with (
        running_receiver(answer=lambda _id, _data: (go_on.wait(60), (200, OK))[1]) as receiver,
        running_sink() as sink,
    ):
        relay = install(
            "sqlite",
            QMQP_SERVERS=f"127.0.0.1:{sink.port}",
            WEBHOOKS=str(receiver.write_file(tmp_path)),
            **SETTINGS,
        )
        relay.worker()
        relay.smtpd()
        with Feeder(relay.port) as feeder:
            feeder.until_accepted(200)
        relay.until_rows(15)
        until(lambda: not relay.count("d.state <> 'delivered'"), 15, what=relay.unfinished)
        assert receiver.received == []
        waiting = "SELECT count(*), count(claim) FROM notifications"
        ((count, claimed),) = relay.rows(waiting)
        assert count == 2 * relay.count(), "accepted and delivered"
        assert claimed <= CONCURRENCY, "so many are in memory"
        go_on.set()
        until(lambda: not relay.rows("SELECT 1 FROM notifications"), 60, what=relay.log_text)
    compare(relay, receiver)


def children(pid: int) -> list[int]:
    """The child processes of a process."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def pending(relay: Installation) -> int:
    """How many notifications wait. The claims of a killed worker end now, and not in two
    minutes."""
    sql = "UPDATE notifications SET due_at = @ago(1) WHERE due_at > @later(60)"
    with writing(relay.database) as connection:
        connection.execute(text(relay.dialect(sql)))
    return int(relay.rows("SELECT count(*) FROM notifications")[0][0])


def compare(relay: Installation, receiver: WebhookReceiver) -> None:
    """Mail, the table of events, and what the receiver got tell the same."""
    recorded = relay.rows("SELECT @hex(queue_id), type, id FROM events ORDER BY sequence")
    types = Counter(row[1] for row in recorded)
    deliveries = relay.count()
    uncertain = relay.rows("SELECT count(*) FROM attempts WHERE outcome = 'uncertain'")[0][0]
    assert types["accepted"] == types["delivered"] == deliveries
    assert types["uncertain"] == uncertain
    assert set(types) <= {"accepted", "delivered", "uncertain", "deferred"}
    expected, arrived = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for queue_id, _, event_id in recorded:
        expected[queue_id].append(event_id)
    for one in receiver.firsts():
        arrived[one.data["queue_id"]].append(one.id)
    assert arrived == expected, "each event of each message, in its order"
    assert receiver.invalid == []
