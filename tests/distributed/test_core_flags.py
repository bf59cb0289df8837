"""Flags that act inside megatron-core: what the objects of a built model, and the files of its checkpoints, show."""

from __future__ import annotations

from pathlib import Path

import pytest
from megatron.core import parallel_state as mpu

from megatron_dwm.model.optimizer_parts import optimizer_parts
from tests.distributed.built_model import build_model
from tests.distributed.checkpointed import Leg, train_legs
from tests.distributed.harness import run_distributed
from tests.small_runs import LLAMA, Flags

FP16 = {**LLAMA, "--fp16": True, "--initial-loss-scale": 8, "--overlap-grad-reduce": True}


def _objects(flags: Flags) -> tuple[float, int, int, bool]:
    """Return the lowest loss scale, after how many steps it grows, the number of buckets, whether there is gloo."""
    built = build_model({**FP16, **flags})
    (scaler,) = (part.grad_scaler for part in optimizer_parts(built.optimizer))
    buckets = sum(len(group.buckets) for chunk in built.chunks for group in chunk.bucket_groups)
    has_gloo = mpu._DATA_PARALLEL_GROUP_GLOO is not None
    return float(scaler.min_scale), scaler.growth_interval, buckets, has_gloo


def test_megatron_core_follows_the_flags():
    assert run_distributed(_objects, 1, {}) == [(1.0, 1000, 1, True)]
    flags = {"--min-loss-scale": 4, "--loss-scale-window": 7, "--ddp-num-buckets": 3}
    ((lowest, window, buckets, has_gloo),) = run_distributed(
        _objects, 1, {**flags, "--disable-gloo-process-groups": True}
    )
    assert (lowest, window, has_gloo) == (4.0, 7, False) and buckets >= 3


@pytest.mark.parametrize(
    ("flags", "writers"), [({}, {"0", "1"}), ({"--no-ckpt-fully-parallel-save": True}, {"0"})], ids=["all", "one"]
)
def test_all_replicas_write_or_one(flags: Flags, writers: set[str], tmp_path: Path):
    """And what one has written, all may read in parts."""
    (saved,) = train_legs(2, [Leg({**LLAMA, **flags}, save=(tmp_path, 2))])
    assert {path.name.split("_")[2] for path in tmp_path.glob("iter_*/*.distcp")} == writers
    (resumed,) = train_legs(2, [Leg({**LLAMA, "--ckpt-fully-parallel-load": True}, load=(tmp_path, 2))])
    assert resumed.losses == saved.losses[2:]
