"""A weighter that cannot learn changes nothing: the run is plain Megatron's, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from tests.e2e.launch import records, succeed
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING

LAYOUTS = {
    "one process": (1, {}),
    "TP2 x PP2": (4, {"--tensor-model-parallel-size": 2, "--pipeline-model-parallel-size": 2}),
    "TP2 with sequence parallelism x DP2 with a distributed optimizer": (
        4,
        {
            "--tensor-model-parallel-size": 2,
            "--sequence-parallel": True,
            "--use-distributed-optimizer": True,
            "--overlap-grad-reduce": True,
            "--overlap-param-gather": True,
            **{"--num-layers": 1, "--micro-batch-size": 2},  # two microbatches a replica
            # The other format also saves the buckets' padding, which is whatever lay in memory.
            "--dist-ckpt-optim-fully-reshardable": True,
        },
    ),
}


def saved_tensors(folder: Path) -> dict[str, Any]:
    """Everything in a checkpoint's shards, by key."""
    return _load_state_dict_from_keys(None, storage_reader=FileSystemReader(folder))


def assert_same_checkpoints(one: Path, other: Path, *, but: str | None = None) -> None:
    """The tensors of two checkpoints are the same bit for bit, ``but`` for those of the second whose key begins so."""
    expected, found = saved_tensors(one), saved_tensors(other)
    found = {name: value for name, value in found.items() if but is None or not name.startswith(but)}
    assert found.keys() == expected.keys() and len(found) > 20
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weighter_without_learning_rate_equals_the_plain_run_bit_for_bit(layout: str, tmp_path: Path):
    processes, parallel = LAYOUTS[layout]
    steps = {}
    for mode, weighting in (("off", {}), ("bilevel", {**WEIGHTING, "--dwm-lr": 0})):
        save = tmp_path / mode
        flags = {**LANGUAGE_MODEL, **TRAINING, **DATA, **parallel, **weighting, "--dwm-mode": mode}
        succeed(tmp_path / f"{mode}-log", processes, {**flags, "--save": save, "--eval-interval": 5})
        steps[mode] = [
            (record["lm_loss"], record["grad_norm"], record["learning_rate"])
            for record in records(save / "metrics.jsonl", "train")
        ]
    assert len(steps["off"]) == 10
    assert steps["bilevel"] == steps["off"]
    updates = records(tmp_path / "bilevel" / "metrics.jsonl", "outer_update")
    assert len(updates) == 4
    assert all(set(update["samples"]["weight"]) == {1.0} for update in updates)
    assert any(alignment != 0 for alignment in updates[-1]["samples"]["alignment"])
    # The mean of the target gradient belongs to the weighting.
    whole = tmp_path / "off" / "iter_0000010", tmp_path / "bilevel" / "iter_0000010"
    assert_same_checkpoints(*whole, but="dwm.target_gradient.")
