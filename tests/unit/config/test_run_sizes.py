"""The sizes of a run's batches, which follow from several flags and the number of processes."""

from __future__ import annotations

import pytest

from tests.unit.config.test_run import BY_SAMPLES, RUN, parse


def test_batches_follow_from_the_world():
    config = parse(f"{RUN} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", world_size=8)
    assert (config.sizes.data_parallel_size, config.sizes.global_batch_size, config.sizes.num_microbatches) == (2, 4, 1)
    assert parse(f"{BY_SAMPLES} --global-batch-size 6").train_iters == 10


def test_evaluations_may_have_batches_of_their_own():
    sizes = parse(f"{RUN} --global-batch-size 8").sizes
    assert (sizes.eval_batch_size, sizes.eval_micro_batch) == (8, 2)
    sizes = parse(f"{RUN} --global-batch-size 8 --eval-global-batch-size 6 --eval-micro-batch-size 3").sizes
    assert (sizes.eval_batch_size, sizes.eval_micro_batch) == (6, 3)


@pytest.mark.parametrize(
    ("flags", "world", "samples", "micro"),
    [
        ("", 1, 4, 4),
        ("", 2, 4, 2),
        ("--dwm-target-batch-size 32", 2, 32, 4),
        ("--dwm-target-batch-size 6", 2, 6, 3),  # one microbatch a replica
        ("--dwm-target-batch-size 1", 1, 1, 1),
        ("--micro-batch-size 32", 1, 4, 4),
        (
            "--micro-batch-size 8 --tp-comm-overlap --tensor-model-parallel-size 2 --sequence-parallel "
            "--dwm-alignment finite-difference",
            2,
            8,
            8,
        ),
        ("--global-batch-size 36", 1, 8, 4),
        ("--micro-batch-size 2 --global-batch-size 18", 1, 4, 2),
        ("--micro-batch-size 6 --global-batch-size 60", 5, 10, 2),
        ("--pipeline-model-parallel-size 2 --num-layers 4 --num-virtual-stages-per-pipeline-rank 2", 2, 8, 4),
        (
            "--micro-batch-size 16 --pipeline-model-parallel-size 2 --num-layers 4 "
            "--num-virtual-stages-per-pipeline-rank 2",
            2,
            32,
            16,
        ),
        (
            "--micro-batch-size 2 --global-batch-size 10 --pipeline-model-parallel-size 2 --num-layers 4 "
            "--num-virtual-stages-per-pipeline-rank 2 --microbatch-group-size-per-virtual-pipeline-stage 3",
            2,
            6,
            2,
        ),
    ],
)
def test_targets_are_an_eighth_of_the_batch_and_few_are_one_microbatch(
    flags: str, world: int, samples: int, micro: int
):
    config = parse(f"{RUN} --micro-batch-size 4 --global-batch-size 32 {flags}", world)
    assert (config.sizes.target_batch_size, config.sizes.target_micro_batch) == (samples, micro)
    assert samples % (micro * config.sizes.data_parallel_size) == 0


@pytest.mark.parametrize(
    ("flags", "momentum", "samples"),
    [
        ("", 0.78, 1),
        ("--dwm-target-batch-size 8", 0.0, 8),  # what it was before there was a mean
        ("--dwm-target-batch-size 8 --dwm-target-momentum 0.5", 0.5, 8),
        ("--dwm-target-momentum 0", 0.0, 1),
        ("--dwm-mode rule --dwm-rule similarity", 0.0, 8),
    ],
)
def test_few_targets_are_averaged_over_updates(flags: str, momentum: float, samples: int):
    config = parse(f"{RUN} --micro-batch-size 2 --global-batch-size 8 {flags}")
    assert (config.weighting.target_momentum, config.sizes.target_batch_size) == (momentum, samples)
