"""Which schedule a resumed run follows, the flags' or the checkpoint's, and what is said of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_dwm.config.run import RunConfig, parse_run
from megatron_dwm.errors import UserError
from megatron_dwm.training.lr_schedule import Resumed, Schedule, choose_schedule

MODEL = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --max-position-embeddings 8 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 20 --dwm-mode off --micro-batch-size 2 --global-batch-size 4 "
)
RUN = (
    MODEL + "--train-iters 20 --lr 0.01 --min-lr 0.001 --lr-warmup-iters 2 --lr-decay-style cosine --weight-decay 0.1 "
)
BY_SAMPLES = MODEL + "--train-samples 80 --lr 0.01 --lr-warmup-samples 8 "
OVERRIDE, KEEP = "--override-opt-param-scheduler ", "--use-checkpoint-opt-param-scheduler "


def schedule(flags: str) -> tuple[Schedule, RunConfig]:
    config = parse_run(flags.split(), 1)
    return Schedule.from_flags(config.optimizer, config.training, config.sizes.global_batch_size), config


CONSUMED = 40


def resume(before: str, after: str) -> Resumed:
    """What a run with the flags ``after`` does with a checkpoint of a run with ``before`` after CONSUMED samples."""
    (saved, saved_config), (flags, config) = schedule(before), schedule(after)
    state: dict[str, Any] = {
        name: value
        for name, value in dataclasses.asdict(saved).items()
        if name not in ("init_lr", "wsd_decay_steps", "lr_wsd_decay_style", "decoupled_lr", "decoupled_min_lr")
    }
    arguments = saved_config.flat() | {"global_batch_size": saved_config.sizes.global_batch_size}
    found = Schedule.from_checkpoint(state, arguments, flags)
    assert found == saved
    batch, saved_batch = config.sizes.global_batch_size, saved_config.sizes.global_batch_size
    return choose_schedule(flags, found, config.optimizer, config.training, batch, saved_batch, CONSUMED)


@pytest.mark.parametrize("run", [RUN, BY_SAMPLES])
def test_the_same_flags_say_nothing(run: str):
    assert resume(run, run) == Resumed(schedule(run)[0])


CHANGES = {
    "--lr 0.02": "--lr 0.02 is not what the checkpoint was saved with, 0.01",
    "--min-lr 0": "--min-lr 0.0 is not what the checkpoint was saved with, 0.001",
    "--lr-warmup-iters 3": "--lr-warmup-iters 3 iterations is not what the checkpoint was saved with, 2 iterations",
    "--lr-warmup-init 0.001": "--lr-warmup-init 0.001 is not what the checkpoint was saved with, 0.0",
    "--lr-decay-iters 15": "--lr-decay-iters 15 iterations is not what the checkpoint was saved with, 20 iterations",
    "--lr-decay-style linear": "--lr-decay-style linear is not what the checkpoint was saved with, cosine",
    "--weight-decay 0.2": "--weight-decay 0.2 is not what the checkpoint was saved with, 0.1",
    "--decoupled-lr 0.004": "--decoupled-lr 0.004 is not what the checkpoint was saved with, None",
    "--lr-decay-style WSD --lr-wsd-decay-iters 5": "--lr-decay-style WSD is not what",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_named_with_both_values_and_the_two_ways_out(change: str):
    with pytest.raises(UserError, match=r"give --override-opt-param-scheduler .*--use-checkpoint-opt-param") as error:
        resume(RUN, RUN + change)
    assert str(error.value).startswith(CHANGES[change])


@pytest.mark.parametrize("change", CHANGES)
def test_override_takes_all_from_the_flags(change: str):
    assert resume(RUN, RUN + OVERRIDE + change) == Resumed(schedule(RUN + change)[0])


@pytest.mark.parametrize("change", [change for change in CHANGES if "decoupled" not in change])
def test_the_checkpoints_schedule_is_kept_and_the_flag_that_it_overrules_is_said(change: str):
    resumed = resume(RUN, RUN + KEEP + change)
    assert resumed.schedule == schedule(RUN)[0]
    assert len(resumed.messages) == 1 and change.split()[0] in resumed.messages[0]


def test_parameter_groups_cannot_be_kept_that_are_not_there():
    with pytest.raises(UserError, match=r"--decoupled-lr 0.004"):
        resume(RUN, RUN + KEEP + "--decoupled-lr 0.004")


def test_decoupled_rates_are_kept():
    resumed = resume(RUN + "--decoupled-lr 0.004 --decoupled-min-lr 0.002", RUN + KEEP + "--decoupled-lr 0.005")
    assert (resumed.schedule.decoupled_lr, resumed.schedule.decoupled_min_lr) == (0.004, 0.002)


def test_phases_of_wsd_are_kept():
    before = RUN + "--lr-decay-style WSD --lr-wsd-decay-iters 5 --lr-wsd-decay-style linear"
    kept = resume(before, RUN + KEEP + "--lr-decay-style WSD --lr-wsd-decay-iters 6").schedule
    assert (kept.wsd_decay_steps, kept.lr_wsd_decay_style) == (20, "linear")


@pytest.mark.parametrize("iterations", [10, 40])
def test_a_run_of_another_length_decays_over_that_length(iterations: int):
    resumed = resume(RUN, RUN.replace("--train-iters 20", f"--train-iters {iterations}"))
    assert (resumed.schedule.lr_decay_steps, resumed.schedule.lr_warmup_steps) == (4 * iterations, 8)
    assert len(resumed.messages) == 1
    assert f"over {iterations} iterations instead of the checkpoint's 20 iterations" in resumed.messages[0]


def test_a_longer_run_keeps_a_decay_that_has_a_length_of_its_own():
    own = RUN + "--lr-decay-iters 15 "
    resumed = resume(own, own.replace("--train-iters 20", "--train-iters 40"))
    assert resumed.schedule.lr_decay_steps == 60 and resumed.messages == ()


def test_a_longer_run_does_not_warm_up_again():
    fraction = RUN.replace("--lr-warmup-iters 2", "--lr-warmup-fraction 0.1")
    resumed = resume(fraction, fraction.replace("--train-iters 20", "--train-iters 200"))
    assert resumed.schedule.lr_warmup_steps == pytest.approx(8) and resumed.schedule.lr_decay_steps == 800


def test_a_longer_run_with_another_rate_is_still_refused():
    with pytest.raises(UserError, match=r"--lr 0\.02"):
        resume(RUN, RUN.replace("--train-iters 20", "--train-iters 40") + "--lr 0.02")


def test_another_batch_size_moves_a_schedule_in_iterations_but_not_one_in_samples():
    with pytest.raises(UserError, match="--global-batch-size 8 is not what the checkpoint was saved with, 4"):
        resume(RUN, RUN + "--global-batch-size 8")
    assert resume(RUN, RUN + "--global-batch-size 8 " + OVERRIDE).schedule.lr_warmup_steps == 16
    assert resume(RUN, RUN + "--global-batch-size 8 " + KEEP).schedule.lr_warmup_steps == 8
    assert resume(BY_SAMPLES, BY_SAMPLES + "--global-batch-size 8").messages == ()


@pytest.mark.parametrize(
    ("flags", "rest"),
    [
        (
            "--global-batch-size 2 --micro-batch-size 1 " + OVERRIDE,
            "40 of its 40 are done; the learning rate is lowest after 0",
        ),
        ("--global-batch-size 8 " + OVERRIDE, "40 of its 160 are done; the learning rate is lowest after 15 more"),
        ("--global-batch-size 8 " + KEEP, "40 of its 80 are done; the learning rate is lowest after 5 more iterations"),
    ],
)
def test_where_a_run_with_other_batches_continues_in_the_schedule_is_said(flags: str, rest: str):
    """With half the batch, the samples of the first half are all that the flags' schedule has."""
    *others, message = resume(RUN, RUN + flags).messages
    assert rest in message and all(line.count("--train-iters") == 1 for line in others)
    assert resume(RUN + "--lr-decay-style constant", RUN + "--lr-decay-style constant " + flags).messages in [
        (),
        (*others,),
    ]
