"""Which checkpoint a run's flags come from; flags that stand for others are named; a failed run leaves no process."""

from __future__ import annotations

import multiprocessing
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_dwm.cli.launch import _end_failed
from megatron_dwm.cli.run_flags import read_run_flags
from megatron_dwm.errors import UserError
from tests.programs import Fork
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, as_argv

RUN = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --max-position-embeddings 8 --lr 0.01 "
    "--tokenizer-type NullTokenizer --vocab-size 20 --micro-batch-size 2 --train-iters 20 --mock-data --dwm-mode off"
)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"--load": "{tmp}/new", "--pretrained-checkpoint": "{tmp}/none"}, "--pretrained-checkpoint {tmp}/none: does"),
        (
            {"--load": "{tmp}/old", "--ckpt-convert-format": "torch", "--ckpt-convert-save": "{tmp}/file"},
            "--ckpt-convert-save {tmp}/file/old: cannot be written in {tmp}/file",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_with_the_flag_that_gave_it(
    flags: dict[str, Any], said: str, tmp_path: Path
):
    (tmp_path / "file").touch()
    given = {name: value.format(tmp=tmp_path) for name, value in flags.items()}
    with pytest.raises(UserError) as raised:
        read_run_flags(as_argv({**LANGUAGE_MODEL, **TRAINING, **DATA, **given}), 1)
    assert str(raised.value).startswith(said.format(tmp=tmp_path))


def test_a_run_that_fails_does_not_wait_for_its_writers(tmp_path: Path):
    """They would print a traceback of their own when the process is gone that takes their results."""

    def write_late() -> None:
        time.sleep(5)
        (tmp_path / "written").touch()

    def fail() -> None:
        multiprocessing.get_context("fork").Process(target=write_late).start()
        peers = SimpleNamespace(report=lambda error: True, linger=lambda: None, world_size=1)
        _end_failed(UserError("a line"), cast(Any, peers))

    finished = Fork(fail).finish()
    assert (finished.returncode, finished.stderr) == (2, "error: a line\n")
    assert not (tmp_path / "written").exists()


def test_a_script_that_takes_the_models_flags_from_its_checkpoint_starts_without_one(tmp_path: Path):
    """As in Megatron-LM: the first start of a script that is submitted repeatedly uses the flags as they are."""
    folder = tmp_path / "run"
    flags = f"{RUN} --use-checkpoint-args --load {folder} --save {folder}".split()
    assert read_run_flags(flags, 1).model.num_layers == 2


def test_the_models_flags_are_those_of_the_pretrained_checkpoint_until_there_is_another(tmp_path: Path):
    pretrained, folder = tmp_path / "pretrained", tmp_path / "run"
    flags = f"{RUN} --use-checkpoint-args --pretrained-checkpoint {pretrained}".split()
    _save(pretrained, normalization="RMSNorm")
    for load in ([], ["--load", str(folder)]):
        config = read_run_flags([*flags, *load], 1)
        assert (config.model.normalization, config.checkpoint.load) == ("RMSNorm", str(pretrained))
        assert config.checkpoint.finetune
    _save(folder, normalization="LayerNorm")
    config = read_run_flags([*flags, "--load", str(folder)], 1)
    assert (config.model.normalization, config.checkpoint.load) == ("LayerNorm", str(folder))
    assert not config.checkpoint.finetune


def _save(folder: Path, normalization: str) -> None:
    """Write the arguments of a checkpoint in Megatron-LM's older format."""
    file = folder / "iter_0000003" / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    torch.save({"args": Namespace(num_layers=2, normalization=normalization)}, file)
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
