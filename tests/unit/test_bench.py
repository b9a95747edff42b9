"""What the benchmark makes of its runs: turns, ratios, failures. That it measures, `.ci/bench`
proves."""

import dataclasses
from pathlib import Path
from typing import Any

from bench import plot, report
from bench.machine import Disk
from bench.parts import NO_RATIO, Part, Scale
from bench.runs import PEER, Measurement, measure


class Recorded:
    """A system whose runs are known beforehand: a figure, or what it raises."""

    def __init__(self, name: str, directory: Path, *runs: float | Exception) -> None:
        self.name, self.directory, self.runs = name, directory, list(runs)


def measured(*systems: Any, more_is_better: bool = True, name: str = "accepted") -> Measurement:
    def run(system: Any, _scale: Scale, disk: Disk) -> dict[str, float]:
        disk.settle()
        figure = system.runs.pop(0)
        if isinstance(figure, Exception):
            raise figure
        return {name: figure}

    part = Part("load", "words", "unit", run, more_is_better)
    return measure(part, list(systems), Scale(runs=3, patience=0.0))


def test_a_run_that_fails_costs_no_other_its_figure(tmp_path: Path):
    result = measured(Recorded("ours", tmp_path, 1.0, RuntimeError("heard 451"), 3.0))
    assert result.figures == {"accepted": {"ours": [1.0, None, 3.0]}}
    assert result.failures == ["run 2, ours: RuntimeError: heard 451"]
    assert result.median("accepted", "ours") == 2.0


def test_ratios_are_between_runs_of_the_same_turn(tmp_path: Path):
    ours, theirs = (
        Recorded("ours", tmp_path, 8.0, OSError(), 6.0),
        Recorded(PEER, tmp_path, OSError(), 1.0, 2.0),
    )
    assert measured(ours, theirs).ratio("accepted", "ours") == 3.0


def test_less_is_better_turns_a_ratio_over(tmp_path: Path):
    ours, theirs = (
        Recorded("ours", tmp_path, 8.0, 8.0, 8.0),
        Recorded(PEER, tmp_path, 2.0, 2.0, 2.0),
    )
    assert measured(ours, theirs, more_is_better=False).ratio("accepted", "ours") == 0.25


def test_there_is_no_ratio_without_the_peer_or_of_too_little(tmp_path: Path):
    def ours() -> Recorded:
        return Recorded("ours", tmp_path, 1.0, 1.0, 1.0)

    dead = Recorded(PEER, tmp_path, OSError(), OSError(), OSError())
    assert measured(ours(), dead).ratio("accepted", "ours") is None
    name = "out" + NO_RATIO
    assert (
        measured(ours(), Recorded(PEER, tmp_path, 1.0, 1.0, 1.0), name=name).ratio(name, "ours")
        is None
    )


def test_a_disk_that_was_not_still_is_told(tmp_path: Path):
    result = measured(Recorded("ours", tmp_path, 1.0, 1.0, 1.0))
    assert result.restless == ["run 1, ours", "run 2, ours", "run 3, ours"]
    assert "the disk was not still before it: run 2, ours" in report.table(result, ["ours"])


def test_table_file_and_plot_bear_gaps(tmp_path: Path):
    result = measured(
        Recorded("ours", tmp_path, 1.0, OSError("gone"), 3.0),
        Recorded(PEER, tmp_path, *[OSError()] * 3),
    )
    assert "FAILED run 2, ours: OSError: gone" in report.table(result, ["ours", PEER])
    document = report.as_json([result], {"when": "now"})
    assert document["parts"][0]["figures"] == {"accepted": {"ours": [1.0, None, 3.0]}}
    for name in ("large", "latency", "memory"):
        part = dataclasses.replace(result.part, name=name)
        document["parts"] += report.as_json([dataclasses.replace(result, part=part)], {})["parts"]
    plot.draw(document, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(
        unit in drawn for unit in ("messages a second", "MB a second", "ms, one", "MiB resident")
    )
