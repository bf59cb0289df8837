"""The estimate of memory is Megatron-LM's (report_theoretical_memory of core_v0.16.1), recorded for some layouts."""

from __future__ import annotations

import json

import pytest

from megatron_dwm.config.run import parse_run
from megatron_dwm.model.memory import memory_estimate
from tests.paths import FIXTURES

RECORDED = json.loads((FIXTURES / "megatron/memory.json").read_text())
REST = (
    "--seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 2 --global-batch-size 64 --train-iters 9 "
    "--lr 0.1 --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --dwm-mode off"
)


@pytest.mark.parametrize("case", RECORDED)
def test_the_lines_are_megatron_lms(case: str):
    recorded = RECORDED[case]
    config = parse_run([*recorded["flags"].split(), *REST.split()], recorded["processes"])
    lines = memory_estimate(
        config.model,
        config.parallel,
        padded_vocab_size=50304,
        data_parallel_size=config.sizes.data_parallel_size,
        micro_batch_size=config.training.micro_batch_size,
        num_microbatches=config.sizes.num_microbatches,
    )
    assert "\n".join(lines).rstrip("\n").splitlines() == recorded["lines"]
