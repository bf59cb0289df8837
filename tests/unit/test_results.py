"""The losses on docs/results.md, docs/transfer.md and in the README are those of the recorded data."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.paths import ROOT

T_95 = {2: 12.7062, 3: 4.30265}
"""Student's t of n - 1 degrees of freedom, two-sided 95 %, by n."""
UNRECORDED = {"+0.006 ± 0.008"}
"""Of six seeds of the first defaults, whose single losses were not kept."""
MINUS = "\N{MINUS SIGN}"


def losses_by_arm(value: Any, name: str = "") -> Iterator[tuple[str, list[float]]]:
    """Yield the name of each arm below a value of JSON, and the test losses of its seeds."""
    if isinstance(value, dict):
        if "test_loss" in value:
            yield name, value["test_loss"]
        for key, below in value.items():
            yield from losses_by_arm(below, f"{name}/{key}")


def rounded(values: Sequence[float], form: str) -> str:
    """Return a mean and half of its 95 % interval as the pages write them; ``form`` is that of the mean."""
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{format(statistics.mean(values), form)} ± {half:.3f}".replace("-", MINUS)


def recorded_figures() -> set[str]:
    """Return the mean losses of all arms, and their differences to those of uniform arms of the same file."""
    found = set()
    for file in (ROOT / "docs").glob("*.json"):
        arms = {name: losses for name, losses in losses_by_arm(json.loads(file.read_text())) if len(losses) > 1}
        found |= {rounded(losses, ".3f") for losses in arms.values()}
        for name, losses in arms.items():
            others = [other for key, other in arms.items() if "uniform" in key and key != name]
            pairs = [zip(losses, other, strict=True) for other in others if len(other) == len(losses)]
            found |= {rounded([one - another for one, another in pair], "+.3f") for pair in pairs}
    return found | {figure.lstrip(MINUS) for figure in found}  # "lower by 0.119"


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/transfer.md"])
def test_losses_with_an_interval_are_recorded(page: str):
    tables = "\n".join(line for line in (ROOT / page).read_text().splitlines() if line.startswith("|"))
    figures = set(re.findall(rf"[+{MINUS}]?\d\.\d{{3}} ± \d\.\d{{3}}", tables))
    assert figures and figures - recorded_figures() - UNRECORDED == set()
