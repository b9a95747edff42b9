"""The alert rules: promtool accepts them, they speak of metrics that there are, and docs/operate.md lists both."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry

from relay import database
from relay.bodies import Spool
from relay.metrics import Queue

RULES = Path(__file__).parents[2] / "docs" / "alerts.yml"
TEXT, GUIDE = RULES.read_text(), RULES.with_name("operate.md").read_text()
# The first refusal that a worker meets is the birth of its series.
FIRST_REFUSAL = f"""
rule_files: [{RULES}]
tests:
  - interval: 1m
    input_series:
      - series: relay_server_rests_total{{server="mx:628", why="refuses us"}}
        values: _x30 1x60
    promql_expr_test:
      - expr: count(ALERTS{{alertname="RelayServerDoesNotWantUs"}})
        eval_time: 31m
        exp_samples: [{{value: 1}}]
      - expr: count(ALERTS{{alertname="RelayServerDoesNotWantUs"}})
        eval_time: 60m
        exp_samples: []
"""


def promtool(*words: str | Path) -> str:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool on PATH (Debian: package prometheus)")
    said = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    return said.stdout


def test_promtool_accepts_the_rules():
    assert "SUCCESS" in promtool("check", "rules", RULES)


def test_the_first_refusal_of_us_alerts(tmp_path: Path):
    (tmp_path / "test.yml").write_text(FIRST_REFUSAL)
    promtool("test", "rules", tmp_path / "test.yml")


def test_the_guide_says_what_to_do_for_every_alert():
    assert [alert for alert in re.findall(r"alert: (\w+)", TEXT) if alert not in GUIDE] == []


def test_rules_and_guide_name_metrics_that_exist(sqlite_url: str, tmp_path: Path):
    engine = database.connect(sqlite_url)
    queue = CollectorRegistry()
    queue.register(Queue(engine, Spool(tmp_path), lambda: {"fresh": 0.0}))
    found = {metric.name for registry in (REGISTRY, queue) for metric in registry.collect()}
    engine.dispose()
    named, listed = (
        {re.sub("_(total|bucket)$", "", name) for name in re.findall(r"\brelay_[a-z_]+", words)}
        for words in (TEXT, "".join(re.findall(r"^\| `relay_.*?\|", GUIDE, re.MULTILINE)))
    )
    assert named <= found
    assert listed == {name for name in found if name.startswith("relay_")}
