"""Rules give the weights that they say, the same in every layout and after a resumption.

Shape legend: N samples of the global batch, s sequence length.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.utils import unwrap_model

from megatron_dwm.data.blend import DataPaths
from megatron_dwm.data.loader import BatchLoader
from megatron_dwm.data.sampler import build_sampler
from megatron_dwm.model.full_state import gather_full_state
from megatron_dwm.training.step import train_step
from megatron_dwm.weighting.build import build_weighting
from megatron_dwm.weighting.context import WeightingContext
from megatron_dwm.weighting.inputs import run_stages
from megatron_dwm.weighting.policy import SampleWeighting
from megatron_dwm.weighting.rules import half_of_samples
from tests.distributed.built_model import LAYOUTS, BuiltModel, build_model, random_mask, random_tokens
from tests.distributed.harness import run_distributed
from tests.small_runs import LLAMA, NUM_SAMPLES, SEQ_LENGTH, VOCAB_SIZE, Flags

STEPS = 5
RULES: dict[str, Flags] = {
    "loss": {},
    "half": {"--dwm-rule-seed": 2},
    "linupper": {},
    "similarity": {},
    "source-weights": {"--dwm-rule-sources": ["b"], "--dwm-rule-weights": [3]},
    "source-alignment": {"--dwm-num-stages": 1, "--dwm-update-interval": 2},
    "top-alignment": {"--dwm-rule-fraction": 0.25},
}
Weights = dict[str, list[torch.Tensor]]


class _NoSchedule:
    def step(self, increment: int) -> None:
        """A constant learning rate."""


def target_loader(built: BuiltModel, consumed: int) -> BatchLoader:
    """Reads random sequences."""
    tokens = torch.cat([random_tokens(seed) for seed in range(10, 20)])
    items = [
        {
            "tokens": row[:-1],
            "labels": row[1:],
            "loss_mask": torch.ones(SEQ_LENGTH),
            "position_ids": torch.arange(SEQ_LENGTH),
        }
        for row in tokens
    ]
    partition = built.sample_gather.partition
    sampler = build_sampler("single", len(items), consumed, partition, is_sharded=False)
    data = items if built.parallel_state.replica_rank == 0 else None
    return BatchLoader(data, sampler, partition, SEQ_LENGTH, built.parallel_state, VOCAB_SIZE, 0, consumed)


def made_weighting(built: BuiltModel) -> SampleWeighting:
    """The weighting of the model's flags, for data of two sources."""
    config = built.config
    context = WeightingContext(
        settings=config.weighting,
        model=config.model,
        sizes=config.sizes,
        seed=config.training.seed,
        bf16=False,
        log_interval=config.logging.log_interval,
        save=None,
        inputs=None,
        stages=run_stages(config.weighting, config.train_iters),
        paths=DataPaths((["a", "b"], None), (None, None, None), None, None),
        tokenizer=None,
        tokenizer_flags=config.tokenizer,
        padded_vocab_size=VOCAB_SIZE,
        engine=built.engine,
        optimizer=built.optimizer,
        partition=built.sample_gather.partition,
        parallel_state=built.parallel_state,
        make_target_loader=lambda consumed: target_loader(built, consumed),
        device=torch.device("cpu"),
    )
    return build_weighting(context)


def set_parameters(built: BuiltModel, full: dict[str, torch.Tensor]) -> None:
    """Give this rank its parts of a whole model's parameters, which each layout draws otherwise."""
    for chunk in unwrap_model(built.chunks):
        sharded = chunk.sharded_state_dict()
        apply_factories(sharded)
        for value in nested_values(sharded):
            if isinstance(value, ShardedTensor):
                value.data.detach().copy_(full[value.key][value.global_slice()])
    built.optimizer.reload_model_params()


