"""Runs parts on systems by turns: every system once, then every system again, so that no one gets
the quiet minutes."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.machine import Disk
from bench.parts import NO_RATIO, Part, Scale
from bench.systems import System

PEER = "Postfix"


@dataclass(slots=True)
class Measurement:
    """Figures of one part: by name, by system, one for each turn, None where that run failed.

    `restless` are the runs in which the disk was not still before what was measured.
    """

    part: Part
    figures: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    restless: list[str] = field(default_factory=list)

    def values(self, name: str, system: str) -> list[float]:
        """What the runs that did not fail gave."""
        return [value for value in self.figures[name].get(system, []) if value is not None]

    def median(self, name: str, system: str) -> float | None:
        values = self.values(name, system)
        return statistics.median(values) if values else None

    def ratio(self, name: str, system: str) -> float | None:
        """How many times better than Postfix: the median of the ratios of those turns in which
        neither failed."""
        of = self.figures[name]
        turns = zip(
            of.get(system, []), of.get(PEER, []), strict=False
        )  # one of them may have nothing at all
        ratios = [our / their for our, their in turns if our is not None and their]
        if system == PEER or not ratios or name.endswith(NO_RATIO):
            return None
        ratio = statistics.median(ratios)
        return ratio if self.part.more_is_better or not ratio else 1 / ratio


def measure(part: Part, systems: Sequence[System], scale: Scale) -> Measurement:
    """Run one part on all systems as often as `scale` says."""
    result = Measurement(part)
    for turn in range(scale.runs):
        # Who comes first in one turn comes last in the next.
        for system in systems if turn % 2 == 0 else systems[::-1]:
            run, disk = f"run {turn + 1}, {system.name}", Disk(system.directory, scale.patience)
            try:
                figures = part.run(system, scale, disk)
            except Exception as error:  # whatever it met, the other runs keep their figures
                result.failures.append(f"{run}: {type(error).__name__}: {error}")
                continue
            if disk.restless:
                result.restless.append(run)
            for name, value in figures.items():
                of = result.figures.setdefault(name, {}).setdefault(
                    system.name, [None] * scale.runs
                )
                of[turn] = value
    return result
