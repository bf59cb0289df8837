"""Checkpoints of Megatron-LM's older format, of another structure, and of a model to start from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dwm.safe_unpickling import read_torch_file
from tests.e2e.launch import pretrain, records, succeed
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING

RUN: dict[str, Any] = {**LANGUAGE_MODEL, **TRAINING, **DATA, **WEIGHTING, "--train-iters": 8, "--log-interval": 4}
PP2 = {"--pipeline-model-parallel-size": 2}
HALF = 4


def figures(path: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if key != "seconds"}
        for record in records(path / "metrics.jsonl", "train")
        if record["iteration"] > HALF
    ]


@pytest.fixture(scope="module")
def torch_format(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run that has saved at half and at its end, in the format ``torch``."""
    folder = tmp_path_factory.mktemp("torch") / "run"
    succeed(
        folder.parent / "out",
        2,
        {**RUN, **PP2, "--bf16": True, "--ckpt-format": "torch", "--save": folder, "--save-interval": HALF},
    )
    return folder


def test_a_flipped_bit_in_any_ranks_file_is_named(torch_format: Path, tmp_path: Path):
    saved = tmp_path / "run"
    shutil.copytree(torch_format, saved)
    file = saved / "iter_0000004" / "mp_rank_00_001" / "model_optim_rng.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    finished = pretrain(tmp_path / "out", 2, {**RUN, **PP2, "--bf16": True, "--load": saved, "--ckpt-step": HALF})
    assert finished.codes == [2, 2], finished.text
    message = "".join(finished.errors)
    assert "mp_rank_00_001/model_optim_rng.pt has another sha256" in message and message.count("\n") == 1


def test_a_run_goes_on_from_the_format_torch(torch_format: Path, tmp_path: Path):
    saved = tmp_path / "run"
    shutil.copytree(torch_format, saved)
    flags = {**RUN, **PP2, "--bf16": True, "--load": saved, "--ckpt-step": HALF, "--save": saved}
    succeed(
        tmp_path / "out",
        2,
        {
            **flags,
            "--async-save": True,
            "--save-interval": 2,
            "--ckpt-assume-constant-structure": True,
        },
    )
    assert figures(saved) == figures(torch_format)
    # From there, saved as torch_dist by one process that plans once, it goes on as from any other.
    succeed(tmp_path / "again", 2, {**flags, "--ckpt-step": 6, "--dist-ckpt-strictness": "raise_all"})
    assert figures(saved) == figures(torch_format)


def test_a_run_goes_on_from_a_checkpoint_that_was_converted(torch_format: Path, tmp_path: Path):
    flags = {**RUN, **PP2, "--bf16": True, "--load": torch_format, "--ckpt-step": HALF}
    succeed(tmp_path / "out", 2, {**flags, "--ckpt-convert-format": "torch_dist", "--ckpt-convert-save": tmp_path})
    converted = tmp_path / torch_format.name
    assert (converted / "iter_0000004" / "metadata.json").is_file()
    succeed(tmp_path / "again", 2, {**flags, "--load": converted, "--save": converted, "--ckpt-step": HALF})
    assert figures(converted) == figures(torch_format)


def test_a_rank_has_megatron_lms_file(torch_format: Path):
    folder = torch_format / "iter_0000004"
    first, last = (read_torch_file(folder / f"mp_rank_00_00{rank}" / "model_optim_rng.pt") for rank in range(2))
    assert first["iteration"] == HALF and first["checkpoint_version"] == 3.0
    assert set(first) >= {"args", "model", "optimizer", "opt_param_scheduler", "rng_state"}
    assert "embedding.word_embeddings.weight" in first["model"] and "output_layer.weight" in last["model"]


def test_norms_of_transformer_engine_are_found(torch_format: Path, tmp_path: Path):
    """Its linear layers hold the norms before them, and have an extra state."""
    saved = tmp_path / "run"
    shutil.copytree(torch_format, saved, ignore=shutil.ignore_patterns("checksums.json"))  # Megatron-LM writes none
    for path in saved.glob("iter_*/mp_rank_*/model_optim_rng.pt"):
        state = read_torch_file(path)
        model = {
            key.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_").replace(
                "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
            ): value
            for key, value in state["model"].items()
        }
        assert model.keys() != state["model"].keys()
        torch.save({**state, "model": {**model, "decoder.layers.0.mlp.linear_fc1._extra_state": None}}, path)
    flags = {**RUN, **PP2, "--bf16": True, "--load": saved, "--ckpt-step": HALF}
    succeed(tmp_path / "out", 2, {**flags, "--metrics-jsonl": tmp_path / "metrics.jsonl"})
    assert figures(tmp_path) == figures(torch_format)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "has TP, PP and virtual stages 1, 2, none, and this run 1, 1, none; load it in its own layout"),
        ({"--dwm-mode": "off", "--ckpt-step": 5}, "iter_0000005 does not exist; give another folder"),
    ],
)
def test_another_layout_is_refused(flags: dict[str, Any], said: str, torch_format: Path, tmp_path: Path):
    finished = pretrain(tmp_path, 1, {**RUN, "--load": torch_format, "--bf16": True, **flags})
    assert finished.codes == [2]
    assert said in finished.errors[0]


def test_a_pretrained_checkpoint_is_started_from_once(tmp_path: Path):
    plain = {**RUN, "--dwm-mode": "off", "--ckpt-assume-constant-structure": True}
    succeed(tmp_path / "1", 1, {**plain, "--save": tmp_path / "pretrained"})
    new = {**plain, "--save": tmp_path / "new", "--load": tmp_path / "new", "--save-interval": HALF}
    new |= {"--pretrained-checkpoint": tmp_path / "pretrained", "--dist-ckpt-strictness": "log_all"}
    first = succeed(tmp_path / "3", 1, {**new, "--exit-interval": HALF})
    assert f"the run starts from {tmp_path / 'pretrained'}" in first.text
    assert "iteration        4/       8" in first.text
    again = succeed(tmp_path / "4", 1, new)
    assert "the run starts from" not in again.text
    assert f"loading distributed checkpoint from {tmp_path / 'new'} at iteration 4" in again.text
