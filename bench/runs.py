"""Runs a part on all systems in turns, so that a slow minute affects all of them."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.machine import Disk
from bench.parts import NO_RATIO, Part, Scale
from bench.systems import System

PEER = "Postfix"


@dataclass(slots=True)
class Measurement:
    """The figures of one part by name and system: one for each turn, None where that run failed.

    `failures` names the runs that failed, `busy_disk` those before which the disk was not idle.
    """

    part: Part
    figures: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    busy_disk: list[str] = field(default_factory=list)

    def values(self, name: str, system: str) -> list[float]:
        """The figures of the runs that did not fail."""
        return [value for value in self.figures[name].get(system, []) if value is not None]

    def median(self, name: str, system: str) -> float | None:
        values = self.values(name, system)
        return statistics.median(values) if values else None

    def ratio(self, name: str, system: str) -> float | None:
        """How many times better than Postfix: the median over the turns in which neither failed."""
        if system == PEER or name.endswith(NO_RATIO):
            return None
        runs = self.figures[name]
        pairs = zip(runs.get(system, []), runs.get(PEER, []), strict=False)  # one may be missing
        ratios = [own / peer for own, peer in pairs if own is not None and peer]
        if not ratios:
            return None
        ratio = statistics.median(ratios)
        return ratio if self.part.more_is_better or not ratio else 1 / ratio


def measure(part: Part, systems: Sequence[System], scale: Scale) -> Measurement:
    """Run a part `scale.runs` times on each system."""
    result = Measurement(part)
    for turn in range(scale.runs):
        # The system that is first in one turn is last in the next.
        for system in systems if turn % 2 == 0 else systems[::-1]:
            run, disk = f"run {turn + 1}, {system.name}", Disk(system.directory, scale.disk_timeout)
            try:
                figures = part.run(system, scale, disk)
            except Exception as error:  # any fault of this run: the others keep their figures
                result.failures.append(f"{run}: {type(error).__name__}: {error}")
                continue
            if disk.busy:
                result.busy_disk.append(run)
            for name, value in figures.items():
                runs = result.figures.setdefault(name, {})
                runs.setdefault(system.name, [None] * scale.runs)[turn] = value
    return result
