"""Every optimizer and every set of parameter groups that the flags can make goes on from its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_dwm.errors import UserError
from megatron_dwm.model.optimizer_parts import optimizer_parts
from megatron_dwm.training.checkpoint import _are_all_finite, _optimizer_state
from megatron_dwm.training.optimizer import allocate_state
from tests.distributed.built_model import LAYOUTS, build_model
from tests.distributed.checkpointed import Leg, train_legs
from tests.distributed.harness import run_distributed
from tests.small_runs import GPT, LLAMA, Flags

STOP = 2
SCHEDULE = {
    "--lr": 0.01,
    "--min-lr": 0.001,
    "--lr-decay-style": "cosine",
    "--lr-warmup-iters": 2,
    "--weight-decay": 0.1,
}
DECOUPLED = {"--decoupled-lr": 0.003, "--decoupled-min-lr": 0.0005}
GROWING_DECAY = {"--weight-decay-incr-style": "linear", "--start-weight-decay": 0.01, "--end-weight-decay": 0.2}
DISTRIBUTED = {"--use-distributed-optimizer": True}
RESHARDABLE = {**DISTRIBUTED, "--dist-ckpt-optim-fully-reshardable": True}
BUCKETS = {**DISTRIBUTED, "--overlap-grad-reduce": True}
SMALL_BUCKETS = {**BUCKETS, "--ddp-bucket-size": 3000}
SGD = {"--optimizer": "sgd"}
FP16 = {"--fp16": True, "--initial-loss-scale": 256}
PP2 = {"--pipeline-model-parallel-size": 2}
BF16 = {"--bf16": True}
# Those of one process; what they leave out is in the cases of two processes below.
OPTIMIZERS: dict[str, Flags] = {
    "adam": {},
    "adam, bf16": BF16,
    "adam, fp16": FP16,
    "adam, fp16, distributed": {**FP16, **DISTRIBUTED},
    "adam, fp16, distributed, reshardable": {**FP16, **RESHARDABLE},
    "sgd, fp16": {**SGD, **FP16},
    "sgd without momentum": {**SGD, "--sgd-momentum": 0},
}
CASES: dict[str, tuple[int, Flags]] = {
    f"{name}, decoupled": (1, {**LLAMA, **flags, **DECOUPLED}) for name, flags in OPTIMIZERS.items()
}
CASES |= {
    "one rate": (1, LLAMA),
    "tied embeddings, decoupled, PP2": (2, {**GPT, **PP2, **DECOUPLED}),
    "tied embeddings, decoupled, PP2, bf16, distributed": (
        2,
        {**GPT, **PP2, **DECOUPLED, **BF16, **DISTRIBUTED},
    ),
    "DP2, decoupled, distributed": (2, {**LLAMA, **DECOUPLED, **DISTRIBUTED}),
    "DP2, decoupled, distributed, reshardable": (2, {**LLAMA, **DECOUPLED, **RESHARDABLE}),
    "DP2, decoupled, distributed, many buckets, bf16, in the format torch": (
        2,
        {**LLAMA, **DECOUPLED, **SMALL_BUCKETS, **BF16, "--ckpt-format": "torch"},
    ),
    "interleaved, tied embeddings, distributed, in the format torch": (
        2,
        {**GPT, **LAYOUTS["PP2, interleaved"][1], **DISTRIBUTED, "--ckpt-format": "torch"},
    ),
    "sgd, PP2, decoupled": (2, {**LLAMA, **PP2, **SGD, **DECOUPLED}),
    "growing weight decay": (1, {**LLAMA, **GROWING_DECAY}),
}


@pytest.mark.parametrize("case", CASES)
def test_goes_on_as_if_it_had_not_stopped(case: str, tmp_path: Path):
    processes, flags = CASES[case]
    flags = {**SCHEDULE, **flags}
    whole, resumed = train_legs(processes, [Leg(flags, save=(tmp_path, STOP)), Leg(flags, load=(tmp_path, STOP))])
    assert resumed.rates == whole.rates[STOP:]
    assert len({rate for rate, _ in whole.rates[-1]}) == (2 if "decoupled" in case else 1)
    assert resumed.losses == whole.losses[STOP:] and len(resumed.losses) == 2
    for name, value in whole.parameters.items():
        assert torch.equal(resumed.parameters[name], value), name


def test_the_format_torch_is_loaded_by_the_kind_of_optimizer_that_saved_it(tmp_path: Path):
    flags = {**SCHEDULE, **LLAMA, "--ckpt-format": "torch"}
    train_legs(1, [Leg({**flags, **DISTRIBUTED}, save=(tmp_path, STOP), last=STOP)])
    with pytest.raises(UserError, match="was saved with --use-distributed-optimizer and this run is without it"):
        train_legs(1, [Leg(flags, load=(tmp_path, STOP))])
    folder = tmp_path / f"iter_{STOP:07d}"
    (folder / "checksums.json").unlink()  # as Megatron-LM, which writes none
    torch.save({0: {}}, folder / "mp_rank_00/distrib_optim.pt")
    with pytest.raises(UserError, match=r"mp_rank_00/distrib_optim\.pt does not hold buffer 0 of this run"):
        train_legs(1, [Leg({**flags, **DISTRIBUTED}, load=(tmp_path, STOP))])


TP2 = {"--tensor-model-parallel-size": 2}
MOVES: dict[str, tuple[int, Flags, Flags, Flags]] = {
    "to the distributed optimizer, reshardable": (1, LLAMA, {}, RESHARDABLE),
    "from the distributed optimizer, fp16, reshardable": (1, {**LLAMA, **FP16}, RESHARDABLE, {}),
    "to the distributed optimizer, DP2, fp16": (2, {**LLAMA, **FP16}, {}, DISTRIBUTED),
    "to the distributed optimizer, DP2, bf16, decoupled": (2, {**LLAMA, **BF16, **DECOUPLED}, {}, DISTRIBUTED),
    "from the distributed optimizer, DP2, bf16, decoupled": (
        2,
        {**LLAMA, **BF16, **DECOUPLED},
        DISTRIBUTED,
        {},
    ),
    "from the distributed optimizer, PP2, tied": (2, {**GPT, **PP2}, DISTRIBUTED, {}),
    "from the distributed optimizer, TP2": (2, {**LLAMA, **TP2}, DISTRIBUTED, {}),
    "to the distributed optimizer, PP2, tied": (2, {**GPT, **PP2}, {}, DISTRIBUTED),
    "from many buckets to one": (2, LLAMA, SMALL_BUCKETS, BUCKETS),
    "from one bucket to many, bf16": (2, {**LLAMA, **BF16}, DISTRIBUTED, SMALL_BUCKETS),
}


@pytest.mark.parametrize("case", MOVES)
def test_goes_on_with_another_kind_of_optimizer_on_the_same_curve(case: str, tmp_path: Path):
    processes, model, before, after = MOVES[case]
    flags = {**SCHEDULE, **model}
    whole, _, moved = train_legs(
        processes,
        [
            Leg({**flags, **after}),
            Leg({**flags, **before}, save=(tmp_path, STOP), last=STOP),
            Leg({**flags, **after}, load=(tmp_path, STOP)),
        ],
    )
    assert moved.rates == whole.rates[STOP:]
    # Either kind makes the same step of the same gradients, so that nothing but a lost value can make a difference.
    assert moved.losses == whole.losses[STOP:] and len(moved.losses) == 2
    for name, value in whole.parameters.items():
        assert torch.equal(moved.parameters[name], value), name


@pytest.mark.parametrize("sharding", [DISTRIBUTED, RESHARDABLE], ids=["by rank", "reshardable"])
def test_context_parallelism_comes_and_goes(sharding: Flags, tmp_path: Path):
    """Two ranks that divide the samples, and two that divide the sequences, go on from each other's checkpoint."""
    flags = {**SCHEDULE, **LLAMA, **sharding}
    divided = {**flags, "--context-parallel-size": 2}
    from_whole, from_divided = tmp_path / "whole", tmp_path / "divided"
    whole, _, *resumed = train_legs(
        2,
        [
            Leg(flags, save=(from_whole, STOP)),
            Leg(divided, save=(from_divided, STOP), last=STOP),
            Leg(divided, load=(from_whole, STOP)),
            Leg(flags, load=(from_divided, STOP)),
        ],
    )
    for leg in resumed:
        assert leg.rates == whole.rates[STOP:]
        assert leg.losses == pytest.approx(whole.losses[STOP:], rel=1e-5)


