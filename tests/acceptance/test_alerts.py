"""The alert rules: promtool accepts them, their metrics exist, and docs/operate.md lists both."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry

from relay.db import engine as database
from relay.metrics import QueueMetrics
from relay.spool.store import Spool

RULES = Path(__file__).parents[2] / "docs" / "alerts.yml"
TEXT, GUIDE = RULES.read_text(), RULES.with_name("operate.md").read_text()
CONFIGURATION = re.findall(r"```yaml\n(rule_files:.*?)```", GUIDE, re.DOTALL)
# By alert: series as promtool writes them, a sample a minute; the minutes when it fires, and when
# it does not (yet).
type Case = tuple[str, dict[str, str], list[int], list[int]]
OVERDUE, SENDING, PAUSED = (
    'relay_overdue{state="queued"}',
    'relay_deliveries{state="sending"}',
    'relay_paused_seconds{subject="a"}',
)
DAYS = 'relay_tls_certificate_days{file="a"}'
ROOM, UP = "relay_spool_free_bytes", "relay_database_up"
HOOK = 'relay_hook_calls_total{plugin="a",hook="rcpt",answer="%s"}'
RESTS, ACCEPT = (
    'relay_circuit_opened_total{server="mx:628", why="%s"}',
    'relay_accept_seconds_bucket{le="%s"}',
)
JOURNAL = {
    "relay_journal_live_bytes": "1e6x120",
    "relay_journal_segments": "60x120",
    "relay_journal_sealed_segments": "30x120",
}
CASES: list[Case] = [
    ("RelayMailIsLate", {'relay_oldest_age_seconds{state="deferred"}': "3500+60x60"}, [10], [5]),
    ("RelayMailIsLate", {'relay_oldest_age_seconds{state="bounced"}': "90000x60"}, [], [30]),
    ("RelayMailIsVeryLate", {'relay_oldest_age_seconds{state="queued"}': "43000+60x60"}, [5], [3]),
    ("RelayOverdue", {'relay_overdue{state="deferred"}': "0x5 3x20"}, [12], [8]),
    ("RelayOverdue", {OVERDUE: "3x20"}, [], [12]),
    ("RelayQueueIsNotTaken", {OVERDUE: "3x20", SENDING: "0x20"}, [6], [4]),
    # A pause of something else hides nothing.
    ("RelayQueueIsNotTaken", {OVERDUE: "3x20", SENDING: "0x20", PAUSED: "1x20"}, [6], [4]),
    ("RelayPausedLong", {PAUSED: "86300+60x20"}, [4], [1]),
    # smtpd alone is scraped, and has no transfers of its own.
    (
        "RelayQueueIsNotTaken",
        {OVERDUE: "3x20", SENDING: "2x20", "relay_transfers_open": "0x20"},
        [],
        [6],
    ),
    (
        "RelayQueueIsNotTaken",
        {OVERDUE: "3x20", SENDING: "0x20", "relay_transfers_open": "0x20"},
        [6],
        [],
    ),
    ("RelayHasNoWorkers", {"relay_workers_alive": "2x5 0x20"}, [9], [7]),
    ("RelayUncertain", {"relay_uncertain_attempts": "0x5 1x20"}, [8], [6]),
    ("RelayHeld", {'relay_deliveries{state="held"}': "0x5 1x30"}, [22], [20]),
    ("RelaySpoolIsFull", {ROOM + '{job="a"}': "5e9x20", ROOM + '{job="b"}': "9e8x20"}, [2], [0]),
    ("RelayDatabaseIsAway", {UP + '{job="a"}': "1x20", UP + '{job="b"}': "1x5 0x15"}, [8], [6]),
    ("RelayJournalLag", {"relay_journal_lag_seconds": "0x5 61+60x20"}, [8], [5]),
    ("RelayDatabaseOlder", {"relay_database_older": "0x5 1x20"}, [8], [5]),
    # 30 segments are in use, and little is needed.
    ("RelayJournalDisk", {**JOURNAL, "relay_journal_disk_bytes": "9e8x120"}, [62], [58]),
    ("RelayJournalDisk", {**JOURNAL, "relay_journal_disk_bytes": "7e8x120"}, [], [62]),
    ("RelayJournalDamaged", {"relay_journal_damages_total": "0x5 1x90"}, [7], [5, 80]),
    ("RelayBodyDamaged", {"relay_bodies_damaged_total": "0x5 1x90"}, [7], [5, 80]),
    (
        "RelayEventsAreLate",
        {'relay_notification_lag_seconds{subscription="a"}': "0x5 590+60x20"},
        [13],
        [9],
    ),
    (
        "RelayWebhookIsDisabled",
        {'relay_subscription_disabled{subscription="a"}': "0x5 1x9"},
        [7],
        [4],
    ),
    # The series of a hook begins with its first failure.
    ("RelayHookFails", {HOOK % "failed": "_x30 1x60"}, [31], [29, 60]),
    ("RelayHookFails", {HOOK % "late": "0x5 1x40"}, [7, 19], [5, 25]),
    ("RelayHookFails", {HOOK % "denysoft": "0+9x40"}, [], [10]),
    ("RelayTargetsDown", {UP: "1x5 stale"}, [9], [7]),
    (
        "RelayPasswordsAreTried",
        {'relay_authentications_total{result="failed"}': "0+10x30"},
        [10],
        [3],
    ),
    (
        "RelayPasswordsAreTried",
        {'relay_authentications_total{result="accepted"}': "0+99x30"},
        [],
        [10],
    ),
    ("RelaySpoolerRestarted", {"relay_spooler_restarts_total": "0x5 1x40"}, [7, 19], [5, 25]),
    (
        "RelayBrokerListGrows",
        {'relay_broker_list_length{queue="fresh"}': "150x5 151x20"},
        [12],
        [10],
    ),
    ("RelayCircuitOpen", {RESTS % "failing": "0x5 1+1x40"}, [12], [7]),
    (
        "RelayCircuitOpen",
        {'relay_connection_probes_total{server="mx:628"}': "0x5 20+20x40"},
        [12],
        [5],
    ),
    # The series of a worker begins with its first refusal.
    ("RelayUnauthorized", {RESTS % "unauthorized": "_x30 1x60"}, [31], [29, 60]),
    ("RelayCertificateEnds", {DAYS: "15x60 13x120"}, [122], [60, 119]),
    ("RelayCertificateRejected", {'relay_tls_certificate_rejected{file="a"}': "0x5 1x9"}, [7], [5]),
    (
        "RelaySlowToAccept",
        {ACCEPT % "10": "0+9x60", ACCEPT % "30": "0+10x60", ACCEPT % "+Inf": "0+10x60"},
        [12],
        [5],
    ),
    ("RelaySlowToAccept", {ACCEPT % "0.1": "0+9x60", ACCEPT % "+Inf": "0+9x60"}, [], [30]),
]


def promtool(*arguments: str | Path) -> str:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool on PATH (Debian: package prometheus)")
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_promtool_accepts_the_rules():
    assert "SUCCESS" in promtool("check", "rules", RULES)


@pytest.mark.parametrize("case", CASES, ids=[f"{n}-{case[0]}" for n, case in enumerate(CASES)])
def test_an_alert_fires_only_when_it_should(case: Case, tmp_path: Path):
    alert, series, fires, silent = case
    firing = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})'
    expected = [(minute, [{"value": 1}]) for minute in fires] + [(minute, []) for minute in silent]
    cases = {
        "rule_files": [str(RULES)],
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": name, "values": values} for name, values in series.items()
                ],
                "promql_expr_test": [
                    {"expr": firing, "eval_time": f"{minute}m", "exp_samples": samples}
                    for minute, samples in expected
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(json.dumps(cases))  # YAML, too
    promtool("test", "rules", tmp_path / "test.yml")


def test_every_alert_has_a_case_in_which_it_fires():
    assert sorted({alert for alert, _, fires, _ in CASES if fires}) == sorted(
        re.findall(r"alert: (\w+)", TEXT)
    )


def test_promtool_accepts_the_scrape_configuration_of_the_guide(tmp_path: Path):
    (configuration,) = CONFIGURATION
    (tmp_path / "alerts.yml").write_text(TEXT)
    (tmp_path / "prometheus.yml").write_text(configuration)
    assert "SUCCESS" in promtool("check", "config", tmp_path / "prometheus.yml")


def test_the_guide_has_a_remedy_for_every_alert():
    assert [alert for alert in re.findall(r"alert: (\w+)", TEXT) if alert not in GUIDE] == []


def test_rules_and_guide_name_metrics_that_exist(sqlite_url: str, tmp_path: Path):
    engine = database.connect(sqlite_url)
    queue = CollectorRegistry()
    queue.register(QueueMetrics(engine, Spool(tmp_path), lambda: {"fresh": 0.0}))
    found = {metric.name for registry in (REGISTRY, queue) for metric in registry.collect()}
    engine.dispose()
    named, listed = (
        {re.sub("_(total|bucket)$", "", name) for name in re.findall(r"\brelay_[a-z_]+", part)}
        for part in (TEXT, "".join(re.findall(r"^\| `relay_.*?\|", GUIDE, re.MULTILINE)))
    )
    assert named <= found
    assert listed == {name for name in found if name.startswith("relay_")}
