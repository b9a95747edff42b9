"""Metrics: labels are bounded, a scrape is answered in every outage, and the first free address is
used."""

import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from relay import metrics, metrics_server
from relay.db import engine as database
from relay.metrics import QueueMetrics, serve
from relay.settings import Settings
from relay.spool.store import Spool
from relay.tls import CertificatePair
from tests.certificates import Authority
from tests.waiting import until


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def scraped(collector: QueueMetrics) -> str:
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("554 5.7.1 Relay access denied", "554 5.7.1"),
        ("550 5.6.11 Message contains a bare CR or LF", "550 5.6.11"),
        ("502 What the client sent", "502"),
        ("421", "421"),
    ],
)
def test_refusal_is_counted_by_its_codes(reply: str, label: str):
    before = sample("relay_refusals_total", door="smtp", reply=label)
    metrics.refused(reply, "smtp")
    assert sample("relay_refusals_total", door="smtp", reply=label) == before + 1


def test_children_are_bound_once():
    assert metrics.attempts("mx:628", "delivered") is metrics.attempts("mx:628", "delivered")
    assert metrics.group_commit("accept") is metrics.group_commit("accept")


def test_group_commit_is_observed_by_size_and_seconds():
    metrics.group_commit("test")(7, 0.25)
    assert sample("relay_group_commit_size_sum", writer="test") == 7
    assert sample("relay_group_commit_seconds_sum", writer="test") == 0.25


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[QueueMetrics]:
    """Metrics of a database without tables."""
    engine = database.connect(f"sqlite:///{tmp_path}/empty.db")
    yield QueueMetrics(engine, Spool(tmp_path))
    engine.dispose()


def test_failing_database_leaves_the_other_parts(queue: QueueMetrics):
    text = scraped(queue)
    assert "relay_database_up 0.0" in text
    assert "relay_spool_free_bytes" in text
    assert "relay_deliveries" not in text


def test_missing_spool_leaves_the_other_parts(tmp_path: Path):
    engine = database.connect(f"sqlite:///{tmp_path}/empty.db")
    text = scraped(QueueMetrics(engine, Spool(tmp_path / "gone")))
    engine.dispose()
    assert "relay_spool_free_bytes" not in text
    assert "relay_database_up" in text


def test_silent_database_delays_no_scrape(queue: QueueMetrics, monkeypatch: pytest.MonkeyPatch):
    collected, go_on = [], threading.Event()

    def silent() -> list[Metric]:
        collected.append(1)
        go_on.wait(30)
        return [GaugeMetricFamily("relay_database_up", "", 1)]

    monkeypatch.setattr(metrics, "SCRAPE_TIMEOUT", 0.05)
    monkeypatch.setattr(queue, "_database", silent)
    assert "relay_database_up 0.0" in scraped(queue)
    assert "relay_database_up 0.0" in scraped(queue)
    assert len(collected) == 1, "one collection at a time"
    go_on.set()
    monkeypatch.setattr(metrics, "SCRAPE_TIMEOUT", 10.0)
    assert "relay_database_up 1.0" in scraped(queue), "what came late is there for the next"
    assert len(collected) == 1, "its result counts for a while"


def test_metrics_are_off_by_default():
    before = threading.active_count()
    serve(Settings())()
    assert threading.active_count() == before


def test_metrics_are_served_on_the_first_free_address(queue: QueueMetrics, free_port):
    first, second = free_port(), free_port()
    settings = Settings(metrics_listen=(("127.0.0.1", first), ("127.0.0.1", second)))
    stop_first, stop_second = serve(settings, queue), serve(settings)
    try:
        for port in (first, second):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                assert b"relay_accept_seconds_count" in answer.read()
        serve(settings)()  # none left: a warning, and mail goes on
    finally:
        stop_first()
        stop_second()
    serve(settings, queue)()  # both can be had again


def test_metrics_beyond_loopback_are_served_over_tls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_port
):
    authority = Authority(tmp_path)
    certificate, key = authority.sign("127.0.0.1").write(tmp_path / "tls")
    port = free_port()
    settings = Settings(
        metrics_listen=(("127.0.0.1", port),), tls_certificate=certificate, tls_key=key
    )
    pair = CertificatePair(settings)
    monkeypatch.setattr(metrics, "is_loopback", lambda _host: False)
    monkeypatch.setattr(metrics_server, "TIMEOUT", 1.0)
    before = threading.active_count()
    stop = serve(settings, tls_context=lambda: pair.context)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as silent:
            url = f"https://127.0.0.1:{port}/metrics"
            with urllib.request.urlopen(url, context=authority.client_context()) as answer:
                assert b"relay_accept_seconds_count" in answer.read()
            with pytest.raises(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics")
            assert silent.recv(1) == b"", "a handshake has the time of a request"
        until(lambda: threading.active_count() == before + 1)
    finally:
        stop()


def test_unfinished_requests_are_bounded_and_closed(monkeypatch: pytest.MonkeyPatch, free_port):
    monkeypatch.setattr(metrics_server, "TIMEOUT", 3.0)
    before, port = threading.active_count(), free_port()
    stop = serve(Settings(metrics_listen=(("127.0.0.1", port),)))
    with ExitStack() as stack:
        stack.callback(stop)
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            for _ in range(3 * metrics_server.THREADS)
        ]
        for client in clients[: metrics_server.THREADS : 2]:
            client.sendall(b"GET /metrics HTTP/1.0\r\nX: ")
        server_reply = [client.recv(100) for client in reversed(clients)]
        assert threading.active_count() <= before + 1 + metrics_server.THREADS
        assert [one[:12] for one in server_reply] == [
            b"HTTP/1.0 503"
        ] * 2 * metrics_server.THREADS + [b""] * metrics_server.THREADS
        until(lambda: threading.active_count() == before + 1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert b"relay_accept_seconds_count" in answer.read()