def test_the_distributed_optimizer_is_given_up_under_another_layout(tmp_path: Path):
    """Reshardable state moves to any layout of any kind of optimizer."""
    flags = {**SCHEDULE, **LLAMA}
    (whole,) = train_legs(1, [Leg(flags)])
    train_legs(2, [Leg({**flags, **RESHARDABLE}, save=(tmp_path, STOP), last=STOP)])
    (moved,) = train_legs(2, [Leg({**flags, **TP2}, load=(tmp_path, STOP))])
    # Sums over ranks are rounded in another order.
    assert moved.losses == pytest.approx(whole.losses[STOP:], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ({}, {}, BF16),
        ({}, BF16, FP16),
        (RESHARDABLE, {}, BF16),
        (RESHARDABLE, BF16, {}),
    ],
)
def test_goes_on_in_another_precision(kind: Flags, before: Flags, after: Flags, tmp_path: Path):
    flags = {**SCHEDULE, **LLAMA, **kind}
    whole, moved = train_legs(
        1, [Leg({**flags, **before}, save=(tmp_path, STOP)), Leg({**flags, **after}, load=(tmp_path, STOP))]
    )
    # bf16 has 8 bits: the losses of the two runs differ by its rounding. Lost moments or parameters cost more than 0.1.
    assert moved.losses == pytest.approx(whole.losses[STOP:], abs=0.02)


@pytest.mark.parametrize("flags", [{}, DISTRIBUTED], ids=["whole", "sharded"])
def test_a_state_that_is_not_finite_is_found_on_every_rank(flags: Flags):
    """The parameters may be finite nevertheless: Adam's step is zero where its second moment has overflowed."""

    def work() -> list[bool]:
        built = build_model({**LLAMA, **flags, "--dwm-mode": "off"})
        allocate_state(built.optimizer)
        found = [_are_all_finite(_optimizer_state(built.optimizer))]
        (part,) = optimizer_parts(built.optimizer)
        if built.parallel_state.rank == 1:
            next(iter(part.optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = float("inf")
        return [*found, _are_all_finite(_optimizer_state(built.optimizer))]

    assert run_distributed(work, 2) == [[True, False]] * 2
