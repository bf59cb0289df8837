"""Learning rate and weight decay of the very steps that a resumed run makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.errors import UserError
from tests.distributed.checkpointed import Leg, Trained, train_legs
from tests.small_runs import LLAMA, Flags

STOP = 2
SAVED = {"--lr": 0.01, "--min-lr": 0.001, "--lr-decay-style": "cosine", "--weight-decay": 0.1}
OTHER = {"--lr": 0.005, "--min-lr": 0.0005, "--lr-decay-style": "linear", "--weight-decay": 0.2}
OVERRIDE = {"--override-opt-param-scheduler": True}
KEEP = {"--use-checkpoint-opt-param-scheduler": True}
KINDS: dict[str, Flags] = {"plain": {}, "distributed": {"--use-distributed-optimizer": True}}


def leg(*groups: Flags, **where: Any) -> Leg:
    """Return the leg with the flags of all groups; the last one that has a flag counts."""
    flags = dict(LLAMA)
    for group in groups:
        flags.update(group)
    return Leg(flags, **where)


def rates(trained: Trained) -> list[tuple[float, float]]:
    """Learning rate of each step, and weight decay of the parameters that decay."""
    return [max(groups, key=lambda group: group[1]) for groups in trained.rates]


@pytest.mark.parametrize("kind", KINDS)
def test_the_flag_of_the_schedule_that_counts_is_followed_from_the_first_step_on(kind: str, tmp_path: Path):
    flags = KINDS[kind]
    before, after, overriding, keeping = train_legs(
        1,
        [
            leg(SAVED, flags, save=(tmp_path, STOP)),
            leg(OTHER, flags),
            leg(OTHER, flags, OVERRIDE, load=(tmp_path, STOP)),
            leg(OTHER, flags, KEEP, load=(tmp_path, STOP)),
        ],
    )
    assert rates(overriding) == rates(after)[STOP:] and rates(after)[STOP][1] == 0.2
    assert rates(keeping) == rates(before)[STOP:] and rates(before)[STOP][1] == 0.1
    assert keeping.losses == before.losses[STOP:]


def test_decoupled_rates_follow_the_same_rule(tmp_path: Path):
    """Both sets of rates are in the groups: of embedding and output layer, and of the rest."""
    saved, other = (
        {**SAVED, "--decoupled-lr": 0.003, "--decoupled-min-lr": 0.002},
        {**OTHER, "--decoupled-lr": 0.004},
    )
    before, after, overriding, keeping = train_legs(
        1,
        [
            leg(saved, save=(tmp_path, STOP)),
            leg(other),
            leg(other, OVERRIDE, load=(tmp_path, STOP)),
            leg(other, KEEP, load=(tmp_path, STOP)),
        ],
    )
    assert overriding.rates == after.rates[STOP:] and len(set(after.rates[STOP])) == 3
    assert keeping.rates == before.rates[STOP:]


def test_a_longer_run_follows_the_longer_schedule(tmp_path: Path):
    longer, _, extended = train_legs(
        1,
        [
            leg(SAVED, {"--train-iters": 20}),
            leg(SAVED, save=(tmp_path, STOP), last=STOP),
            leg(SAVED, {"--train-iters": 20}, load=(tmp_path, STOP)),
        ],
    )
    assert rates(extended) == rates(longer)[STOP:]


def test_hyperparameters_of_the_optimizer_are_the_flags(tmp_path: Path):
    """Of Adam too: a resumed run with other ones makes the steps of a run that has them."""
    other = {"--adam-beta2": 0.9, "--adam-eps": 1e-4}
    _, changed, kept = train_legs(
        1,
        [
            leg(SAVED, save=(tmp_path, STOP), last=STOP),
            leg(SAVED, other, load=(tmp_path, STOP)),
            leg(SAVED, load=(tmp_path, STOP)),
        ],
    )
    assert changed.losses[0] == kept.losses[0]  # before the first step
    assert changed.losses[1] != kept.losses[1]


def test_what_cannot_go_on_is_one_line(tmp_path: Path):
    train_legs(1, [leg(SAVED, save=(tmp_path, STOP), last=STOP)])
    for flags, said in (
        ({"--lr": 0.02}, "--lr 0.02 is not what the checkpoint was saved with, 0.01; give --override-opt-param"),
        ({"--optimizer": "sgd"}, "--optimizer sgd cannot use the checkpoint's state of adam"),
    ):
        with pytest.raises(UserError, match=said):
            train_legs(1, [leg(SAVED, flags, load=(tmp_path, STOP))])
        train_legs(1, [leg(SAVED, flags, {"--no-load-optim": True}, load=(tmp_path, STOP), last=STOP + 1)])
