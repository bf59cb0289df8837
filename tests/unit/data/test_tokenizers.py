"""Every tokenizer type, built from small local files, and its Hugging Face twin."""

from __future__ import annotations

import base64
import heapq
import inspect
import io
import json
import random
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.data.tokenizers import (
    build_tokenizer,
    fingerprint_of_folder,
    padded_vocab_size,
    save_hf_tokenizer,
    vocabulary_fingerprint,
)
from megatron_dwm.errors import UserError

LINES = [
    "The quick brown fox jumps over the lazy dog, and then the dog jumps over the fox.",
    "def join(left, right): return left + ' = ' + right  # a comment: 0123456789",
    "Heaps are arrays for which heap[k] <= heap[2*k+1] and heap[k] <= heap[2*k+2] for all k.",
    "---- ==== .... >>> print('a', end='') <<< {1: 2, 3: 4} \\t @ ~ ^ & | ! ? ; $ % \" `",
    "Der Zug fährt über die Brücke; l'été, le garçon; naïve façade; señor, mañana.",
] * 12 + [line for line in inspect.getsource(heapq).splitlines() if line]

TEXTS = [
    "",
    " ",
    "   leading and trailing   ",
    "The dog\n\n    jumps\tover\r\nthe  fox.",
    "\n\tdef join(left):\n\t\treturn left\n",
    "été fährt ﬁ ① e\u0301 \u4f60\u597d \U0001f600 \u2581 \x00",
    "=" * 40 + "." * 33 + " " * 21 + "0" * 30,
    "<s>a</s><unk> <pad> <0x41> <|endoftext|> <sep> [X] <SPECIAL_9>",
]


def sentencepiece_model(path: Path, **options: Any) -> str:
    import sentencepiece

    model = io.BytesIO()
    settings: dict[str, Any] = {
        "vocab_size": 400,
        "byte_fallback": True,
        "num_threads": 1,
        "minloglevel": 2,
    } | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=model, **settings)
    path.write_bytes(model.getvalue())
    return str(path)


LOSSLESS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe", "pad_id": 3, "split_digits": True, **LOSSLESS},
    "bpe-collapsing-spaces": {"model_type": "bpe", "normalization_rule_name": "identity"},
    "bpe-nmt_nfkc": {"model_type": "bpe"},
    "bpe-unknown": {
        "model_type": "bpe",
        "byte_fallback": False,
        "vocab_size": 200,
        "character_coverage": 0.98,
        **LOSSLESS,
    },
    "bpe-symbols": {"model_type": "bpe", "user_defined_symbols": ["<sep>", "[X]"], **LOSSLESS},
    "bpe-suffix": {"model_type": "bpe", "treat_whitespace_as_suffix": True, **LOSSLESS},
    "unigram": {"model_type": "unigram", **LOSSLESS},
    "unigram-nmt_nfkc": {"model_type": "unigram"},
}


