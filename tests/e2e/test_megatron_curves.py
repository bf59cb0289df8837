"""``--dwm-mode off`` trains as Megatron-LM's pretrain_gpt.py: the same curves, by the same names, in every layout.

The expected curves were recorded by tests/fixtures/megatron/record.py. Runs of several processes are compared up to
their half, which is after an evaluation; test_megatron_checkpoints.py has the other half in two layouts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.launch import succeed
from tests.fixtures.megatron.record import make_learnable_dataset, scalars
from tests.paths import FIXTURES

RECORDED: dict[str, Any] = json.loads((FIXTURES / "megatron" / "curves.json").read_text())
ZEROS = "num-zeros"  # counts exact zeros: rounding makes some, and each is one of thousands
HALF = 6
TORCH = [case for case in RECORDED if case.startswith(("gpt2 without dropout", "llama, one", "llama, TP2xPP2"))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"--data-path": make_learnable_dataset(tmp_path_factory.mktemp("data"))}


def assert_curves(
    found: dict[str, list[list[float]]], expected: dict[str, list[list[float]]], tolerance: float
) -> float:
    """The curves have the same names, the same steps and the same values; returns the largest relative difference."""
    assert found.keys() == expected.keys()
    largest = 0.0
    for name, curve in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in curve], name
        values, wanted = ([value for _, value in points] for points in (found[name], curve))
        if name.startswith(ZEROS):
            assert values == pytest.approx(wanted, rel=0.2, abs=4), name
            continue
        assert values == pytest.approx(wanted, rel=tolerance), name
        largest = max(largest, *(abs(a - b) / b if b else 0 for a, b in zip(values, wanted, strict=True)))
    return largest


def curves_and_recorded(case: str, folder: Path, flags: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The curves of our run of ``case``, and Megatron-LM's up to where it ends."""
    processes, theirs, curves = (RECORDED[case][name] for name in ("processes", "flags", "curves"))
    ours = {"--dwm-mode": "off", "--tensorboard-dir": folder / "board"}
    if processes > 1:
        ours["--exit-interval"] = HALF
        samples = HALF * theirs["--global-batch-size"]
        ends = {name: samples if name.endswith(" vs samples") else HALF for name in curves}
        curves = {name: [point for point in curve if point[0] <= ends[name]] for name, curve in curves.items()}
    succeed(folder, processes, theirs | flags | ours)
    return scalars(folder / "board"), curves


@pytest.mark.parametrize("case", RECORDED)
def test_curves_are_megatron_lms(case: str, data: dict[str, Any], tmp_path: Path):
    assert_curves(*curves_and_recorded(case, tmp_path, data), tolerance=1e-5)


@pytest.mark.parametrize("case", TORCH)
def test_torch_layers_follow_the_same_curves(case: str, data: dict[str, Any], tmp_path: Path):
    found = curves_and_recorded(case, tmp_path, data | {"--transformer-impl": "torch"})
    difference = assert_curves(*found, tolerance=1e-4)
    print(f"{case}: largest relative difference {difference:.1e}")
