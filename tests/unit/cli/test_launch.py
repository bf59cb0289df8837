"""Which checkpoint a run's flags come from."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch

from megatron_dwm.cli.launch import read_run_flags

RUN = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --max-position-embeddings 8 --lr 0.01 "
    "--tokenizer-type NullTokenizer --vocab-size 20 --micro-batch-size 2 --train-iters 20 --mock-data --dwm-mode off"
)


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
