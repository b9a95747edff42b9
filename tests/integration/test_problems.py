"""`qmqp-relay problems`: each problem is found when it is there, and a healthy queue has none."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from relay.queue.operations import OPERATIONS, QueueOperations
from relay.queue.outcome import Outcome
from relay.report.filters import Filter
from relay.report.problems import KINDS, LEAST_FAILURES, disk, journal
from relay.spool.store import Spool
from tests.certificates import Authority
from tests.integration.harness import QueueHarness, new_message
from tests.integration.test_spooler import SpoolerHarness
from tests.integration.typed import Typed, lines, typed_at
from tests.services import free_port

ROUTES = {"default": ["a:628", "b:628"], "bulk": ["c:628"]}


@pytest.fixture
def typed(queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Typed:
    monkeypatch.setattr("relay.report.problems.MIN_FREE_BYTES", 0)
    monkeypatch.setattr("relay.report.problems.MIN_FREE_PART", 0)
    queue.rescuer.publish_routes(queue.worker, ROUTES)
    return typed_at(queue, spool, monkeypatch)


def found(typed: Typed) -> list[dict[str, Any]]:
    result = typed("problems", "--json", status=None)
    rows = lines(result)
    assert result.exit_code == (1 if rows else 0)
    for row in rows:
        assert list(row) == ["kind", "subject", "since", "count", "text", "next"]
        assert row["next"].startswith(("qmqp-relay ", "df -h "))
    return rows


def brief(typed: Typed) -> list[tuple[str, str, int]]:
    return [(row["kind"], row["subject"], row["count"]) for row in found(typed)]


def many(queue: QueueHarness, count: int, **more: Any) -> list[str]:
    messages = [new_message("x@leap.example", **more) for _ in range(count)]
    queue.insert(messages)
    return [message.id for message in messages]


def test_healthy_queue_has_no_problem(queue: QueueHarness, typed: Typed) -> None:
    assert typed("problems").stderr == "qmqp-relay: no problem found\n"
    for outcome in (Outcome.DELIVERED, Outcome.DEFERRED, Outcome.REJECTED):
        queue.complete(queue.claim(queue.accept())[0], outcome)
    queue.change("UPDATE deliveries SET expires_at = @later(86400)")
    queue.accept()
    queue.change("UPDATE deliveries SET expires_at = @later(86400)")
    assert found(typed) == []
    line = typed("problems", "--nagios").stdout
    assert line.startswith("QMQP-RELAY OK - no problem found | problems=0 waiting=2 server_down=0 ")


def test_server_that_is_down_is_named_with_what_it_blocks(
    queue: QueueHarness, typed: Typed
) -> None:
    ids = [queue.accept("bulk:x@example.org") for _ in range(3)]
    queue.change("UPDATE deliveries SET expires_at = @later(86400)")
    queue.rescuer.publish_open_circuits(queue.worker, {"c:628": "connect: refused"})
    queue.change("UPDATE open_circuits SET since = @ago(7200)")
    queue.pass_time(600, only=ids)
    (row,) = found(typed)
    assert (row["kind"], row["subject"], row["count"]) == ("server_down", "c:628", 3)
    assert "connect: refused" in row["text"]
    assert row["next"] == "qmqp-relay probe c:628"
    (since,) = queue.rows("SELECT @when(since) AS at FROM open_circuits")
    assert row["since"][:19].replace("T", " ") == str(since["at"])[:19]
    assert typed("problems", "--nagios", status=2).stdout.startswith(
        "QMQP-RELAY CRITICAL - server_down c:628 3 deliveries wait for it, which says: connect:"
    )
    QueueOperations(queue.database, sends_dsns=True).pause("server:c:628", actor="ann", reason="")
    assert found(typed) == [], "somebody wants that"


def test_mail_that_no_worker_claims_is_a_problem(queue: QueueHarness, typed: Typed) -> None:
    ids = [queue.accept(), queue.accept("bulk:x@example.org")]
    queue.change("UPDATE deliveries SET expires_at = @later(86400)")
    assert found(typed) == []
    queue.pass_time(600, only=ids)
    assert brief(typed) == [("not_claimed", "route:bulk", 1), ("not_claimed", "route:default", 1)]
    QueueOperations(queue.database, sends_dsns=True).pause("route:bulk", actor="ann", reason="")
    assert brief(typed) == [("not_claimed", "route:default", 1)]
    queue.claim(queue.accept())
    queue.change("UPDATE deliveries SET expires_at = @later(86400)")
    assert found(typed) == [], "workers are busy"


def test_due_mail_that_no_sweeper_requeues_is_a_problem(queue: QueueHarness, typed: Typed) -> None:
    queue_id = queue.accept()
    queue.complete(queue.claim(queue_id)[0], Outcome.DEFERRED)
    queue.pass_time(600, only=[queue_id])
    queue.change("UPDATE deliveries SET expires_at = @later(86400)")
    assert brief(typed) == [("overdue", "route:default", 1)]


def test_no_worker_is_a_problem(queue: QueueHarness, typed: Typed) -> None:
    queue.accept()
    queue.change("UPDATE deliveries SET expires_at = @later(86400)")
    queue.worker_queue.retire(queue.worker)
    (row,) = found(typed)
    assert (row["kind"], row["count"], row["next"]) == ("no_worker", 1, "qmqp-relay check")
    assert row["since"] is not None


def test_what_the_relay_held_is_a_problem_for_a_day(queue: QueueHarness, typed: Typed) -> None:
    held = queue.accept()
    queue.complete(queue.claim(held)[0], Outcome.UNSENDABLE)
    operations = QueueOperations(queue.database, sends_dsns=True)
    operations.apply(OPERATIONS["hold"], Filter(id=queue.accept()), actor="ann", reason="")
    assert brief(typed) == [("held", "", 1)]
    assert typed("problems", "--nagios", status=1).stdout.startswith("QMQP-RELAY WARNING - held 1")
    queue.change("UPDATE attempts SET finished_at = @ago(90000)")
    assert found(typed) == []


def test_what_was_held_when_it_was_accepted_is_a_problem(queue: QueueHarness, typed: Typed) -> None:
    queue.accept(hold_reason="a plugin found it odd")
    assert brief(typed) == [("held", "", 1)]
    queue.change("UPDATE messages SET received_at = @ago(90000)")
    assert found(typed) == []


def test_uncertain_deliveries_are_a_problem_for_a_day(queue: QueueHarness, typed: Typed) -> None:
    queue_id = queue.accept()
    for _ in range(2):
        queue.complete(queue.claim(queue_id)[0], Outcome.UNCERTAIN)
        queue.pass_time(60, only=[queue_id])
        queue.rescuer.requeue_due(9)
    queue.change("UPDATE deliveries SET expires_at = @later(86400)")
    assert brief(typed) == [("uncertain", "", 1)]
    queue.change("UPDATE attempts SET finished_at = @ago(90000)")
    assert found(typed) == []


def test_mail_that_expires_soon_is_a_problem(queue: QueueHarness, typed: Typed) -> None:
    queue.accept()
    queue.change("UPDATE deliveries SET expires_at = @later(5.9 * 3600)")
    assert brief(typed) == [("expiring", "", 1)]
    queue.change("UPDATE deliveries SET expires_at = @later(6.1 * 3600)")
    assert found(typed) == []


def test_pause_is_a_problem_after_a_day(queue: QueueHarness, typed: Typed) -> None:
    operations = QueueOperations(queue.database, sends_dsns=True)
    operations.pause("server:c:628", actor="ann@host", reason="ticket 812")
    assert found(typed) == []
    queue.change("UPDATE pauses SET since = @ago(86401)")
    (row,) = found(typed)
    assert (row["kind"], row["subject"]) == ("paused_long", "server:c:628")
    assert "ann@host: ticket 812" in row["text"]
    assert row["next"] == "qmqp-relay resume --server c:628"


def test_failures_that_leap_against_the_last_week_are_a_problem(
    queue: QueueHarness, typed: Typed
) -> None:
    before, now = (
        many(queue, LEAST_FAILURES),
        many(queue, 2 * LEAST_FAILURES, sender="news@x.example"),
    )
    for claim in queue.claim(*before, *now):
        queue.complete(claim, Outcome.DEFERRED)
    queue.change("UPDATE deliveries SET expires_at = @later(86400)")
    for queue_id in before:
        queue.change(
            "UPDATE attempts SET finished_at = @ago(86400) WHERE queue_id = @id(:id)", id=queue_id
        )
    assert brief(typed) == [("failures", "sender:news@x.example", 40)], "twice as many are no leap"
    (extra,) = many(queue, 1, sender="news@x.example")
    queue.complete(queue.claim(extra)[0], Outcome.REJECTED)
    queue.change("UPDATE deliveries SET expires_at = @later(86400)")
    rows = found(typed)
    assert {row["subject"] for row in rows} == {
        "sender:news@x.example",
        "domain:leap.example",
        "route:default",
    }
    assert {row["count"] for row in rows} == {41}
    (domain,) = [row for row in rows if row["subject"] == "domain:leap.example"]
    assert "at most 20 in any other hour" in domain["text"]
    arguments = domain["next"].split()[1:]
    assert typed(*arguments).stdout, "the next command shows something"


def test_few_failures_are_no_leap(queue: QueueHarness, typed: Typed) -> None:
    for claim in queue.claim(*many(queue, LEAST_FAILURES - 1)):
        queue.complete(claim, Outcome.DEFERRED)
    queue.change("UPDATE deliveries SET expires_at = @later(86400)")
    assert found(typed) == []


def test_a_journal_whose_rows_are_late_is_a_problem(
    queue: QueueHarness, typed: Typed, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with capture_logs():  # the spooler logs in this process, whose output the commands share
        spooler = SpoolerHarness(queue, spool)
        try:
            spooler.acceptor.fault = OperationalError("COMMIT", {}, ConnectionResetError())
            for request in [spooler.request(), spooler.request()]:
                assert spooler.result(request) is None
            monkeypatch.setattr("relay.report.problems.SLACK", 3600.0)
            assert found(typed) == [], "rows may be late for a while"
            monkeypatch.setattr("relay.report.problems.SLACK", 0.0)
            assert brief(typed) == [("journal", "", 2)]
            (row,) = found(typed)
            assert row["text"].startswith("2 accepted messages have no rows yet, the oldest for ")
            assert row["next"] == "qmqp-relay check"
            spooler.acceptor.fault = None
        finally:
            spooler.finish()
    assert "journal" not in {kind for kind, _, _ in brief(typed)}, "the spooler has made the rows"


def test_full_disk_is_a_problem(
    queue: QueueHarness, typed: Typed, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.report.problems.MIN_FREE_BYTES", 1 << 80)
    (row,) = found(typed)
    assert (row["kind"], row["subject"]) == ("disk", str(spool.directory))
    assert row["next"] == f"df -h {spool.directory}"
    monkeypatch.setattr("relay.report.problems.MIN_FREE_BYTES", 1e9)
    monkeypatch.setattr("relay.report.problems.MIN_FREE_PART", 0.05)
    assert [list(journal(0, 0.0)), list(journal(5, 30.0))] == [[], []]
    assert [problem.count for problem in journal(5, 90.0)] == [5]
    assert list(disk("/x", 60_000_000_000, 1_000_000_000_000)) == []
    assert len(list(disk("/x", 40_000_000_000, 1_000_000_000_000))) == 1
    assert len(list(disk("/x", 900_000_000, 2_000_000_000))) == 1


def test_certificate_that_ends_or_cannot_be_used_is_a_problem(
    typed: Typed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.sign("relay.example", days=15).write(tmp_path / "tls")
    monkeypatch.setenv("RELAY_TLS_CERTIFICATE", str(certificate))
    monkeypatch.setenv("RELAY_TLS_KEY", str(key))
    assert found(typed) == []
    authority.sign("relay.example", days=13.5).write(tmp_path / "tls")
    assert brief(typed) == [("certificate_ends", str(certificate), 13)]
    assert typed("problems", "--nagios", status=1).stdout.startswith(
        f"QMQP-RELAY WARNING - certificate_ends {certificate} the certificate ends in 1"
    )
    authority.sign("relay.example", days=-1).write(tmp_path / "tls")
    (row,) = found(typed)
    assert (row["kind"], row["count"]) == ("certificate", 0)
    ended = datetime.now(UTC) - datetime.fromisoformat(row["since"])
    assert timedelta(days=1) <= ended < timedelta(days=1, minutes=5)
    old_key = key.read_bytes()
    authority.sign("relay.example").write(tmp_path / "tls")
    key.write_bytes(old_key)
    (row,) = found(typed)
    assert (row["kind"], row["since"]) == ("certificate", None)
    assert "the key does not belong to the certificate; processes that run keep" in row["text"]
    assert typed("problems", "--nagios", status=2).stdout.startswith("QMQP-RELAY CRITICAL - ")
    certificate.unlink()
    (row,) = found(typed)
    assert "No such file" in row["text"]


def test_most_urgent_problem_comes_first(queue: QueueHarness, typed: Typed) -> None:
    queue.complete(queue.claim(queue.accept())[0], Outcome.UNSENDABLE)
    queue.rescuer.publish_open_circuits(queue.worker, {"c:628": "bad | worse"})
    queue.accept()
    kinds = [row["kind"] for row in found(typed)]
    assert kinds == sorted(kinds, key=lambda kind: [*KINDS].index(kind))
    assert kinds == ["server_down", "held", "expiring"]
    line = typed("problems", "--nagios", status=2).stdout
    assert re.fullmatch(r"QMQP-RELAY CRITICAL - [^|]* \| [a-z_]+=\d+( [a-z_]+=\d+)*\n", line)
    assert "problems=3 waiting=1 server_down=1" in line
    table = typed("problems", "--format", "table", status=1).stdout.splitlines()
    assert table[0].split() == ["PROBLEM", "SUBJECT", "SINCE", "COUNT", "TEXT"]
    assert table[1].endswith("Next: qmqp-relay probe c:628")


def test_database_out_of_reach_is_unknown_to_nagios(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"postgresql://relay:secret@127.0.0.1:{free_port()}/relay"
    monkeypatch.setenv("RELAY_DATABASE_URL", url)
    line = typed("problems", "--nagios", status=3).stdout
    assert line.startswith("QMQP-RELAY UNKNOWN - database: ")
    assert "secret" not in line
    assert typed("problems", status=3).stdout == ""
