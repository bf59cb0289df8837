"""The Hugging Face counterparts of every type of tokenizer."""

from __future__ import annotations

import json
import shutil
import socket
from logging import Handler
from pathlib import Path

import pytest

from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.data.hf_tokenizers import fingerprint_of_folder, save_hf_tokenizer, vocabulary_fingerprint
from megatron_dwm.data.tokenizers import build_tokenizer
from megatron_dwm.errors import UserError
from tests.unit.data.made_tokenizers import (
    KINDS,
    TEXTS,
    gpt2_files,
    hugging_face_folder,
    sentencepiece_model,
    texts_for,
)


@pytest.mark.parametrize("kind", KINDS)
def test_hf_folder_gives_the_same_ids_on_any_text(
    kind: str, configs: dict[str, TokenizerConfig], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer(configs[kind])
    save_hf_tokenizer(tokenizer, configs[kind], tmp_path / "out")
    counterpart = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)

    differing = [
        text
        for text in texts_for(kind)
        if counterpart(text, add_special_tokens=False).input_ids != list(tokenizer.tokenize(text))
    ]
    assert differing == []
    assert counterpart.eos_token_id == tokenizer.eod
    assert counterpart.pad_token_id is not None
    assert len(counterpart) == tokenizer.vocab_size
    assert all(not path.name.startswith(".") for path in (tmp_path / "out").iterdir())


def test_saving_says_nothing_of_the_length_of_what_it_tries(configs: dict[str, TokenizerConfig], tmp_path: Path):
    """transformers would warn of indexing errors, in the log of a run that is in order."""
    from transformers import logging

    lines: list[str] = []
    handler = Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.add_handler(handler)
    try:
        for kind in KINDS:
            save_hf_tokenizer(build_tokenizer(configs[kind]), configs[kind], tmp_path / kind, max_length=4)
    finally:
        logging.remove_handler(handler)
    assert lines == []


