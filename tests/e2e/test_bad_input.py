"""What a user can get wrong: one line that names it, exit code 2 on every rank, nothing written, nothing hangs."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForSequenceClassification

from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.data.hf_tokenizers import save_hf_tokenizer
from megatron_dwm.data.tokenizers import build_tokenizer
from megatron_dwm.weighting.export import export_weighter
from tests.e2e.datasets import TOKENIZER, counting, make_dataset, noise
from tests.e2e.launch import pretrain
from tests.small_runs import LANGUAGE_MODEL, TRAINING


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good datasets and bad ones."""
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder, "train", counting(0))
    make_dataset(folder, "valid", counting(1, step=2))
    make_dataset(folder, "more_valid", counting(4, step=7))
    target = make_dataset(folder, "target", counting(2, step=3))
    make_dataset(folder, "other_vocabulary", [[500] * 60], vocab_size=501)
    make_dataset(folder, "short", [[1, 2, 3]])
    make_dataset(folder, "overlapping", noise(5) + counting(2, step=3)[:3])
    for name in ("no_index", "cut"):
        for suffix in (".bin", ".idx"):
            shutil.copy(target + suffix, folder / f"{name}{suffix}")
    (folder / "no_index.idx").write_bytes(b"this is not an index")
    (folder / "cut.bin").write_bytes((folder / "cut.bin").read_bytes()[:100])
    return folder


@pytest.fixture(scope="module")
def weighter_of_another_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weighters") / "weighter"
    settings = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=77)
    config = LlamaConfig(
        vocab_size=77, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=1
    )
    save_tokenizer = partial(save_hf_tokenizer, build_tokenizer(settings), settings)
    export_weighter(LlamaForSequenceClassification(config), save_tokenizer, folder, {})
    return folder


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    **{  # the first rank or all find it, before they compare flags or later
        f"too long path of {flag}": ({flag: "x" * 5000}, ["xxx ... xxx", "File name too long; give another path"])
        for flag in ("--save", "--load", "--tokenizer-metadata", "--dwm-init-from")
    },
    "missing training file": ({"--train-data-path": "{data}/nothing"}, ["--train-data-path", "nothing.idx"]),
    "missing target file": ({"--dwm-target-data-path": "{data}/nothing"}, ["--dwm-target-data-path", "nothing.idx"]),
    "unreadable index": ({"--train-data-path": "{data}/no_index"}, ["--train-data-path", "no_index.idx"]),
    "truncated data": ({"--train-data-path": "{data}/cut"}, ["--train-data-path", "cut.bin", "100 bytes"]),
    "data of another tokenizer": (
        {"--train-data-path": "{data}/other_vocabulary_text_document"},
        ["--train-data-path", "token 500", "vocabulary of 101", "--tokenizer-model"],
    ),
    "vocabulary too small": ({"--vocab-size": 40}, ["outside the tokenizer's vocabulary of 41", "--vocab-size"]),
    "missing tokenizer": (
        {"--tokenizer-type": "SentencePieceTokenizer", "--tokenizer-model": "{data}/none.model"},
        ["--tokenizer-model", "none.model"],
    ),
    "damaged tokenizer": (
        {"--tokenizer-type": "SentencePieceTokenizer", "--tokenizer-model": "{data}/no_index.idx"},
        ["--tokenizer-model", "no_index.idx"],
    ),
    "indivisible batch": ({"--global-batch-size": 7}, ["--global-batch-size 7", "--micro-batch-size 4"]),
    "indivisible target batch": ({"--dwm-target-batch-size": 5}, ["--dwm-target-batch-size 5"]),
    "indivisible heads": (
        {"--num-attention-heads": 5, "--hidden-size": 40, "--tensor-model-parallel-size": 2},
        ["--num-attention-heads 5", "--tensor-model-parallel-size 2"],
    ),
    "indivisible layers": (
        {"--num-layers": 3, "--pipeline-model-parallel-size": 2},
        ["--num-layers 3", "--pipeline-model-parallel-size 2"],
    ),
    "unknown flag": ({"--no-such-flag": 3}, ["--no-such-flag"]),
    "bad value": ({"--num-layers": "many"}, ["--num-layers", "many"]),
    "world size": (
        {"--tensor-model-parallel-size": 2, "--pipeline-model-parallel-size": 2},
        ["world size 2", "--tensor-model-parallel-size 2"],
    ),
    "no target set": ({"--dwm-target-data-path": False}, ["--dwm-target-data-path"]),
    "empty target set": (
        {"--dwm-target-data-path": "{data}/short_text_document"},
        ["--dwm-target-data-path", "3 tokens", "33"],
    ),
    "target is training data": (
        {"--dwm-target-data-path": "{data}/train_text_document"},
        ["--dwm-target-data-path", "--train-data-path"],
    ),
    "target is evaluation data": (
        {"--dwm-target-data-path": "{data}/valid_text_document"},
        ["--dwm-target-data-path", "--valid-data-path"],
    ),
    "target documents in the training data": (
        {"--train-data-path": ["{data}/train_text_document", "{data}/overlapping_text_document"]},
        ["--dwm-target-data-path", "3 of its documents", "--train-data-path"],
    ),
    "weighter whose tokenizer does not fit it": (
        {"--dwm-mode": "frozen", "--dwm-load": "{weighter}", "--dwm-target-data-path": False},
        ["--dwm-load", "77 embeddings are fewer than the 78 tokens"],
    ),
    "no weighter there": (
        {"--dwm-mode": "frozen", "--dwm-load": "{data}", "--dwm-target-data-path": False},
        ["--dwm-load", "config.json"],
    ),
    "update window without an update": (
        {"--dwm-stage-update-iters": 2, "--dwm-update-interval": 3},
        ["--dwm-update-interval 3", "window of 2"],
    ),
    "finite differences in half precision": (
        {"--dwm-alignment": "finite-difference", "--bf16": True},
        ["--dwm-alignment finite-difference", "--bf16"],
    ),
    "Adam's preconditioner without Adam": ({"--optimizer": "sgd"}, ["--dwm-preconditioner adam", "sgd"]),
    "endless warm-up": ({"--lr-warmup-iters": 20}, ["--lr-warmup-iters", "--train-iters"]),
    "vocabulary larger than any memory": (
        {"--padded-vocab-size": 2**62},
        ["the model needs more memory", "the vocabulary smaller", "--plan"],
    ),
    "layers larger than any memory": ({"--ffn-hidden-size": 2**62}, ["the model needs more memory", "--ffn-hidden"]),
    "weighter deeper than the model": (
        {"--dwm-init-from": "lm", "--dwm-num-layers": 9},
        ["--dwm-num-layers 9", "--num-layers 2"],
    ),
    "checkpoint that is not there": (
        {"--load": "{data}"},
        ["--load", "no latest_checkpointed_iteration.txt there"],
    ),
    "checkpoint step that is not there": ({"--load": "{data}", "--ckpt-step": 7}, ["--load", "iter_0000007"]),
}


