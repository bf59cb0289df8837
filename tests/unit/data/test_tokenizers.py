"""Building every type of tokenizer from the flags."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.data.tokenizers import build_tokenizer, padded_vocab_size, vocabulary_rows
from megatron_dwm.errors import UserError
from tests.small_runs import GPT, IN_PROCESS, parse_flags
from tests.unit.data.made_tokenizers import TEXTS


def test_gpt2_ids_are_those_of_the_vocabulary_file(configs: dict[str, TokenizerConfig]) -> None:
    config = configs["gpt2"]
    assert config.vocab_file is not None
    vocabulary = json.loads(Path(config.vocab_file).read_text())
    tokenizer = build_tokenizer(config)
    tokens = tokenizer.inv_vocab
    assert {token: index for index, token in tokens.items()} == vocabulary
    assert tokenizer.eod == vocabulary["<|endoftext|>"]
    assert tokenizer.detokenize(tokenizer.tokenize("The quick é fox")) == "The quick é fox"


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"])
def test_sentencepiece_types_give_the_pieces_of_the_model(kind: Any, configs: dict[str, TokenizerConfig]) -> None:
    import sentencepiece

    model = configs["bpe"].tokenizer_model
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type=kind, tokenizer_model=model))
    pieces = sentencepiece.SentencePieceProcessor(model_file=model)
    for text in TEXTS:
        assert tokenizer.tokenize(text) == pieces.encode(text)
    assert tokenizer.eod == pieces.eos_id()


def test_tiktoken_vocabulary_is_cut_to_vocab_size(configs: dict[str, TokenizerConfig]) -> None:
    config = TokenizerConfig(
        tokenizer_type="TikTokenizer",
        tokenizer_model=configs["tiktoken-v2"].tokenizer_model,
        vocab_size=300,
        tiktoken_num_special_tokens=20,
    )
    tokenizer = build_tokenizer(config)
    assert tokenizer.vocab_size == 300
    assert max(tokenizer.tokenize("the fox jumps over")) < 300


def test_null_tokenizer_counts_its_end_of_document(configs: dict[str, TokenizerConfig]) -> None:
    tokenizer = build_tokenizer(configs["null"])
    assert tokenizer.tokenize("5 7 9") == [5, 7, 9]
    assert (tokenizer.eod, tokenizer.vocab_size) == (120, 121)


def test_unreadable_files_are_one_line_that_names_them(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("not a tokenizer")
    path = str(broken)
    for config in (
        TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=path),
        TokenizerConfig(tokenizer_type="TikTokenizer", tokenizer_model=path),
        TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=path, merge_file=path),
        TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path)),
    ):
        with pytest.raises(UserError, match=f"--tokenizer-type {config.tokenizer_type} cannot be built from"):
            build_tokenizer(config)


def test_tiktoken_error_explains_the_vocabulary_size(configs: dict[str, TokenizerConfig]) -> None:
    config = TokenizerConfig(tokenizer_type="TikTokenizer", tokenizer_model=configs["tiktoken-v2"].tokenizer_model)
    with pytest.raises(UserError, match="--vocab-size"):
        build_tokenizer(config)


@pytest.mark.parametrize(
    ("vocab_size", "divisible_by", "tensor_parallel", "padded"),
    [
        (50257, 128, 1, 50304),
        (50257, 128, 8, 51200),
        (128, 128, 1, 128),
        (1, 128, 2, 256),
        (1000, 1, 1, 1000),
    ],
)
def test_vocabulary_is_padded_to_a_multiple(
    vocab_size: int, divisible_by: int, tensor_parallel: int, padded: int
) -> None:
    assert padded_vocab_size(vocab_size, divisible_by, tensor_parallel) == padded


def test_a_vocabulary_without_room_for_the_tokens_is_refused() -> None:
    model = parse_flags({**IN_PROCESS, **GPT, "--padded-vocab-size": 96}).model
    assert vocabulary_rows(96, model, 2) == 96
    with pytest.raises(UserError, match=r"^--padded-vocab-size 96 is less than the tokenizer's 97 tokens; raise it$"):
        vocabulary_rows(97, model, 2)


def test_a_class_that_metadata_name_is_not_imported(
    configs: dict[str, TokenizerConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Theirs: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    described = {
        "library": "sentencepiece",
        "tokenizer_class": "Theirs",
        "class_name": "Theirs",
        "class_path": "planted",
    }
    named = {"tokenizer_class_name": "Theirs", "tokenizer_class_path": "planted"}
    for content in (described, described | named):
        (tmp_path / "metadata.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"cannot be built from .*metadata\.json"):
            build_tokenizer(dataclasses.replace(configs["bpe"], tokenizer_metadata=str(tmp_path / "metadata.json")))
    assert not (tmp_path / "ran").exists()


def damage(content: bytes, how: str) -> bytes:
    middle = len(content) // 2
    return {
        "empty": b"",
        "cut": content[:middle],
        "zeroed": content[:middle] + bytes(64) + content[middle + 64 :],
        "another file": b'{"type": 5, "text": "' + b"a" * 10_000,
    }[how]


@pytest.mark.parametrize("how", ["empty", "cut", "zeroed", "another file"])
@pytest.mark.parametrize("kind", ["bpe", "gpt2", "hugging-face", "tiktoken-v2"])
def test_a_damaged_file_is_one_short_line(
    kind: str, how: str, configs: dict[str, TokenizerConfig], tmp_path: Path
) -> None:
    config = configs[kind]
    given = config.vocab_file if kind == "gpt2" else config.tokenizer_model
    assert given is not None
    source, copy = Path(given), tmp_path / Path(given).name
    if source.is_dir():
        shutil.copytree(source, copy)
    else:
        shutil.copy(source, copy)
    file = copy / "tokenizer.json" if copy.is_dir() else copy
    file.write_bytes(damage(file.read_bytes(), how))
    changed: dict[str, Any] = {"vocab_file" if kind == "gpt2" else "tokenizer_model": str(copy)}
    with pytest.raises(UserError) as raised:
        build_tokenizer(dataclasses.replace(config, **changed))
    message = str(raised.value)
    assert (
        message.startswith(f"--tokenizer-type {config.tokenizer_type} cannot be built from ") and str(copy) in message
    )
    assert "\n" not in message and len(message) < 900 and "--vocab-size" not in message


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "hugging-face", "tiktoken-v2"])
def test_a_path_that_is_not_utf_8_is_read_or_refused(
    kind: str, configs: dict[str, TokenizerConfig], tmp_path: Path
) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    config = configs[kind]
    files = [path for path in (config.tokenizer_model, config.vocab_file, config.merge_file) if path is not None]
    folder.mkdir()
    for path in files:
        copied = shutil.copytree if Path(path).is_dir() else shutil.copyfile
        copied(path, folder / Path(path).name)
    moved: dict[str, Any] = {
        name: str(folder / Path(value).name)
        for name in ("tokenizer_model", "vocab_file", "merge_file")
        if (value := getattr(config, name)) is not None
    }
    try:
        tokenizer = build_tokenizer(dataclasses.replace(config, **moved))
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith(f"--tokenizer-type {config.tokenizer_type} cannot be")
    else:
        assert tokenizer.tokenize("dog") == build_tokenizer(config).tokenize("dog")