def trained(parallel: Flags, steps: int, resumed: int | None, full: dict[str, torch.Tensor]) -> Weights:
    """The weights of each step under each rule; the weighting is made anew from its state before step ``resumed``."""
    found: Weights = {}
    for rule, flags in RULES.items():
        mode = {"--dwm-mode": "rule", "--dwm-rule": rule}
        built = build_model({**LLAMA, **parallel, **mode, **flags, "--dwm-target-data-path": False})
        set_parameters(built, full)
        weighting, found[rule] = made_weighting(built), []
        for iteration in range(1, steps + 1):
            if iteration == resumed:
                state, weighting = weighting.state_dict(), made_weighting(built)
                weighting.load_state_dict(state)
            batch = built.batch(random_tokens(iteration), random_mask(2))
            sources = (torch.arange(NUM_SAMPLES) // 2) % 2
            numbers = torch.arange(NUM_SAMPLES) + iteration * NUM_SAMPLES
            select = built.sample_gather.select_replica
            batch = replace(batch, source=select(sources), index=select(numbers))
            weighting.before_step(iteration)
            weights = weighting.weigh(iteration, batch)
            assert weights is not None
            replica: Any = weights.replica_sample_weights
            outcome = train_step(built.engine, built.optimizer, _NoSchedule(), batch, 2, replica)
            weighting.after_step(iteration, batch, weights, outcome)
            assert weighting.flops(iteration, outcome) >= 0
            check_metrics(weighting.metrics(iteration, batch, weights), weights.sample_weights, sources)
            found[rule].append(weights.sample_weights)
    return found


def check_metrics(metrics: dict[str, Any], weights: torch.Tensor, sources: torch.Tensor) -> None:
    """The figures by source are those of the whole batch; samples count by their tokens in a microbatch of two."""
    tokens = random_mask(2).sum(1).double()
    factors = tokens / tokens.view(-1, 2).mean(1).repeat_interleave(2)
    for number, name in enumerate(("a", "b")):
        members = sources == number
        assert metrics["share_by_source"][name] == pytest.approx(
            float((weights * factors)[members].sum()) / NUM_SAMPLES
        )
        assert metrics["fraction_by_source"][name] == pytest.approx(float(factors[members].sum()) / NUM_SAMPLES)
        assert metrics["weight_by_source"][name] == pytest.approx(float(weights[members].mean()))


@pytest.fixture(scope="module")
def full() -> dict[str, torch.Tensor]:
    return run_distributed(lambda: gather_full_state(build_model(LLAMA).chunks, lambda key: True), 1)[0]


@pytest.fixture(scope="module")
def one_process(full: dict[str, torch.Tensor]) -> Weights:
    return run_distributed(trained, 1, {}, STEPS, None, full)[0]


def test_each_rule_weighs_as_it_says(one_process: Weights):
    of_b = (torch.arange(NUM_SAMPLES) // 2) % 2 == 1
    for weights in one_process["source-weights"]:
        torch.testing.assert_close(weights, torch.where(of_b, 1.5, 0.5).double())
    first, second, third, *_ = one_process["source-alignment"]
    assert torch.equal(first, torch.ones(NUM_SAMPLES).double()) and torch.equal(second, first)
    assert third[of_b].unique().numel() == third[~of_b].unique().numel() == 1 and third[0] != third[2]
    numbers = np.arange(NUM_SAMPLES)
    for iteration, weights in enumerate(one_process["half"], 1):
        half = half_of_samples(numbers + iteration * NUM_SAMPLES, seed=2)
        assert (weights > 0).tolist() == half.tolist()
    before_adam, *others = one_process["top-alignment"]
    assert torch.equal(before_adam, first)
    for weights in others:
        assert sorted(weights.tolist()) == pytest.approx([0.0] * 6 + [4.0] * 2)
    for rule, fewest in (("loss", 3), ("linupper", 2), ("similarity", 3)):  # linupper caps all but the low losses
        assert all(len(weights.unique()) >= fewest for weights in one_process[rule])


@pytest.mark.parametrize(
    ("layout", "steps", "resumed"),
    [
        ("one process", STEPS, 4),
        ("TP2 x PP2", 3, None),
        ("TP2, sequence parallel, x DP2, distributed optimizer, overlapped", 4, 4),
    ],
)
def test_rules_weigh_alike_in_every_layout_and_after_a_resumption(
    layout: str, steps: int, resumed: int | None, one_process: Weights, full: dict[str, torch.Tensor]
):
    world, parallel = LAYOUTS[layout]
    for found in run_distributed(trained, world, parallel, steps, resumed, full):
        for rule, expected in one_process.items():
            # fp32 sums in another order, through Adam's first steps, which divide small numbers by small ones.
            torch.testing.assert_close(torch.stack(found[rule]), torch.stack(expected[:steps]), rtol=2e-3, atol=2e-3)
