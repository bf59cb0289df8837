"""The table of ``benchmarks/chaos.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Disturbance:
    """A disturbance of a run, and how its ranks ended."""

    kind: str
    aim: str
    iteration: int
    """The last one that was logged before."""
    victim: int | None
    """The rank that was killed or stopped, if it was one."""
    delay: float
    start: str
    """Name of the folder of the ranks' logs."""
    seconds: float = 0.0
    """Until the last of the other ranks had ended."""
    codes: list[int | None] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        victim = "" if self.victim is None else f" (rank {self.victim})"
        wrong = f"   WRONG: {'; '.join(self.faults)}" if self.faults else ""
        where = f"{self.aim}, after iteration {self.iteration}"
        return f"{self.kind + victim:20} {where:35} {self.seconds:6.1f} s   codes {self.codes}{wrong}"


@dataclass
class Configuration:
    """The disturbances of one layout with one way of saving."""

    layout: str
    saves: str
    disturbances: list[Disturbance] = field(default_factory=list)
    runs: int = 0
    """Number of runs that were disturbed, finished, and compared."""
    faults: list[str] = field(default_factory=list)
    """Differences from the undisturbed run."""

    @property
    def all_faults(self) -> list[str]:
        """Everything that was not as required."""
        return [*self.faults, *(f"{d.start}, {d.kind}: {fault}" for d in self.disturbances for fault in d.faults)]


def table(configurations: Sequence[Configuration]) -> str:
    """Return a table of the disturbances by layout, saves and kind, and all faults below it."""
    lines = ["", f"{'layout':9} {'saves':6} {'disturbance':13} {'times':>6} {'slowest end':>12} {'faults':>7}"]
    for one in configurations:
        for kind in sorted({d.kind for d in one.disturbances}):
            of_kind = [d for d in one.disturbances if d.kind == kind]
            slowest, wrong = max(d.seconds for d in of_kind), sum(len(d.faults) for d in of_kind)
            lines.append(f"{one.layout:9} {one.saves:6} {kind:13} {len(of_kind):6} {slowest:10.1f} s {wrong:7}")
        compared = f"{one.layout:9} {one.saves:6} {'finished runs':13} {one.runs:6}"
        lines.append(f"{compared} {'':12} {len(one.faults):7}")
    times = sum(len(one.disturbances) for one in configurations)
    faults = [fault for one in configurations for fault in one.all_faults]
    lines += ["", f"{times} disturbances, {len(faults)} faults", *faults]
    return "\n".join(lines)