@pytest.mark.parametrize("kind", KINDS)
def test_hf_folder_batches_with_padding(kind: str, configs: dict[str, TokenizerConfig], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer(configs[kind])
    save_hf_tokenizer(tokenizer, configs[kind], tmp_path)
    counterpart = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    texts = texts_for(kind)[-2:] + texts_for(kind)[1:2]
    batch = counterpart(texts, padding=True, add_special_tokens=False)
    for text, ids, mask in zip(texts, batch.input_ids, batch.attention_mask, strict=True):
        assert [index for index, kept in zip(ids, mask, strict=True) if kept] == list(tokenizer.tokenize(text))


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "tiktoken-v2"])
def test_text_survives_the_round_trip_through_the_folder(
    kind: str, configs: dict[str, TokenizerConfig], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer(configs[kind])
    save_hf_tokenizer(tokenizer, configs[kind], tmp_path)
    counterpart = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = "  The dog\n\n    jumps\tover été \U0001f600 fox.  "
    assert counterpart.decode(counterpart(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_of_run_and_exported_folder_agree(
    kind: str, configs: dict[str, TokenizerConfig], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer(configs[kind])
    save_hf_tokenizer(tokenizer, configs[kind], tmp_path / "ours")
    AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    expected = vocabulary_fingerprint(tokenizer, configs[kind])
    assert len(expected) == 64
    assert fingerprint_of_folder(tmp_path / "ours") == expected
    assert fingerprint_of_folder(tmp_path / "theirs") == expected


def test_fingerprints_of_different_tokenizers_differ(configs: dict[str, TokenizerConfig]) -> None:
    kinds = ["bpe", "bpe-unknown", "bpe-symbols", "unigram", "gpt2", "hugging-face", "tiktoken-v2", "null"]
    prints = {vocabulary_fingerprint(build_tokenizer(configs[kind]), configs[kind]) for kind in kinds}
    assert len(prints) == len(kinds)


def test_sentencepiece_model_read_by_transformers_itself_has_the_fingerprint(
    configs: dict[str, TokenizerConfig], tmp_path: Path
) -> None:
    from transformers import LlamaTokenizer

    config = configs["bpe"]
    assert config.tokenizer_model is not None
    (tmp_path / "from").mkdir()
    shutil.copyfile(config.tokenizer_model, tmp_path / "from" / "tokenizer.model")
    LlamaTokenizer.from_pretrained(tmp_path / "from").save_pretrained(tmp_path / "llama")
    assert fingerprint_of_folder(tmp_path / "llama") == vocabulary_fingerprint(build_tokenizer(config), config)


@pytest.mark.parametrize("model_type", ["llama", "bert", "gpt2", "xlm-roberta"])
@pytest.mark.parametrize("kind", ["bpe", "unigram", "gpt2"])
def test_hf_folder_loads_beside_a_model(
    kind: str, model_type: str, configs: dict[str, TokenizerConfig], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoTokenizer

    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    tokenizer = build_tokenizer(configs[kind])
    save_hf_tokenizer(tokenizer, configs[kind], tmp_path)
    counterpart = AutoTokenizer.from_pretrained(tmp_path)
    assert counterpart(TEXTS[3], add_special_tokens=False).input_ids == list(tokenizer.tokenize(TEXTS[3]))


def test_model_type_that_rebuilds_its_tokenizer_is_refused(configs: dict[str, TokenizerConfig], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(UserError, match="use another tokenizer or model type"):
        save_hf_tokenizer(build_tokenizer(configs["bpe"]), configs["bpe"], tmp_path)


def test_gpt2_and_its_counterpart_hold_no_temporary_path(configs: dict[str, TokenizerConfig], tmp_path: Path) -> None:
    first, second = (build_tokenizer(configs["gpt2"]) for _ in range(2))
    assert first.unique_identifiers == second.unique_identifiers
    assert first.unique_identifiers["vocab_file"] == configs["gpt2"].vocab_file
    for name in ("one", "two"):
        save_hf_tokenizer(first if name == "one" else second, configs["gpt2"], tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "hugging-face", "tiktoken-v2"])
def test_building_and_exporting_open_no_connection(
    kind: str, configs: dict[str, TokenizerConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[object] = []

    def refuse(*address: object, **_: object) -> None:
        attempts.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    save_hf_tokenizer(build_tokenizer(configs[kind]), configs[kind], tmp_path)
    fingerprint_of_folder(tmp_path)
    assert attempts == []


def test_legacy_sentencepiece_takes_special_tokens_and_has_an_end_of_document(
    configs: dict[str, TokenizerConfig], tmp_path: Path
) -> None:
    config = TokenizerConfig(
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=configs["bpe"].tokenizer_model,
        tokenizer_sentencepiece_legacy=True,
        tokenizer_special_tokens=["<tool>"],
    )
    tokenizer = build_tokenizer(config)
    assert tokenizer.tokenize("<tool>") == [400]
    assert tokenizer.eod == 2
    assert tokenizer.pad == 3
    with pytest.raises(UserError, match="--tokenizer-special-tokens"):
        save_hf_tokenizer(tokenizer, config, tmp_path)


def test_special_tokens_of_a_hugging_face_tokenizer_follow_the_flag(tmp_path: Path) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer

    folder = Path(hugging_face_folder(tmp_path / "in", eos_token="[EOS]"))
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", 1)]
    )
    loaded.save_pretrained(folder)
    for include in (False, True):
        config = TokenizerConfig(
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(folder),
            tokenizer_hf_include_special_tokens=include,
            tokenizer_special_tokens=["<tool>"],
        )
        tokenizer = build_tokenizer(config)
        ids = tokenizer.tokenize("The fox <tool>")
        assert (ids[-1] == 1) is include
        assert tokenizer.vocab_size - 1 in ids
        save_hf_tokenizer(tokenizer, config, tmp_path / str(include))
        counterpart = AutoTokenizer.from_pretrained(tmp_path / str(include))
        assert counterpart("The fox <tool>", add_special_tokens=include).input_ids == ids


def test_tokenizer_without_an_end_is_not_exported(tmp_path: Path) -> None:
    model = sentencepiece_model(tmp_path / "no-end.model", model_type="bpe", eos_id=-1)
    config = TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=model)
    with pytest.raises(UserError, match="no end-of-document token"):
        save_hf_tokenizer(build_tokenizer(config), config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_with_an_impossible_id_is_one_line(tmp_path: Path) -> None:
    vocab_file, merge_file = gpt2_files(tmp_path)
    vocabulary = json.loads(Path(vocab_file).read_text())
    Path(vocab_file).write_text(json.dumps({**vocabulary, "#": 2**40}))
    config = TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=vocab_file, merge_file=merge_file)
    with pytest.raises(UserError, match=r"^--tokenizer-type GPT2BPETokenizer .* cannot be .*[^\n]*$"):
        vocabulary_fingerprint(build_tokenizer(config), config)