def gpt2_files(folder: Path) -> tuple[str, str]:
    """Byte-level BPE with every byte, so that it covers any text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
        ),
    )
    vocab_file, merge_file = bpe.model.save(str(folder), "gpt2")
    return vocab_file, merge_file


def hugging_face_folder(folder: Path, **special: str) -> str:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(
        LINES,
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[EOS]"], show_progress=False),
    )
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special).save_pretrained(folder)
    return str(folder)


def tiktoken_file(path: Path) -> tuple[str, int]:
    """A tiktoken JSON file, and its number of tokens."""
    from tiktoken._educational import bpe_train

    pattern = r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
    ranks = bpe_train(" ".join(LINES[:5]), 340, pattern, visualise=None)
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode("latin-1")}
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    ]
    path.write_text(json.dumps(entries))
    return str(path), len(entries)


def config_of(kind: str, folder: Path) -> TokenizerConfig:
    folder.mkdir(parents=True, exist_ok=True)
    if kind in SENTENCEPIECE:
        model = sentencepiece_model(folder / "tokenizer.model", **SENTENCEPIECE[kind])
        return TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=model)
    if kind == "gpt2":
        vocab_file, merge_file = gpt2_files(folder)
        return TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=vocab_file, merge_file=merge_file)
    if kind == "hugging-face":
        model = hugging_face_folder(folder, eos_token="[EOS]")
        return TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=model)
    if kind.startswith("tiktoken"):
        model, size = tiktoken_file(folder / "tiktoken.json")
        return TokenizerConfig(
            tokenizer_type="TikTokenizer",
            tokenizer_model=model,
            vocab_size=size + 20,
            tiktoken_num_special_tokens=20,
            tiktoken_pattern="v1" if kind == "tiktoken-v1" else None,
        )
    return TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=120)


KINDS = [*SENTENCEPIECE, "gpt2", "hugging-face", "tiktoken-v1", "tiktoken-v2", "null"]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenizerConfig]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: config_of(kind, root / kind) for kind in KINDS}


def texts_for(kind: str) -> list[str]:
    if kind == "null":
        return ["0", "5 7 9", "119 120 1 12 0"]
    rng = random.Random(0)
    alphabets = ["ab =.-", "the fox 01\n\t", "éüñ \u0301\u0308\u0323\u0940\u4f60\U0001f600<>x0A"]
    noise = ["".join(rng.choices(rng.choice(alphabets), k=rng.randrange(60))) for _ in range(150)]
    lines = ["\n".join(rng.sample(LINES, 8)) for _ in range(5)]
    return TEXTS + noise + lines


@pytest.mark.parametrize("kind", KINDS)
def test_hf_folder_gives_the_same_ids_on_any_text(
    kind: str, configs: dict[str, TokenizerConfig], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer(configs[kind])
    save_hf_tokenizer(tokenizer, configs[kind], tmp_path / "out")
    twin = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)

    differing = [
        text
        for text in texts_for(kind)
        if twin(text, add_special_tokens=False).input_ids != list(tokenizer.tokenize(text))
    ]
    assert differing == []
    assert twin.eos_token_id == tokenizer.eod
    assert twin.pad_token_id is not None
    assert len(twin) == tokenizer.vocab_size
    assert all(not path.name.startswith(".") for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_hf_folder_batches_with_padding(kind: str, configs: dict[str, TokenizerConfig], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer(configs[kind])
    save_hf_tokenizer(tokenizer, configs[kind], tmp_path)
    twin = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    texts = texts_for(kind)[-2:] + texts_for(kind)[1:2]
    batch = twin(texts, padding=True, add_special_tokens=False)
    for text, ids, mask in zip(texts, batch.input_ids, batch.attention_mask, strict=True):
        assert [index for index, kept in zip(ids, mask, strict=True) if kept] == list(tokenizer.tokenize(text))


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "tiktoken-v2"])
def test_text_survives_the_round_trip_through_the_folder(
    kind: str, configs: dict[str, TokenizerConfig], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer(configs[kind])
    save_hf_tokenizer(tokenizer, configs[kind], tmp_path)
    twin = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = "  The dog\n\n    jumps\tover été \U0001f600 fox.  "
    assert twin.decode(twin(text, add_special_tokens=False).input_ids) == text


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
    twin = AutoTokenizer.from_pretrained(tmp_path)
    assert twin(TEXTS[3], add_special_tokens=False).input_ids == list(tokenizer.tokenize(TEXTS[3]))


def test_model_type_that_rebuilds_its_tokenizer_is_refused(configs: dict[str, TokenizerConfig], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(UserError, match="use another tokenizer or model type"):
        save_hf_tokenizer(build_tokenizer(configs["bpe"]), configs["bpe"], tmp_path)


def test_gpt2_twin_and_tokenizer_know_no_temporary_path(configs: dict[str, TokenizerConfig], tmp_path: Path) -> None:
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
        twin = AutoTokenizer.from_pretrained(tmp_path / str(include))
        assert twin("The fox <tool>", add_special_tokens=include).input_ids == ids


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


def test_tokenizer_without_an_end_is_not_exported(tmp_path: Path) -> None:
    model = sentencepiece_model(tmp_path / "no-end.model", model_type="bpe", eos_id=-1)
    config = TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=model)
    with pytest.raises(UserError, match="no end-of-document token"):
        save_hf_tokenizer(build_tokenizer(config), config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="no Hugging Face tokenizer there"):
        fingerprint_of_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="does not load"):
        fingerprint_of_folder(tmp_path)


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
