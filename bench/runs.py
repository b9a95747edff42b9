"""Runs parts on systems by turns: every system once, then every system again, so that no one gets the quiet minutes."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from subprocess import CalledProcessError

from bench.parts import Part, Scale
from bench.processes import Stuck
from bench.systems import System

PEER = "Postfix"


@dataclass(slots=True)
class Result:
    """Figures of one part: by name, by system, one a run."""

    part: Part
    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def median(self, name: str, system: str) -> float | None:
        values = self.figures[name].get(system)
        return statistics.median(values) if values else None

    def ratio(self, name: str, system: str) -> float | None:
        """How many times better than Postfix: the median of the runs' ratios, each to the turn beside it."""
        ours, theirs = self.figures[name].get(system, []), self.figures[name].get(PEER, [])
        if system == PEER or not theirs or len(ours) != len(theirs):
            return None
        ratio = statistics.median(our / their if their else 0.0 for our, their in zip(ours, theirs, strict=True))
        return ratio if self.part.more_is_better or not ratio else 1 / ratio


def measure(part: Part, systems: Sequence[System], scale: Scale) -> Result:
    """Run one part on all systems as often as `scale` says."""
    result = Result(part)
    for turn in range(scale.runs):
        # Who comes first in one turn comes last in the next.
        for system in systems if turn % 2 == 0 else systems[::-1]:
            try:
                figures = part.run(system, scale)
            except (Stuck, CalledProcessError) as error:
                result.failures.append(f"run {turn + 1}, {system.name}: {error}")
                continue
            for name, value in figures.items():
                result.figures.setdefault(name, {}).setdefault(system.name, []).append(value)
    return result
