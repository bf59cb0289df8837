"""What a resumed run says of flags that make it go on in another way than it may seem."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_dwm.config.run import parse_run
from megatron_dwm.training.resume_checks import resume_warnings
from megatron_dwm.training.saved_checkpoint import SavedCheckpoint
from megatron_dwm.training.train_state import TrainState

RUN = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --max-position-embeddings 8 --lr 0.01 "
    "--tokenizer-type NullTokenizer --vocab-size 20 --micro-batch-size 2 --global-batch-size 4 --data-path train "
)
BY_ITERS, BY_SAMPLES = RUN + "--train-iters 20 ", RUN + "--train-samples 80 "
TARGET, OFF = "--dwm-target-data-path target ", "--dwm-mode off "
REPLAY = {"replay": [{}, {}]}


def warnings(flags: str, iteration: int = 10, target: str = "target", state: dict[str, object] = REPLAY) -> list[str]:
    arguments = Namespace(dwm_target_data_path=target.split(), vocab_size=20)
    saved = SavedCheckpoint(Path("save", "iter_1"), {"args": arguments}, None)
    train_state = TrainState(iteration=iteration, consumed_train_samples=4 * iteration)
    return resume_warnings(parse_run(flags.split(), 1), saved, train_state, state)


@pytest.mark.parametrize("run", [BY_ITERS, BY_SAMPLES])
def test_a_run_that_goes_on_says_nothing(run: str):
    assert warnings(run + TARGET) == []
    assert warnings(run + TARGET, iteration=20) == []  # it has finished
    assert warnings(run + TARGET + "--skip-train", iteration=30) == []


@pytest.mark.parametrize(
    ("run", "line"),
    [
        (BY_ITERS, "--train-iters 20: the checkpoint has 30 iterations already, so nothing is trained; give more"),
        (BY_SAMPLES, "--train-samples 80: the checkpoint has 120 samples already, so nothing is trained; give more"),
    ],
)
def test_a_length_that_the_checkpoint_has_passed_is_said(run: str, line: str):
    assert warnings(run + TARGET, iteration=30) == [line]


def test_a_replay_that_was_aligned_with_another_target_set_is_said():
    """It trains the weighter as before: up to as many updates as it holds batches."""
    (line,) = warnings(BY_ITERS + TARGET, target="1 target 1 another")
    assert line == (
        "--dwm-target-data-path target is not the checkpoint's target set, 1 target 1 another: the weighter also "
        "learns from the 2 batches of the replay, which were aligned with that one"
    )
    assert warnings(BY_ITERS + TARGET, target="another", state={"replay": []}) == []
    assert warnings(BY_ITERS + OFF, target="another") == []


def test_another_function_of_the_same_weights_is_said():
    """``--finetune`` allows it; whoever starts from an imported model may have left out a flag."""
    flags = RUN + "--train-iters 20 --dwm-mode off --position-embedding-type rope --finetune --load save "
    arguments = parse_run(flags.split(), 1).arguments()
    for changes, lines in (
        ({}, []),
        ({"rotary_base": 500000}, ["--rotary-base 10000 is not what the checkpoint was saved with, 500000"]),
        ({"window_size": (4, 0)}, ["--window-size is not given, but was 4,0 when the checkpoint was saved"]),
    ):
        saved = SavedCheckpoint(Path("save", "release"), {"args": Namespace(**arguments | changes)}, None)
        found = resume_warnings(parse_run(flags.split(), 1), saved, TrainState(), {})
        assert found == [f"{line}: the model computes something else with the same weights" for line in lines]


def test_another_number_of_tokens_is_said():
    assert warnings(BY_ITERS.replace("--vocab-size 20", "--vocab-size 19") + TARGET) == [
        "--vocab-size 19 is not the checkpoint's 20: documents end with another token than before"
    ]
