"""The book-keeping of the fault matrix: a wrong book is found, a right one balances."""

from collections import Counter
from pathlib import Path

import pytest

from qmqp.sink import Received
from tests.faults import page
from tests.faults.books import Books, Evidence, MailStatus, SentMail, balance
from tests.faults.cases import BOTH, CASES, chosen
from tests.faults.servers import Mailbox
from tests.faults.traffic import Plan
from tests.faults.trial import TrialResult

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def sent(status: MailStatus = MailStatus.ACCEPTED, *, bounces: bool = False) -> SentMail:
    recipient = "reject.m1@example.org" if bounces else "m1@example.org"
    rejected = frozenset({recipient} if bounces else ())
    return SentMail(1, "m1@example.com", (recipient,), rejected, 100, status=status)


def evidence(
    kept: dict[str, int], uncertain: dict[str, int] | None = None, unfinished: int = 0
) -> Evidence:
    return Evidence(kept, kept, uncertain or {}, unfinished=unfinished)


@pytest.mark.parametrize("status", [MailStatus.ACCEPTED, MailStatus.UNKNOWN])
def test_one_copy_balances(status: MailStatus) -> None:
    books = balance([sent(status)], evidence({"m1@example.org": 1}))
    assert books.balanced
    assert books.accepted + books.unknown_delivered == 1


def test_accepted_mail_without_a_copy_is_lost() -> None:
    books = balance([sent()], evidence({}))
    assert (books.lost, books.balanced) == (1, False)


def test_a_copy_that_no_server_confirmed_is_lost() -> None:
    books = balance([sent()], Evidence({"m1@example.org": 1}, {}, {}))
    assert (books.lost, books.balanced) == (1, False)


def test_unknown_mail_may_have_no_copy() -> None:
    assert balance([sent(MailStatus.UNKNOWN)], evidence({})).balanced


@pytest.mark.parametrize("status", [MailStatus.REFUSED, MailStatus.UNSENT])
def test_a_copy_of_refused_mail_is_invented(status: MailStatus) -> None:
    books = balance([sent(status)], evidence({"m1@example.org": 1}))
    assert (books.invented, books.balanced) == (1, False)


def test_a_copy_for_an_unknown_address_is_invented() -> None:
    assert balance([], evidence({"m1@example.org": 1})).invented == 1


@pytest.mark.parametrize("definite", [True, False])
def test_451_to_the_final_dot_leaves_the_result_open_unless_it_is_definite(definite: bool) -> None:
    mail = sent(MailStatus.REFUSED)
    mail.reply, mail.dot_sent = "451", True
    books = balance([mail], evidence({"m1@example.org": 1}), definite_451=definite)
    assert books.balanced is not definite
    assert (books.invented, books.unknown_delivered) == (int(definite), int(not definite))


@pytest.mark.parametrize("status", [MailStatus.ACCEPTED, MailStatus.UNKNOWN])
def test_each_further_copy_needs_an_uncertain_attempt(status: MailStatus) -> None:
    kept = {"m1@example.org": 3}
    explained = balance([sent(status)], evidence(kept, {"m1@example.org": 2}))
    assert explained.balanced
    assert (explained.doubles, explained.doubles_uncertain) == (2, 2)
    assert not balance([sent(status)], evidence(kept, {"m1@example.org": 1})).balanced


def test_mail_that_bounces_needs_one_dsn() -> None:
    mail = sent(bounces=True)
    books = balance([mail], evidence({"m1@example.com": 1}))
    assert books.balanced
    assert (books.dsns, books.dsns_due) == (1, 1)
    assert balance([mail], evidence({})).lost == 1
    assert not balance([mail], evidence({"m1@example.com": 2})).balanced


def test_a_dsn_without_a_bounce_is_invented() -> None:
    books = balance([sent()], evidence({"m1@example.org": 1, "m1@example.com": 1}))
    assert books.invented == 1


def test_unfinished_deliveries_are_stuck() -> None:
    books = balance([sent()], evidence({"m1@example.org": 1}, unfinished=2))
    assert (books.stuck, books.balanced) == (2, False)


def received(plan: Plan, number: int, *, reply: bytes = b"K", content: bytes = b"") -> Mailbox:
    mailbox = Mailbox(plan)
    mail = plan.mail(number)
    recipients = tuple(address.encode() for address in mail.recipients)
    body = content or b"Received: by relay\n" + plan.body(number, mail.size)
    mailbox.add(Received(1, mail.sender.encode(), recipients, len(body), "", reply), body)
    return mailbox


def test_a_mailbox_counts_what_a_server_did_not_refuse() -> None:
    plan = Plan("seed")
    recipients = Counter(plan.mail(1).recipients)
    assert received(plan, 1).kept == received(plan, 1).replied_k == recipients
    assert received(plan, 1, reply=b"").kept == recipients
    assert not received(plan, 1, reply=b"").replied_k
    for refusal in (b"Zbusy", b"Dno"):
        assert not received(plan, 1, reply=refusal).kept


def test_a_mailbox_finds_altered_bytes() -> None:
    plan = Plan("seed")
    assert not received(plan, 5).altered
    cut_off = plan.body(5, plan.mail(5).size)[:-1]
    assert received(plan, 5, content=cut_off).altered == {5}


def test_a_plan_has_every_kind_of_mail() -> None:
    mails = list(map(Plan("seed").mail, range(1, 200)))
    assert {len(mail.recipients) for mail in mails} == {1, 2}
    assert {"", "busy", "second", "reject", "bad"} <= {
        address.rpartition(".m")[0] for mail in mails for address in mail.recipients
    } | {""}
    assert any(mail.bounces and not mail.sender for mail in mails)
    assert any(mail.bounces and mail.delivered_to for mail in mails)
    assert max(mail.size for mail in mails) > 64 * 1024 > min(mail.size for mail in mails)


def test_the_page_has_each_fault_and_what_clients_may_hear() -> None:
    text = PAGE.read_text().split("\n## The faults\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    on_page = {row[0]: row[2].strip("| ") if len(row) > 2 else "" for row in rows[1:]}
    assert on_page == {case.name: ", ".join(sorted(case.hears)) for case in CASES}
    assert len(on_page) == len(CASES)


def test_the_quick_matrix_is_a_part_of_the_whole() -> None:
    whole = {(case.name, database) for case, database in chosen(full=True)}
    quick = {(case.name, database) for case, database in chosen(full=False)}
    assert quick < whole
    assert {database for _, database in quick} == set(BOTH)


def test_the_table_goes_between_the_markers(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- faults: begin -->\nold\n<!-- faults: end -->\nafter\n")
    failed = TrialResult("worker killed", "sqlite", "seed", Books(accepted=7), problems=["lost"])
    skipped = TrialResult("power cut", "postgresql", "seed", not_run="only root can mount a disk")
    page.write("faults", page.report({"command": "`make faults`"}, [failed, skipped]), file)
    text = file.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "- command: `make faults`" in text
    assert "| worker killed | SQLite | 7 |" in text
    assert "| FAILED |" in text
    assert "not run: only root can mount a disk" in text
    assert TrialResult.from_json(failed.to_json()) == failed
    with pytest.raises(ValueError, match="markers"):
        page.write("endure", "", file)
