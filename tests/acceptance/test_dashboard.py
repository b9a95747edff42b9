"""The Grafana dashboard: a real Prometheus scrapes a real relay and answers each of its queries.

The relay has a server that works, one that refuses connections, a pause, a refusal and a plugin, so
that no query is empty.
"""

import json
import re
import shutil
import signal
import smtplib
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from qmqp.sink import MagicRecipients, running_sink
from tests.acceptance.stack import StartUp, command
from tests.services import end, free_port, spawn
from tests.waiting import until

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "qmqp-relay.json"
PLUGIN = """
from qmqp_relay import hookimpl

@hookimpl
async def rcpt():
    pass

@hookimpl
async def event():
    pass
"""
GUIDE = Path(__file__).parents[2] / "docs" / "operate.md"


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if "targets" in panel]


def queries() -> list[str]:
    """Every query, with an interval that a test of seconds has samples for."""
    return [
        target["expr"].replace("$__rate_interval", "1m")
        for panel in panels()
        for target in panel["targets"]
    ]


def ask(port: int, query: str) -> list[dict[str, Any]]:
    url = f"http://127.0.0.1:{port}/api/v1/query?{urlencode({'query': query})}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        reply = json.load(answer)
    assert reply["status"] == "success", query
    result: list[dict[str, Any]] = reply["data"]["result"]
    return result


def test_each_query_has_an_answer(start_up: StartUp, tmp_path: Path) -> None:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus on PATH (Debian: package prometheus)")
    metrics, port, dead = [free_port(), free_port()], free_port(), free_port()
    (tmp_path / "routes.toml").write_text(
        f'[dead]\nrecipients = ["dead.example"]\nservers = ["127.0.0.1:{dead}"]\n'
    )
    (tmp_path / "watcher.py").write_text(PLUGIN)
    listen = " ".join(f"127.0.0.1:{one}" for one in metrics)
    targets = [f"127.0.0.1:{one}" for one in metrics]
    job = {"job_name": "relay", "scrape_interval": "1s", "static_configs": [{"targets": targets}]}
    (tmp_path / "prometheus.yml").write_text(json.dumps({"scrape_configs": [job]}))  # YAML, too
    with running_sink(MagicRecipients()) as sink:
        up = start_up(
            METRICS_LISTEN=listen,
            QMQP_SERVERS=f"127.0.0.1:{sink.port}",
            ROUTES=str(tmp_path / "routes.toml"),
            RECIPIENT_DOMAINS="",
            PLUGINS=str(tmp_path / "watcher.py"),
        )
        with (tmp_path / "prometheus.log").open("wb") as log:
            prometheus = spawn(
                [
                    program,
                    f"--config.file={tmp_path / 'prometheus.yml'}",
                    f"--storage.tsdb.path={tmp_path / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=log,
            )
        try:
            assert command("pause", "--route", "idle", **up.settings).returncode == 0
            unanswered = set(queries())

            def answered() -> bool:
                traffic(up.port)
                try:
                    unanswered.difference_update([q for q in unanswered if ask(port, q)])
                except OSError:
                    return False  # it is starting
                return not unanswered

            until(answered, 90.0, what=lambda: f"answers to {sorted(unanswered)}")
        finally:
            end(prometheus, signal.SIGTERM)


def traffic(port: int) -> None:
    """Mail that is delivered, deferred, rejected and unreachable, and a command that is refused."""
    with smtplib.SMTP("127.0.0.1", port, timeout=30) as client:
        for recipient in (
            "x@example.org",
            "defer-9@example.org",
            "reject@example.org",
            "x@dead.example",
        ):
            client.sendmail("me@example.com", [recipient], "Subject: x\n\nHello.\n")
        assert client.docmd("NONSENSE")[0] >= 500


def test_each_metric_of_the_dashboard_is_in_the_guide() -> None:
    listed = set(re.findall(r"`(relay_\w+)`", GUIDE.read_text()))
    named = set(re.findall(r"relay_\w+", " ".join(queries())))
    assert {re.sub("_(bucket|count|sum)$", "", name) for name in named} <= listed


def test_panels_do_not_overlap_and_have_different_names() -> None:
    places: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & places, panel["title"]
        assert max(x for x, _ in cells) < 24
        places |= cells
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles)
    assert all(
        target["legendFormat"] or panel["type"] == "stat"
        for panel in panels()
        for target in panel["targets"]
    )