def common_flags(data: Path, folder: Path) -> dict[str, Any]:
    """Flags without a mistake, of a run that writes below ``folder``."""
    return {
        **LANGUAGE_MODEL,
        **TRAINING,
        **TOKENIZER,
        "--train-data-path": f"{data}/train_text_document",
        "--valid-data-path": f"{data}/valid_text_document",
        "--dwm-target-data-path": f"{data}/target_text_document",
        "--save": folder / "save",
        "--tensorboard-dir": folder / "board",
        "--data-cache-path": folder / "cache",
    }


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line_and_code_2_on_every_rank(
    case: str, data: Path, weighter_of_another_tokenizer: Path, tmp_path: Path
):
    changes, expected = CASES[case]

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(item) for item in value]
        if isinstance(value, str):
            return value.replace("{data}", str(data)).replace("{weighter}", str(weighter_of_another_tokenizer))
        return value

    flags = common_flags(data, tmp_path)
    flags.update((name, filled(value)) for name, value in changes.items())
    finished = pretrain(tmp_path / "log", 2, flags)
    assert finished.codes == [2, 2], finished.text
    message = "".join(finished.errors)
    assert message.startswith("error: ") and message.count("\n") == 1, finished.text
    for part in expected:
        assert part in message, message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]


def test_too_little_evaluation_data_is_found_before_the_first_step(data: Path, tmp_path: Path):
    """Blends without weights are read once. Their size shows when they are built, so index caches are written."""
    blend = [f"{data}/valid_text_document", f"{data}/more_valid_text_document"]
    flags = {**common_flags(data, tmp_path), "--valid-data-path": blend, "--eval-iters": 8, "--eval-interval": 5}
    finished = pretrain(tmp_path / "log", 2, flags)
    assert finished.codes == [2, 2], finished.text
    assert "validation data has" in "".join(finished.errors) and "--eval-iters" in "".join(finished.errors)
    assert not (tmp_path / "save").exists()
