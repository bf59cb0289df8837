"""Every type of tokenizer, built from small local files."""

from __future__ import annotations

import base64
import heapq
import inspect
import io
import json
import random
from pathlib import Path
from typing import Any

from megatron_dwm.config.tokenizer import TokenizerConfig

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
    """Write a byte-level BPE with every byte, so that it covers any text."""
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
    """Write a tiktoken JSON file; return its path and number of tokens."""
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


def texts_for(kind: str) -> list[str]:
    if kind == "null":
        return ["0", "5 7 9", "119 120 1 12 0"]
    rng = random.Random(0)
    alphabets = ["ab =.-", "the fox 01\n\t", "éüñ \u0301\u0308\u0323\u0940\u4f60\U0001f600<>x0A"]
    noise = ["".join(rng.choices(rng.choice(alphabets), k=rng.randrange(60))) for _ in range(150)]
    lines = ["\n".join(rng.sample(LINES, 8)) for _ in range(5)]
    return TEXTS + noise + lines
