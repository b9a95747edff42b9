"""Operations as an operator types them, on both databases: every operation in every state."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import text

from relay.db.engine import writing
from relay.dsn.generator import DsnGenerator
from relay.ids import dashed
from relay.queue import audit as actions
from relay.queue import operations as verbs
from relay.queue.outcome import Outcome
from relay.queue.states import State
from relay.report.filters import Filter
from relay.report.queries import QueueReader
from relay.spool.store import Spool
from tests.bodies import body_in
from tests.integration.harness import QueueHarness, new_message
from tests.integration.test_cost_of_a_message import counted
from tests.integration.typed import Typed, lines, typed_at
from tests.waiting import until

BODY = b"Subject: x\n\n" + b"b" * 88


@pytest.fixture
def typed(queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Typed:
    return typed_at(queue, spool, monkeypatch)


def one_in(queue: QueueHarness, state: State, *addresses: str, **more: object) -> str:
    """A message whose delivery is in that state."""
    queue_id = queue.accept(*addresses, **more)
    if state is State.HELD:
        queue.change(
            "UPDATE deliveries SET state = 'held', due_at = NULL WHERE queue_id = @id(:id)",
            id=queue_id,
        )
    elif state is not State.QUEUED:
        (claim,) = queue.claim(queue_id)
        if state is not State.SENDING:
            outcomes = {State.DEFERRED: Outcome.DEFERRED, State.DELIVERED: Outcome.DELIVERED}
            queue.complete(claim, outcomes[state])
    return queue_id


AFTER = {
    "retry": {"deferred": "queued"},
    "hold": {"queued": "held", "deferred": "held"},
    "release": {"held": "queued"},
    "bounce": {"queued": "bounced", "deferred": "bounced", "held": "bounced"},
    "drop": {"queued": "dropped", "deferred": "dropped", "held": "dropped"},
}


@pytest.mark.parametrize("verb", AFTER)
def test_every_operation_in_every_state(queue: QueueHarness, typed: Typed, verb: str) -> None:
    states = (State.QUEUED, State.SENDING, State.DEFERRED, State.HELD, State.DELIVERED)
    ids = {str(state): one_in(queue, state) for state in states}
    typed(verb, "--all", "--yes")
    for was, queue_id in ids.items():
        delivery = queue.delivery(queue_id)
        assert delivery["state"] == AFTER[verb].get(was, was), was
        if was in AFTER[verb]:
            assert (delivery["due_in"] is None) == (delivery["state"] in ("held", "dropped"))
            assert (delivery["finished_at"] is not None) == (
                delivery["state"] in ("bounced", "dropped")
            )
    assert queue.delivery(ids["sending"])["pending_operation"] == (
        None if verb == "release" else verb
    )


@pytest.mark.parametrize(
    ("verb", "then"), [("hold", "held"), ("drop", "dropped"), ("bounce", "bounced")]
)
def test_operations_report_deliveries_that_are_being_sent(
    queue: QueueHarness, typed: Typed, verb: str, then: str
) -> None:
    (one,), (two,) = queue.claim(queue.accept()), queue.claim(queue.accept())
    assert "2 being sent" in typed(verb, "--all", "--yes").stderr
    queue.complete(one, Outcome.DEFERRED)
    queue.complete(two, Outcome.DELIVERED)
    assert queue.states_of([one.queue_id, two.queue_id]) == [then, "delivered"], (
        "a K beats every request"
    )
    assert queue.delivery(two.queue_id)["last_reply"] == "its words"


@pytest.mark.parametrize("verb", ["hold", "drop", "bounce"])
@pytest.mark.parametrize("end", ["recorded", "expired"])
def test_actor_and_reason_of_a_pending_operation_are_kept(
    queue: QueueHarness, typed: Typed, verb: str, end: str
) -> None:
    """The reason is the same as that of a waiting delivery."""
    waiting, (claim,) = queue.accept(), queue.claim(queue.accept())
    typed(verb, "--all", "--yes", "--reason", "they moved")
    text = queue.delivery(waiting)["last_reply"]
    row = queue.delivery(claim.queue_id)
    assert (row["last_reply"], row["pending_reason"]) == (None, text)
    if end == "recorded":
        queue.complete(claim, Outcome.DEFERRED)
    else:
        queue.pass_time(400)
        queue.expire_worker(queue.worker)
    row = queue.delivery(claim.queue_id)
    assert (row["last_reply"], row["pending_reason"]) == (text, None)
    assert text.endswith(": they moved")
    assert text in typed("why", claim.queue_id).stdout


def test_a_pending_retry_keeps_the_reply_of_the_server(queue: QueueHarness, typed: Typed) -> None:
    (claim,) = queue.claim(queue.accept())
    typed("retry", claim.queue_id, "--reason", "now")
    queue.complete(claim, Outcome.DEFERRED)
    row = queue.delivery(claim.queue_id)
    assert (row["state"], row["last_reply"], row["pending_reason"]) == ("queued", "its words", None)


def test_release_cancels_a_pending_hold(queue: QueueHarness, typed: Typed) -> None:
    (held,), (dropped,) = queue.claim(queue.accept()), queue.claim(queue.accept())
    typed("hold", held.queue_id)
    typed("drop", dropped.queue_id)
    done = typed("release", "--all")
    assert "release: 1 delivery (1 sending)" in done.stdout
    assert "1 being sent: they are no longer held after this attempt" in done.stderr
    rows = [queue.delivery(claim.queue_id) for claim in (held, dropped)]
    assert [(row["state"], row["pending_operation"]) for row in rows] == [
        ("sending", None),
        ("sending", "drop"),
    ]
    assert [row["pending_reason"] is None for row in rows] == [True, False]
    queue.complete(held, Outcome.DEFERRED)
    assert queue.state(held.queue_id) == "deferred"
    assert len(queue.rows("SELECT * FROM audit_deliveries")) == 3


def test_operations_run_in_batches_and_miss_no_delivery(
    queue: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "CHUNK", 4)
    queue.insert([new_message("x@example.org", "bulk:y@example.org") for _ in range(9)])
    other = queue.accept("other@example.com")
    touched, free = verbs.QueueOperations(queue.database, sends_dsns=True).apply(
        verbs.OPERATIONS["hold"],
        Filter(recipient="*@example.org"),
        actor="me@here",
        reason="because",
    )
    assert (dict(touched), free) == ({"queued": 18}, [])
    assert queue.state(other) == "queued"
    (action,) = queue.rows("SELECT actor, operation, reason, filter, matched FROM audit")
    assert tuple(action.values()) == (
        "me@here",
        "hold",
        "because",
        "--recipient '*@example.org'",
        18,
    )
    noted = """SELECT t.queue_id, t.delivery FROM audit_deliveries t JOIN audit a
        ON a.id = t.audit_id
        JOIN deliveries d ON d.queue_id = t.queue_id AND d.number = t.delivery
        AND d.state = 'held'"""
    assert len(queue.rows(noted)) == len(queue.rows("SELECT * FROM audit_deliveries")) == 18


@pytest.mark.parametrize("name", ["hold", "drop", "retry --reroute"])
def test_an_interrupted_operation_is_in_the_audit(
    queue: QueueHarness, typed: Typed, spool: Spool, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(verbs, "CHUNK", 2)
    ids = sorted(queue.accept() for _ in range(5))
    for queue_id in ids:
        spool.store(queue_id, [BODY])
    note, calls = actions.AuditEntry.note, list[int]()

    def interrupting(self: actions.AuditEntry, *given: object) -> None:
        calls.append(1)
        note(self, *given)  # type: ignore[arg-type]
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(actions.AuditEntry, "note", interrupting)
    done = typed(*name.split(), "--all", "--yes", status=130)
    assert "4 deliveries (4 queued)" in done.stdout
    assert "interrupted after 4 of 5 deliveries" in done.stderr
    ((matched,),) = (row.values() for row in queue.rows("SELECT matched FROM audit"))
    touched = [
        row["id"]
        for row in queue.rows("SELECT @hex(queue_id) AS id FROM audit_deliveries ORDER BY 1")
    ]
    assert (matched, touched) == (4, ids[:4])
    if name == "hold":
        assert queue.states_of(ids) == [*["held"] * 4, "queued"]
    assert {i for i, _ in spool.ids()} == set(ids[4:] if name == "drop" else ids)


def test_a_chunk_costs_the_same_statements_whatever_its_size(queue: QueueHarness) -> None:
    """One more statement reads the deletable bodies after the COMMIT of the chunk."""
    counts = list[int]()
    for size in (1, 20):
        for _ in range(size):
            queue.accept(sender="")
        with counted(queue.database) as count:
            _, free = verbs.QueueOperations(queue.database, sends_dsns=True).apply(
                verbs.OPERATIONS["drop"], Filter(), actor="me@here", reason=""
            )
        assert len(free) == size
        counts.append(count["statements"])
    assert counts[0] == counts[1] == 6


# An operation, its filter, the state that a delivery is in, and the state that another session
# changes it to meanwhile.
MEANWHILE = {
    "drop what was released": (
        "drop",
        Filter(states=("held",)),
        State.HELD,
        "state = 'queued', due_at = @now",
    ),
    "bounce what was released": (
        "bounce",
        Filter(states=("held",)),
        State.HELD,
        "state = 'queued', due_at = @now",
    ),
    "hold what was retried": (
        "hold",
        Filter(states=("deferred",)),
        State.DEFERRED,
        "state = 'queued', due_at = @now",
    ),
    "retry what another server had": (
        "retry",
        Filter(server="qmqp.example.net:628"),
        State.DEFERRED,
        "last_server = 'other.example.net:628'",
    ),
    "release what has another reason": (
        "release",
        Filter(reply="first"),
        State.HELD,
        "last_reply = 'second'",
    ),
    "drop what was rerouted": ("drop", Filter(route="default"), State.QUEUED, "route = 'other'"),
}


@pytest.mark.parametrize("case", MEANWHILE)
def test_the_whole_filter_counts_when_the_row_is_locked(queue: QueueHarness, case: str) -> None:
    """Another session has the oldest row, and changes it so that it is meant no longer while the
    verb waits for it."""
    name, wanted, state, change = MEANWHILE[case]
    ids = sorted(one_in(queue, state) for _ in range(3))
    queue.change("UPDATE deliveries SET last_reply = 'first'")
    operations = verbs.QueueOperations(queue.database, sends_dsns=True)
    with ThreadPoolExecutor(1) as another, writing(queue.database) as connection:
        of_the_oldest = "WHERE queue_id = @id(:id)"
        sql = f"UPDATE deliveries SET {change} {of_the_oldest} RETURNING *"
        (changed,) = connection.execute(text(queue.dialect(sql)), {"id": dashed(ids[0])}).mappings()
        applied = another.submit(
            operations.apply, verbs.OPERATIONS[name], wanted, actor="me@here", reason="", limit=2
        )
        until(lambda: _waits(queue) or applied.done(), what="the verb waits for the row")
        assert not applied.done()
    touched, _ = applied.result()
    assert touched == {str(state): 2}, "the limit is filled with what is meant"
    assert queue.rows(f"SELECT * FROM deliveries {of_the_oldest}", id=ids[0]) == [dict(changed)]
    noted = queue.rows("SELECT @hex(queue_id) AS id FROM audit_deliveries ORDER BY 1")
    assert [row["id"] for row in noted] == ids[1:]


def _waits(queue: QueueHarness) -> bool:
    """Whether a session waits for a lock: for a row on PostgreSQL, for its turn to write on
    SQLite."""
    if queue.dialect.postgresql:
        return bool(
            queue.rows(
                "SELECT 1 FROM pg_stat_activity WHERE cardinality(pg_blocking_pids(pid)) > 0"
            )
        )
    waiting = (
        line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" in line
    )
    return any("FLOCK" in line and str(os.getpid()) in line for line in waiting)


def test_more_than_one_needs_a_yes(
    queue: QueueHarness, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [queue.accept("a@example.org"), queue.accept("a@example.org")]
    refused = typed("drop", "--recipient", "a@example.org", status=2)
    assert "drop 2 deliveries (2 queued)? Add --yes" in refused.stderr
    monkeypatch.setattr(
        "commands.ops.modify.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
    )
    typed("drop", "--recipient", "a@example.org", answer="n\n", status=1)
    assert queue.states_of(ids) == ["queued", "queued"]
    assert queue.rows("SELECT * FROM audit") == []
    typed("drop", "--recipient", "a@example.org", answer="y\n")
    assert queue.states_of(ids) == ["dropped", "dropped"]


def test_operations_need_a_filter_or_all(queue: QueueHarness, typed: Typed) -> None:
    queue_id = queue.accept()
    assert "--all" in typed("drop", "--yes", status=2).stderr
    assert queue.state(queue_id) == "queued"
    assert "it applies to held deliveries" in typed("release", "--all", status=1).stderr
    assert "no message" in typed("drop", "--id", "ffffffff", status=1).stderr
    typed("hold", queue_id[-12:])
    typed("drop", "--id", queue_id[-12:])
    assert queue.state(queue_id) == "dropped"


def test_a_dry_run_shows_the_recipients_that_it_would_change(
    queue: QueueHarness, typed: Typed
) -> None:
    queue_id = queue.accept("a@example.org", "b@example.org", "bulk:c@example.org")
    done = typed("hold", "--recipient", "b@example.org", "--dry-run", "--json")
    assert [row["recipient"] for row in lines(done)] == ["a@example.org", "b@example.org"], (
        "one request carries both"
    )
    assert "would hold 1 delivery (1 queued)" in done.stderr
    assert {queue.state(queue_id), queue.state(queue_id, 2)} == {"queued"}
    assert queue.rows("SELECT * FROM audit") == []


def test_audit_has_actor_operation_and_reason(queue: QueueHarness, typed: Typed) -> None:
    queue_id = queue.accept()
    done = typed("hold", "--id", queue_id, "--reason", "it's\nspam", "--json")
    assert json.loads(done.stdout) == {
        "verb": "hold",
        "deliveries": 1,
        "were": {"queued": 1},
        "bodies_removed": 0,
    }
    (action,) = queue.rows("SELECT actor, operation, reason, filter, matched FROM audit")
    assert "@" in action["actor"]
    assert (action["operation"], action["reason"], action["matched"]) == ("hold", "it's\nspam", 1)
    assert action["filter"] == f"--id {queue_id}"
    held_by = queue.delivery(queue_id)["last_reply"]
    assert held_by == f"held by {action['actor']}: it's\\nspam"
    assert typed("why", queue_id).stdout.startswith(f"b@example.org: {held_by}. It stays")
    typed("bounce", "--id", queue_id, "--reason", "not here")
    assert queue.delivery(queue_id)["last_reply"] == "bounced by an operator: not here", (
        "the sender reads it"
    )
    deferred = one_in(queue, State.DEFERRED)
    typed("bounce", deferred, "--reason", "they moved")
    assert (
        "ago, because bounced by an operator: they moved; its DSN" in typed("why", deferred).stdout
    )


def test_the_reply_of_a_server_never_counts_as_an_operators_reason(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    generator = DsnGenerator(queue.database, spool, queue.settings, lambda address: "default")
    bounced, greylisted = queue.accept(), queue.accept("c@example.org")
    rejection = "bounced by an operator: x"
    for queue_id, outcome, reply in (
        (bounced, Outcome.REJECTED, rejection),
        (greylisted, Outcome.DEFERRED, "held by greylist for 300 seconds"),
    ):
        spool.store(queue_id, [BODY])
        queue.complete(queue.claim(queue_id)[0], outcome, reply=reply)
        assert queue.delivery(queue_id)["reason_source"] == "server"
    assert f"rejected it: {rejection}" in typed("why", bounced).stdout
    queue.change(
        "UPDATE deliveries SET expires_at = @ago(1) WHERE queue_id = @id(:id)", id=greylisted
    )
    typed("retry", greylisted)
    (claim,) = queue.claim(greylisted)
    queue.complete(claim, Outcome.DEFERRED, reply="held by greylist for 300 seconds")
    queue.pass_time(100)
    texts = [" ".join(body_in(spool.path(dsn)).decode().split()) for dsn in generator.generate(10)]
    assert len(texts) == 2
    assert sum(f"The mail server rejected it: {rejection}" in text for text in texts) == 1
    assert sum(f"Diagnostic-Code: x-qmqp; {rejection}" in text for text in texts) == 1
    assert sum("Diagnostic-Code: x-qmqp; held by greylist" in text for text in texts) == 1


def test_bodies_are_removed_when_no_delivery_needs_them(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    kept, pending, null, split = (
        queue.accept("a@example.org", "bulk:b@example.org"),
        queue.accept("a@example.org"),
        queue.accept("a@example.org", sender=""),
        queue.accept("c@example.org", "bulk:c@example.org"),
    )
    for queue_id in (kept, pending, null, split):
        spool.store(queue_id, [BODY])
    typed("drop", "--id", kept, "--recipient", "a@example.org")
    typed("bounce", "--id", pending)
    typed("bounce", "--id", null)
    assert "2 bodies" not in typed("drop", "--id", split, "--yes").stdout
    there = {name for name, _ in spool.ids()}
    assert there == {kept, pending}, "one is needed by another delivery, the other by a pending DSN"


def test_where_the_spool_is_not_mounted_bodies_stay(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    queue_id = queue.accept()
    spool.store(queue_id, [BODY])
    (spool.directory / "spool-id").write_text("f" * 32)
    assert "removed" not in typed("drop", "--id", queue_id).stdout
    assert spool.path(queue_id).exists()
    assert "not mounted" in typed("body", queue_id, status=3).stderr
    assert "not mounted" in typed("show", queue_id).stdout
    assert "not mounted" in typed("fsck", status=3).stderr


@pytest.mark.parametrize("command", ["show", "why", "headers", "body"])
def test_message_removed_while_a_command_starts_is_not_found(
    typed: Typed, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(QueueReader, "resolve", lambda _reader, _end: "f" * 32)
    assert "the message was removed a moment ago" in typed(command, "ffff", status=1).stderr


def test_rerouting(
    queue: QueueHarness, typed: Typed, monkeypatch: pytest.MonkeyPatch, spool: Spool
) -> None:
    queued, delivered = queue.accept("old:a@example.org"), one_in(queue, State.DELIVERED)
    deferred, held = (
        queue.accept("old:b@example.com", "old:c@example.org"),
        one_in(queue, State.HELD, "old:d@x.org"),
    )
    (claim,) = queue.claim(deferred, capacity={"old": 1})
    queue.complete(claim, Outcome.DEFERRED)
    routes = spool.directory / "routes.toml"
    routes.write_text('[com]\nrecipients = ["*@example.com"]\nservers = ["a"]\n')
    monkeypatch.setenv("RELAY_ROUTES", str(routes))
    typed("retry", "--reroute", "--route", "old", "--yes")
    found = {
        i: (queue.delivery(i)["route"], queue.state(i)) for i in (queued, deferred, held, delivered)
    }
    assert found == {
        queued: ("default", "queued"),
        deferred: ("old", "split"),
        held: ("default", "held"),
        delivered: ("default", "delivered"),
    }
    pieces = [queue.delivery(deferred, number) for number in (2, 3)]
    assert [(piece["route"], piece["state"]) for piece in pieces] == [
        ("com", "queued"),
        ("default", "queued"),
    ]
    assert queue.rows("SELECT operation FROM audit")[0]["operation"] == "reroute"


def test_a_limit_takes_the_oldest(
    queue: QueueHarness, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "CHUNK", 2)
    queue.insert([new_message("x@example.org", "y@example.org") for _ in range(6)])
    ids = sorted({row["queue_id"] for row in lines(typed("list", "--json"))})
    dry = typed("hold", "--all", "--limit", "3", "--dry-run", "--json")
    assert [row["queue_id"] for row in lines(dry)] == [i for i in ids[:3] for _ in range(2)]
    assert dry.stderr == "qmqp-relay: would hold the oldest 3 of 6 deliveries (6 queued)\n"
    assert "the oldest 3 of 6" in typed("hold", "--all", "--limit", "3", status=2).stderr
    for limit, held in (("3", 3), ("1", 4), ("9", 6)):
        typed("hold", "--all", "--yes", "--limit", limit)
        assert queue.states_of(ids) == ["held"] * held + ["queued"] * (6 - held)
    shown = [row["filter"] for row in queue.rows("SELECT filter FROM audit ORDER BY id")]
    assert shown == ["--limit 3", "--limit 1", "--limit 9"]


def test_pauses(queue: QueueHarness, typed: Typed) -> None:
    queue_id = queue.accept()
    assert (
        "known are route:default"
        in typed("pause", "--server", "192.0.2.7", "--reason", "disk swap").stderr
    )
    typed("pause", "--server", "192.0.2.7:628", status=1)
    assert not typed("pause", "--route", "default", "--reason", "disk swap").stderr
    assert {
        row["subject"] for row in lines(typed("stats", "--json")) if row["kind"] == "pause"
    } == {"route:default", "server:192.0.2.7:628"}
    paused = r"because route default is paused until `resume` \(by \S+@\S+ \d+s ago: disk swap\)\.$"
    assert re.search(paused, typed("why", queue_id).stdout)
    typed("resume", "--route", "default")
    again = lines(typed("resume", "--route", "default", "--json", status=1))
    assert again == [{"verb": "resume", "subject": "route:default", "done": False}]
    for wrong in ((), ("--route", "x", "--server", "y"), ("--server", "host:port")):
        typed("pause", *wrong, status=2)
    assert [row["operation"] for row in queue.rows("SELECT operation FROM audit ORDER BY id")] == [
        "pause server:192.0.2.7:628",
        "pause route:default",
        "resume route:default",
    ]
