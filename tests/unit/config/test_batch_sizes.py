"""Batch sizes that grow are megatron-core's."""

from __future__ import annotations

import pytest
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from megatron_dwm.config.batch_sizes import BatchSizes, Rampup
from megatron_dwm.errors import UserError


@pytest.mark.parametrize("should_decrease", [False, True])
@pytest.mark.parametrize(("final", "ramp"), [(24, (8, 8, 100)), (64, (8, 4, 333)), (8, (4, 4, 1))])
def test_a_run_has_megatron_cores_batches(final: int, ramp: tuple[int, int, int], should_decrease: bool):
    sizes = BatchSizes(final, 2, 2, Rampup(*ramp), should_decrease)
    theirs = RampupBatchsizeNumMicroBatchesCalculator(final, 2, 2, should_decrease, 1, *ramp)
    for consumed in range(400):
        theirs.update(consumed, consistency_check=True)
        assert sizes.nominal(consumed) == theirs.current_global_batch_size
        assert sizes.running(consumed) == theirs.current_running_global_batch_size


def test_batches_are_made_smaller_where_they_do_not_divide():
    sizes = BatchSizes(30, 2, 2, Rampup(10, 10, 40), should_decrease=True)
    assert sizes.running_sizes == [8, 20, 28]
    assert BatchSizes(30, 4, 1, should_decrease=True).running_sizes == [28]
    assert sizes.iterations(130) == 6  # of 10, 10, 20, and then 30
    assert [sizes.trained_samples(number) for number in (0, 2, 3, 6)] == [0, 16, 36, 120]
    assert BatchSizes(30, 3, 1).trained_samples(5) == 150


@pytest.mark.parametrize(
    ("final", "ramp", "said"),
    [
        (10, None, "--global-batch-size 10 is not divisible"),
        (16, Rampup(6, 5, 10), "a batch of 6 is not divisible"),
        (16, Rampup(4, 8, 10), "no number of increments leads to exactly --global-batch-size 16"),
        (16, Rampup(16, 16, 10), "no number of increments"),
        (16, Rampup(8, 8, 0), "must be at least 1"),
    ],
)
def test_batches_that_cannot_be_are_refused(final: int, ramp: Rampup | None, said: str):
    with pytest.raises(UserError, match=said):
        BatchSizes(final, 2, 2, ramp)
