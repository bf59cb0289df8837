"""Alignments where the pipeline's stages differ, against autograd in float64 as in test_alignment.py."""

from __future__ import annotations

import pytest

from tests.distributed.harness import run_distributed
from tests.distributed.test_alignment import align, check
from tests.small_runs import GPT, LLAMA, Flags

PP2 = {"--pipeline-model-parallel-size": 2}


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        (GPT, {"--num-layers": 3, "--decoder-first-pipeline-num-layers": 1}),
        (LLAMA, {"--num-layers": 3, "--account-for-loss-in-pipeline-split": True}),
        (
            LLAMA,
            {
                "--num-layers": 4,
                "--pipeline-model-parallel-layout": "Ett|t|t|L",
                "--microbatch-group-size-per-virtual-pipeline-stage": 4,
                "--overlap-p2p-communication-warmup-flush": True,
            },
        ),
    ],
    ids=["fewer layers first", "the loss counts as a layer", "four stages as laid out, in groups of four"],
)
def test_alignments_of_stages_that_differ(model: Flags, flags: Flags):
    check(model, run_distributed(align, 2, {**model, **PP2, **flags}))
