"""From one checkpoint every layout goes on alike: losses, scores, weights, alignments, and the weighter itself.

All to 1e-5 (scores, weights and alignments: of their spread; measured: at most 6e-7), the rounding of fp32 over two
steps, each with an outer update. Adam's epsilon is 1e-4 here: right after a checkpoint is loaded without the
optimizer's state, the second moment is one squared gradient, and with the usual 1e-8 the elements whose gradient is
nothing but rounding would be divided by that rounding: they alone moved an alignment by 0.3 % of the spread from one
layout to the next.
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
    "TP2, sequence parallel": (2, {**TP2, "--sequence-parallel": True}),
    "PP2": (2, {**PP2, "--eval-micro-batch-size": 1, "--eval-global-batch-size": 5}),
    "PP2, interleaved": (2, {**PP2, "--num-virtual-stages-per-pipeline-rank": 2}),
    "TP2 x PP2": (4, {**TP2, **PP2}),
    "DP2": (2, {"--eval-micro-batch-size": 3, "--eval-global-batch-size": 12}),
    "DP2, distributed optimizer": (2, SHARDED),
    "DP4, two instances of the distributed optimizer": (
        4,
        {**SHARDED, "--num-distributed-optimizer-instances": 2, "--overlap-grad-reduce": True, "--micro-batch-size": 2},
    ),
    "TP2 x DP2, distributed optimizer, overlapped": (
        4,
        {**TP2, **SHARDED, "--overlap-grad-reduce": True, "--overlap-param-gather": True, "--micro-batch-size": 2},
    ),
    "recomputation": (
        1,
        {"--recompute-granularity": "full", "--recompute-method": "uniform", "--recompute-num-layers": 1},
    ),
    "other microbatches": (1, {"--micro-batch-size": 8}),
}
CP2 = {"--context-parallel-size": 2}
DIVIDED_SEQUENCES: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2, sequence parallel, x CP2": (4, {**TP2, "--sequence-parallel": True, **CP2}),
    "PP2, interleaved, x CP2": (4, {**PP2, "--num-virtual-stages-per-pipeline-rank": 2, **CP2}),
    "CP2 x DP2, distributed optimizer": (4, {**CP2, **SHARDED}),
    "PP2 x CP2 x DP2, replicas last": (8, {**PP2, **CP2, "--use-tp-pp-dp-mapping": True}),
}
START, STOP, END = 4, 5, 6
EOD = 100


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Flags of a run that goes on from a checkpoint with a weighter in it."""
    folder = tmp_path_factory.mktemp("layouts")
    train = ["0.5", make_dataset(folder, "clean", counting(0)), "0.5", make_dataset(folder, "noise", noise(1))]
    common = {
        **LANGUAGE_MODEL,
        "--num-layers": 4,  # two virtual stages of two pipeline stages
        **TRAINING,
        **TOKENIZER,
        **WEIGHTING,
        "--train-iters": END,
        "--lr-warmup-iters": 0,
        "--dwm-update-interval": 1,
        "--adam-eps": 1e-4,
        "--make-vocab-size-divisible-by": 32,  # the same padding for every TP size: padded logits count in the loss
        "--hidden-dropout": 0,
        "--attention-dropout": 0,
        "--dwm-num-stages": 1,
        "--dwm-target-batch-size": 8,  # an eighth of the batch is rounded up to what a layout divides
        "--dwm-target-momentum": 0.78,
        "--train-data-path": train,
        # Of 6 and 9 samples, which fill no batch.
        "--valid-data-path": [
            make_dataset(folder, "valid", counting(2, documents=4)),
            make_dataset(folder, "noisy", noise(4, documents=6)),
        ],
        "--multiple-validation-sets": True,
        "--full-validation": True,
        "--dwm-target-data-path": make_dataset(folder, "target", counting(3)),
    }
    succeed(folder / "log", 1, {**common, "--save": folder / "start", "--exit-interval": START})
    return {**common, "--load": folder / "start", "--no-load-optim": True, "--no-load-rng": True}


def interrupted(documents: list[list[int]]) -> list[list[int]]:
    """Documents with end-of-document tokens in the first third of every 30: some samples have many, some few."""
    return [[EOD if place % 30 < 10 else token for place, token in enumerate(ids)] for ids in documents]


@pytest.fixture(scope="module")
def masked(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Flags of the same run with samples whose losses count in part, in other places of each."""
    folder = tmp_path_factory.mktemp("masked")
    train = [
        *("0.5", make_dataset(folder, "clean", interrupted(counting(0)))),
        *("0.5", make_dataset(folder, "noise", noise(1))),
    ]
    target = make_dataset(folder, "target", interrupted(counting(3)))
    documents = {"--eod-mask-loss": True, "--reset-attention-mask": True, "--reset-position-ids": True}
    return {**flags, **documents, "--train-data-path": train, "--dwm-target-data-path": target}


@pytest.fixture(scope="module")
def expected_masked(masked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return go_on(tmp_path_factory.mktemp("one"), masked, 1, {})


def go_on(folder: Path, flags: dict[str, Any], processes: int, parallel: dict[str, Any]) -> dict[str, Any]:
    succeed(folder / "log", processes, {**flags, **parallel, "--save": folder / "save"})
    metrics = folder / "save" / "metrics.jsonl"
    state = torch.load(folder / "save" / f"iter_{END:07d}" / "dwm_state.pt", weights_only=True)
    return {
        "losses": [record["lm_loss"] for record in records(metrics, "train")],
        "evaluation": [record["lm_loss_by_source"] for record in records(metrics, "evaluation")],
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
    assert len(expected["losses"]) == END - START and len(expected["samples"]) == 2
    assert_same(go_on(tmp_path, flags, *LAYOUTS[layout]), expected)


@pytest.mark.parametrize("layout", DIVIDED_SEQUENCES)
def test_divided_sequences_go_on_as_one_process_does(
    layout: str,
    masked: dict[str, Any],
    expected: dict[str, Any],
    expected_masked: dict[str, Any],
    tmp_path: Path,
):
    assert expected_masked["losses"] != expected["losses"]
    assert_same(go_on(tmp_path, masked, *DIVIDED_SEQUENCES[layout]), expected_masked)


def test_one_process_goes_on_from_divided_sequences(
    masked: dict[str, Any], expected_masked: dict[str, Any], tmp_path: Path
):
    parts = {**masked, "--save": tmp_path / "save", "--exit-interval": STOP}
    succeed(tmp_path / "log", 2, {**parts, **CP2})
    del parts["--no-load-optim"]
    found = go_on(tmp_path, {**parts, "--load": tmp_path / "save"}, 1, {})
    assert_same(found, expected_masked)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for losses, expected_losses in zip(found["evaluation"], expected["evaluation"], strict=True):
        assert list(losses) == ["valid", "noisy"] and losses == pytest.approx(expected_losses, rel=1e-5)
    for ours, theirs in zip(found["samples"], expected["samples"], strict=True):
        assert ours["index"] == theirs["index"] and ours["source"] == theirs["source"]
        for name in ("score", "weight", "alignment"):
            spread = np.ptp(theirs[name])
            assert spread > 0
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5 * spread), name
    moved = expected["weighter"].norm()
    assert float((found["weighter"] - expected["weighter"]).norm() / moved) < 1e-5
