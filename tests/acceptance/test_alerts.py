"""The alert rules: promtool accepts them, and they speak of metrics that there are."""

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


def test_promtool_accepts_the_rules():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on PATH (Debian: package prometheus)")
    said = subprocess.run([promtool, "check", "rules", RULES], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "SUCCESS" in said.stdout


def test_rules_name_metrics_that_exist(sqlite_url: str, tmp_path: Path):
    engine = database.connect(sqlite_url)
    queue = CollectorRegistry()
    queue.register(Queue(engine, Spool(tmp_path), lambda: {"fresh": 0.0}))
    found = {metric.name for registry in (REGISTRY, queue) for metric in registry.collect()}
    engine.dispose()
    named = set(re.findall(r"\brelay_[a-z_]+", "".join(re.findall(r"expr: (.+)", RULES.read_text()))))
    assert named
    assert {re.sub("_(total|bucket)$", "", name) for name in named} <= found
