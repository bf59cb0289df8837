"""From one checkpoint every layout goes on alike: losses, scores, weights, alignments, and the weighter itself.

All to 1e-5 (scores, weights and alignments: of their spread; measured: at most 6e-7), the rounding of fp32 over four
steps. Adam's epsilon is 1e-4 here: right after a checkpoint is loaded without the optimizer's state, the second moment
is one squared gradient, and with the usual 1e-8 the elements whose gradient is nothing but rounding would be divided by
that rounding: they alone moved an alignment by 0.3 % of the spread from one layout to the next.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.e2e.datasets import TOKENIZER, counting, make_dataset, noise
from tests.e2e.launch import records, succeed
from tests.small_runs import LANGUAGE_MODEL, TRAINING, WEIGHTING

TP2 = {"--tensor-model-parallel-size": 2}
PP2 = {"--pipeline-model-parallel-size": 2}
SHARDED = {"--use-distributed-optimizer": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, TP2),
    "TP2, sequence parallel": (2, {**TP2, "--sequence-parallel": True}),
    "PP2": (2, PP2),
    "PP2, interleaved": (2, {**PP2, "--num-virtual-stages-per-pipeline-rank": 2}),
    "TP2 x PP2": (4, {**TP2, **PP2}),
    "DP2": (2, {}),
    "DP2, distributed optimizer": (2, SHARDED),
    "TP2 x DP2, distributed optimizer, overlapped": (
        4,
        {**TP2, **SHARDED, "--overlap-grad-reduce": True, "--overlap-param-gather": True},
    ),
    "recomputation": (
        1,
        {"--recompute-granularity": "full", "--recompute-method": "uniform", "--recompute-num-layers": 1},
    ),
    "other microbatches": (1, {"--micro-batch-size": 8}),
}
START, END = 8, 12


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Flags of a run that goes on from a checkpoint with a weighter in it."""
    folder = tmp_path_factory.mktemp("layouts")
    train = ["0.5", make_dataset(folder, "clean", counting(0)), "0.5", make_dataset(folder, "noise", noise(1))]
    common = {
        **LANGUAGE_MODEL,
        **TRAINING,
        **TOKENIZER,
        **WEIGHTING,
        "--train-iters": END,
        "--adam-eps": 1e-4,
        "--make-vocab-size-divisible-by": 32,  # the same padding for every TP size: padded logits count in the loss
        "--hidden-dropout": 0,
        "--attention-dropout": 0,
        "--dwm-num-stages": 1,
        "--train-data-path": train,
        "--valid-data-path": make_dataset(folder, "valid", counting(2)),
        "--dwm-target-data-path": make_dataset(folder, "target", counting(3)),
    }
    succeed(folder / "log", 1, {**common, "--save": folder / "start", "--exit-interval": START})
    return {**common, "--load": folder / "start", "--no-load-optim": True, "--no-load-rng": True}


def go_on(folder: Path, flags: dict[str, Any], processes: int, parallel: dict[str, Any]) -> dict[str, Any]:
    succeed(folder / "log", processes, {**flags, **parallel, "--save": folder / "save"})
    metrics = folder / "save" / "metrics.jsonl"
    state = torch.load(folder / "save" / f"iter_{END:07d}" / "dwm_state.pt", weights_only=True)
    return {
        "losses": [record["lm_loss"] for record in records(metrics, "train")],
        "evaluation": [record["lm_loss"] for record in records(metrics, "evaluation")],
        "samples": [record["samples"] for record in records(metrics, "outer_update")],
        "weighter": torch.cat([tensor.flatten() for tensor in state["weighter"].values()]),
    }


@pytest.fixture(scope="module")
def expected(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return go_on(tmp_path_factory.mktemp("one"), flags, 1, {})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_goes_on_as_one_process_does(
    layout: str, flags: dict[str, Any], expected: dict[str, Any], tmp_path: Path
):
    found = go_on(tmp_path, flags, *LAYOUTS[layout])
    assert len(expected["losses"]) == END - START and len(expected["samples"]) == 2
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-5)
    for ours, theirs in zip(found["samples"], expected["samples"], strict=True):
        assert ours["index"] == theirs["index"] and ours["source"] == theirs["source"]
        for name in ("score", "weight", "alignment"):
            spread = np.ptp(theirs[name])
            assert spread > 0
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5 * spread), name
    moved = expected["weighter"].norm()
    assert float((found["weighter"] - expected["weighter"]).norm() / moved) < 1e-5
