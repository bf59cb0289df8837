"""Microbatches in flight, and memory of the weighter."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megatron_dwm.config.run import RunConfig
from megatron_dwm.data.tokenizers import build_tokenizer
from megatron_dwm.model.vocabulary import Vocabulary
from megatron_dwm.plan.memory import in_flight
from megatron_dwm.plan.meter import Meter
from megatron_dwm.plan.stages import measure_stages
from megatron_dwm.plan.weighter import plan_weighter
from megatron_dwm.weighting.bilevel.replay import Replay
from megatron_dwm.weighting.bilevel.ridge import RidgeLearner
from megatron_dwm.weighting.inputs import WeighterInputs, sample_tokens
from megatron_dwm.weighting.weighter import Weighter
from megatron_dwm.weighting.weighter_init import random_weighter_model
from tests.small_runs import IN_PROCESS, LLAMA, VOCAB_SIZE, parse_flags


def test_microbatches_in_flight_are_those_of_the_schedule():
    pipeline = {**IN_PROCESS, **LLAMA, "--num-layers": 4, "--pipeline-model-parallel-size": 4, "--micro-batch-size": 1}
    config = parse_flags(pipeline, 4)
    assert [in_flight(config.parallel, config.sizes.virtual_stages, stage, 8) for stage in range(4)] == [
        [4],
        [3],
        [2],
        [1],
    ]
    assert [in_flight(config.parallel, config.sizes.virtual_stages, stage, 2) for stage in range(4)] == [
        [2],
        [2],
        [2],
        [1],
    ]
    interleaved = {**pipeline, "--num-layers": 8, "--num-virtual-stages-per-pipeline-rank": 2}
    config = parse_flags(interleaved, 4)
    # The first stage runs 2 x 3 + 4 forward passes before the one that a backward pass follows: 4, 4, and 3 again.
    assert in_flight(config.parallel, config.sizes.virtual_stages, 0, 8) == [7, 4] and in_flight(
        config.parallel, config.sizes.virtual_stages, 3, 8
    ) == [4, 1]


def _kept(config: RunConfig, *, for_gpu: bool) -> int:
    """What the first microbatch of the first stage keeps for its backward pass, in bytes."""
    return measure_stages(config, Vocabulary(VOCAB_SIZE), for_gpu=for_gpu)[0].training[0].kept


def test_a_gpu_keeps_neither_attention_matrices_nor_copies_of_norms():
    sizes = {"--seq-length": 512, "--max-position-embeddings": 512, "--attention-dropout": 0.1, "--dwm-mode": "off"}
    config = parse_flags({**IN_PROCESS, **LLAMA, **sizes, "--num-layers": 2, "--bf16": True}, 1)
    with multiprocessing.get_context("fork").Pool(1) as other_process:  # which a plan changes
        kept = {for_gpu: other_process.apply(_kept, (config,), {"for_gpu": for_gpu}) for for_gpu in (False, True)}
    tokens = config.training.micro_batch_size * 512
    matrices = 2 * tokens * config.model.num_attention_heads * 512 * 2  # of two layers, in bf16
    # Of a layer: two norms' outputs, queries, keys and values together and again rotated, what the attention gives
    # twice, the MLP's two halves and their product, and the two sums with the residual; and then of the whole model its
    # embeddings, the last norm and the logits with their softmax in fp32.
    hidden, groups, ffn = config.model.hidden_size, config.model.query_groups * config.model.head_size, config.model.ffn
    layer = 2 * hidden + (hidden + 2 * groups) + (hidden + groups) + 2 * hidden + 3 * ffn + 2 * hidden
    by_hand = 2 * tokens * (2 * layer + 2 * hidden) + tokens * VOCAB_SIZE * 4
    assert by_hand <= kept[True] <= 1.15 * by_hand
    assert kept[False] > kept[True] + matrices


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("arch", ["ngram", "llama"])
def test_the_memory_of_a_weighter_that_learns(arch: str, alone: None):
    """A linear one is held against what its regression takes; of others their parameters are known."""
    config = parse_flags(
        {
            **IN_PROCESS,
            **LLAMA,
            "--seq-length": 128,
            "--max-position-embeddings": 128,
            "--dwm-arch": arch,
            "--dwm-replay": 16,
            "--dwm-ngram-buckets": 512,
        },
        1,
    )
    tokenizer = build_tokenizer(config.tokenizer)
    vocab, eod = int(tokenizer.vocab_size), int(tokenizer.eod)
    settings, sequence = config.weighting, config.model.seq_length
    inputs = WeighterInputs(sample_tokens(sequence, tokenizer, config.tokenizer))
    planned = plan_weighter(settings, config.model, config.sizes, inputs)
    model = random_weighter_model(settings, vocab, sequence, eod, seed=1)
    weighter = Weighter(model, settings, torch.device("cpu"))
    assert planned.parameters == weighter.num_parameters and planned.is_linear == weighter.is_linear
    samples = config.sizes.global_batch_size
    replay_size = 16 * samples * sequence * 4
    if arch == "llama":
        assert planned.held == 12 * weighter.num_parameters + replay_size
        assert planned.traffic.payloads == {}  # of one process
        return
    features = 16 * samples * sequence * 2 * (4 + 4)  # bucket and value of the token and of the pair that ends there
    assert planned.held == 4 * 512 + replay_size + features
    replay, tokens = Replay(16, None), torch.Generator().manual_seed(0)
    for _ in range(16):
        drawn = torch.randint(0, vocab, (samples, sequence), generator=tokens)
        replay.append(drawn, torch.arange(samples), torch.randn(samples, dtype=torch.float64, generator=tokens))
    with Meter() as meter:
        RidgeLearner(settings, weighter).learn(replay)
    assert meter.peak <= planned.learning <= 2 * meter.peak
