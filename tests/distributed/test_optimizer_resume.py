"""Every optimizer and every set of parameter groups that the flags can make goes on from its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.checkpointed import Leg, train_legs
from tests.distributed.engine import GPT, LLAMA

STOP = 3
SCHEDULE = [
    *("--lr", "0.01", "--min-lr", "0.001", "--lr-decay-style", "cosine", "--lr-warmup-iters", "2"),
    *("--weight-decay", "0.1"),
]
DECOUPLED = ["--decoupled-lr", "0.003", "--decoupled-min-lr", "0.0005"]
GROWING_DECAY = [
    *("--weight-decay-incr-style", "linear", "--start-weight-decay", "0.01", "--end-weight-decay", "0.2"),
]
DISTRIBUTED = ["--use-distributed-optimizer"]
RESHARDABLE = [*DISTRIBUTED, "--dist-ckpt-optim-fully-reshardable"]
SGD = ["--optimizer", "sgd"]
FP16 = ["--fp16", "--initial-loss-scale", "256"]
PP2 = ["--pipeline-model-parallel-size", "2"]
OPTIMIZERS = {
    "adam": [],
    "adam, distributed": DISTRIBUTED,
    "adam, distributed, reshardable": RESHARDABLE,
    "sgd": SGD,
    "sgd without momentum": [*SGD, "--sgd-momentum", "0"],
}
PRECISIONS = {"fp32": [], "bf16": ["--bf16"], "fp16": FP16}
CASES: dict[str, tuple[int, list[str]]] = {
    f"{optimizer}, {precision}, {groups}": (1, [*LLAMA, *flags, *half, *group_flags])
    for optimizer, flags in OPTIMIZERS.items()
    for precision, half in PRECISIONS.items()
    for groups, group_flags in {"one rate": [], "decoupled": DECOUPLED}.items()
}
CASES |= {
    "tied embeddings, decoupled": (1, [*GPT, *DECOUPLED]),
    "tied embeddings, decoupled, PP2": (2, [*GPT, *PP2, *DECOUPLED]),
    "tied embeddings, decoupled, PP2, bf16, distributed": (2, [*GPT, *PP2, *DECOUPLED, "--bf16", *DISTRIBUTED]),
    "DP2, decoupled, distributed": (2, [*LLAMA, *DECOUPLED, *DISTRIBUTED]),
    "DP2, decoupled, distributed, reshardable": (2, [*LLAMA, *DECOUPLED, *RESHARDABLE]),
    "sgd, PP2, decoupled": (2, [*LLAMA, *PP2, *SGD, *DECOUPLED]),
    "growing weight decay": (1, [*LLAMA, *GROWING_DECAY]),
}


@pytest.mark.parametrize("case", CASES)
def test_goes_on_as_if_it_had_not_stopped(case: str, tmp_path: Path):
    processes, flags = CASES[case]
    flags = [*SCHEDULE, *flags]
    whole, _, resumed = train_legs(
        processes, [Leg(flags), Leg(flags, save=tmp_path, last=STOP), Leg(flags, load=(tmp_path, STOP))]
    )
    assert resumed.rates == whole.rates[STOP:]
    assert len({rate for rate, _ in whole.rates[-1]}) == (2 if "decoupled" in case else 1)
    assert resumed.losses == whole.losses[STOP:] and len(resumed.losses) == 3
    for name, value in whole.parameters.items():
        assert torch.equal(resumed.parameters[name], value), name
