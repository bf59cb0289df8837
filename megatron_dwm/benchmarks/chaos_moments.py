"""The moments and kinds of disturbances."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Aim = Literal["save", "update", "export", "any iteration", "start"]
Kind = Literal["kill one", "kill all", "terminate", "full disk", "stop one"]

AIMS: dict[Aim, int] = {"save": 7, "update": 5, "export": 3, "any iteration": 3, "start": 2}
"""Phases that moments fall into, and how many of 20 do."""
KINDS: dict[Kind, int] = {"kill one": 3, "kill all": 2, "terminate": 2, "full disk": 2, "stop one": 1}
"""Kinds of disturbances, and how many of 10; a stopped rank takes a minute, the shortest timeout of collectives."""
MAX_DELAY: dict[Aim, float] = {"save": 0.4, "update": 0.2, "export": 0.1, "any iteration": 0.2, "start": 4.0}
"""Maximum number of seconds from the beginning of a phase to the moment."""


@dataclass(frozen=True)
class Plan:
    """The iterations of a run at which something happens."""

    iterations: int
    save_interval: int
    warmup: int
    update_interval: int

    def of(self, aim: Aim, after: int) -> list[int]:
        """Return the iterations of an aim that are still to come after one."""
        coming = range(after + 1, self.iterations + 1)
        if aim in ("save", "export"):  # every save exports the weighter
            return [n for n in coming if n % self.save_interval == 0 or n == self.iterations]
        if aim == "update":
            return [n for n in coming if n > self.warmup and (n - self.warmup) % self.update_interval == 0]
        return list(coming)


@dataclass(frozen=True)
class Moment:
    """When a run is disturbed."""

    aim: Aim
    iteration: int
    """The iteration in which the moment falls; 0 during start-up."""
    delay: float
    """Seconds after the phase has begun."""

    def has_come(self, save: Path, log: str) -> bool:
        """Return whether the moment's phase has begun.

        Args:
            save: the run's folder.
            log: what its last rank has printed since it was started.
        """
        if self.aim == "start":
            return True
        done = last_iteration(log)
        if self.aim == "any iteration" or done < self.iteration - 1:
            return done >= self.iteration
        if self.aim == "update":
            return True  # the iteration of the update runs
        if done < self.iteration:
            return False  # files that exist may be of an interrupted run
        name, weighter = f"iter_{self.iteration:07d}", save / "weighter"
        if self.aim == "export":
            return (weighter / name).exists() or any(weighter.glob(f".{name}.*.tmp*"))
        return (save / name).exists() or (save / f".{name}.partial").exists()


def choose_moment(rng: random.Random, plan: Plan, after: int) -> Moment:
    """Choose when to disturb a run that continues from iteration ``after``."""
    possible = {aim: weight for aim, weight in AIMS.items() if plan.of(aim, after)}
    aim: Aim = rng.choices(list(possible), list(possible.values()))[0] if possible else "start"
    iteration = 0 if aim == "start" else rng.choice(plan.of(aim, after))
    return Moment(aim, iteration, rng.uniform(0, MAX_DELAY[aim]))


def all_kinds(rng: random.Random) -> Iterator[Kind]:
    """Yield kinds of disturbances endlessly; every ten of them are distributed as :data:`KINDS` says."""
    while True:
        ten = [kind for kind, number in KINDS.items() for _ in range(number)]
        rng.shuffle(ten)
        yield from ten


def last_iteration(log: str) -> int:
    """Return the last iteration that a rank's log reports; 0 if there is none yet."""
    found = re.findall(r" iteration +(\d+)/ ", log)
    return int(found[-1]) if found else 0
