from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.data.tokenizer_folder import load_tokenizer_folder
from megatron_dwm.data.tokenizers import build_tokenizer
from megatron_dwm.errors import UserError


def model_folder(folder: Path, model_type: str) -> Path:
    """Return a folder that holds a model's config.json and no tokenizer."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2", "bert"])
def test_no_tokenizer_is_made_from_a_model_type_alone(model_type: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path, model_type)
    with pytest.raises(UserError, match=f"^{folder}: no Hugging Face tokenizer there; put .*tokenizer.json.* next to"):
        load_tokenizer_folder(folder)
    config = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))
    with pytest.raises(UserError, match=f"^--tokenizer-model {folder}: no Hugging Face tokenizer there"):
        build_tokenizer(config)


def test_a_tokenizer_of_characters_needs_no_file(tmp_path: Path) -> None:
    assert load_tokenizer_folder(model_folder(tmp_path, "canine"))("ab", add_special_tokens=False).input_ids == [97, 98]


def test_a_damaged_file_is_one_line_that_names_the_flag(tmp_path: Path) -> None:
    (model_folder(tmp_path, "bert") / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=f"^--tokenizer {tmp_path}: its tokenizer does not load"):
        load_tokenizer_folder(tmp_path, "--tokenizer")
