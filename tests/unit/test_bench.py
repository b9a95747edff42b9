"""The evaluation of a benchmark: turns, ratios, failures. `.ci/bench` runs its measurements."""

import dataclasses
import socket
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from bench import plot, services
from bench.parts import NO_RATIO, Part, Run, Scale, percentiles
from bench.results import PEER, PartResult, measure, table
from bench.systems import Arrangement

TWO = (Arrangement(), Arrangement(workers=2))


class PreparedSystem:
    """A system with prepared runs: each is a figure, or an exception to raise."""

    def __init__(self, name: str, directory: Path, *runs: float | Exception) -> None:
        self.name, self.directory, self.runs = name, directory, list(runs)

    def arrange(self, arrangement: Arrangement) -> bool:
        return arrangement.workers == 1


def measured(*systems: Any, more_is_better: bool = True, name: str = "accepted") -> PartResult:
    def run(run: Run) -> dict[str, float]:
        run.wait_for_disk()
        figure = cast(Any, run.system).runs.pop(0)
        if isinstance(figure, Exception):
            raise figure
        return {name: figure}

    part = Part("load", "words", "unit", run, more_is_better, arrangements=TWO)
    return measure(part, list(systems), Scale(runs=3, disk_timeout=0.0))


def test_a_failed_run_leaves_the_figures_of_the_others(tmp_path: Path):
    result = measured(PreparedSystem("ours", tmp_path, 1.0, RuntimeError("heard 451"), 3.0))
    assert result.figures == {"accepted": {"ours": [1.0, None, 3.0]}}
    assert result.failures == ["run 2, ours: RuntimeError: heard 451"]
    assert "2.00 (1.00-3.00)" in table(result, ["ours"])


def test_ratios_are_between_runs_of_the_same_turn(tmp_path: Path):
    ours, theirs = (
        PreparedSystem("ours", tmp_path, 8.0, OSError(), 6.0),
        PreparedSystem(PEER, tmp_path, OSError(), 1.0, 2.0),
    )
    assert measured(ours, theirs).times_better_than_postfix == {"accepted": {"ours": 3.0}}


def test_a_ratio_is_inverted_where_less_is_better(tmp_path: Path):
    ours, theirs = (
        PreparedSystem("ours", tmp_path, 8.0, 8.0, 8.0),
        PreparedSystem(PEER, tmp_path, 2.0, 2.0, 2.0),
    )
    result = measured(ours, theirs, more_is_better=False)
    assert result.times_better_than_postfix == {"accepted": {"ours": 0.25}}


def test_there_is_no_ratio_without_the_peer_or_for_a_small_load(tmp_path: Path):
    def ours() -> PreparedSystem:
        return PreparedSystem("ours", tmp_path, 1.0, 1.0, 1.0)

    dead = PreparedSystem(PEER, tmp_path, OSError(), OSError(), OSError())
    assert measured(ours(), dead).times_better_than_postfix == {"accepted": {}}
    peer = PreparedSystem(PEER, tmp_path, 1.0, 1.0, 1.0)
    assert measured(ours(), peer, name="out" + NO_RATIO).times_better_than_postfix == {}


def test_a_busy_disk_is_reported(tmp_path: Path):
    result = measured(PreparedSystem("ours", tmp_path, 1.0, 1.0, 1.0))
    assert result.disk_not_still == ["run 1, ours", "run 2, ours", "run 3, ours"]
    assert "the disk was busy before it: run 2, ours" in table(result, ["ours"])


def test_table_file_and_plot_accept_failed_runs(tmp_path: Path):
    result = measured(
        PreparedSystem("ours", tmp_path, 1.0, OSError("gone"), 3.0),
        PreparedSystem(PEER, tmp_path, *[OSError()] * 3),
    )
    assert "FAILED run 2, ours: OSError: gone" in table(result, ["ours", PEER])
    parts = [
        dataclasses.asdict(dataclasses.replace(result, name=name))
        for name in ("load", "large", "latency", "memory")
    ]
    assert parts[0]["figures"] == {"accepted": {"ours": [1.0, None, 3.0]}}
    plot.draw({"about": {"when": "now"}, "parts": parts}, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(
        unit in drawn for unit in ("messages a second", "MB a second", "ms, one", "MiB resident")
    )


def test_percentiles_of_seconds_are_milliseconds():
    figures = percentiles("to 250", [number / 1000 for number in range(101)])
    assert figures == pytest.approx({"to 250, p50": 50, "to 250, p95": 95, "to 250, p99": 99})


def is_counted(sink: services.SinkProcess, count: int) -> bool:
    return sink.count() == count


def test_the_slow_sink_replies_to_each_request_and_counts_it(tmp_path: Path):
    with services.sink("qmqp-sink", tmp_path, delay=0.001) as sink:
        for count in (1, 2):
            with socket.create_connection(("127.0.0.1", sink.port), timeout=30) as client:
                for part in (b"1", b"0:", b"x" * 10, b","):
                    client.sendall(part)
                assert client.recv(100) == b"3:Kok,"
                assert client.recv(100) == b""
            services.wait(partial(is_counted, sink, count), "counted", timeout=30)
