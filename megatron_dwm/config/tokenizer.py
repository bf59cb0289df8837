"""Flags that choose the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_dwm.config.flags import flag, require_at_least
from megatron_dwm.errors import UserError

TokenizerType = Literal[
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "GPT2BPETokenizer",
    "TikTokenizer",
    "NullTokenizer",
]


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokenizer."""

    tokenizer_type: TokenizerType = flag("GPT2BPETokenizer", "What type of tokenizer to use.")
    tokenizer_model: str | None = flag(
        None, "SentencePiece model file, tiktoken JSON file, or Hugging Face name or folder."
    )
    vocab_file: str | None = flag(None, "Path to the vocab file (GPT2BPETokenizer).")
    merge_file: str | None = flag(None, "Path to the BPE merge file (GPT2BPETokenizer).")
    vocab_size: int | None = flag(
        None, "Size of the vocabulary before padding: required by NullTokenizer; TikTokenizer may be truncated to it."
    )
    tokenizer_metadata: str | None = flag(None, "Path to a tokenizer metadata JSON file.")
    tokenizer_special_tokens: list[str] | None = flag(None, "Special tokens to add to the tokenizer.")
    tokenizer_sentencepiece_legacy: bool = flag(False, "Use the SentencePiece tokenizer wrapper's legacy behavior.")
    tokenizer_hf_use_fast: bool = flag(False, "Use the fast Hugging Face tokenizer.")
    tokenizer_hf_include_special_tokens: bool = flag(
        False, "Let a Hugging Face tokenizer add its special tokens to each text."
    )
    trust_remote_code: bool = flag(False, "Allow a Hugging Face tokenizer to run its own code.")
    tiktoken_pattern: str | None = flag(None, "Which tiktoken pattern to use: v1 or v2.")
    tiktoken_num_special_tokens: int = flag(1000, "Number of special tokens in the tiktoken tokenizer.")
    legacy_tokenizer: bool = flag(
        False, "No effect: megatron-core's tokenizers, which are always used, give the same tokens."
    )

    def __post_init__(self) -> None:
        require_at_least(self, 1, "vocab_size")
        require_at_least(self, 0, "tiktoken_num_special_tokens")
        if self.tokenizer_metadata is not None:
            _require_file("--tokenizer-metadata", self.tokenizer_metadata, self.tokenizer_type)
        if self.tokenizer_type == "NullTokenizer":
            if self.vocab_size is None:
                raise UserError("--tokenizer-type NullTokenizer needs --vocab-size; give the vocabulary's size")
        elif self.tokenizer_type == "GPT2BPETokenizer":
            for name, path in (("--vocab-file", self.vocab_file), ("--merge-file", self.merge_file)):
                _require_file(name, path, self.tokenizer_type)
        elif self.tokenizer_type == "HuggingFaceTokenizer":
            if self.tokenizer_model is None:
                raise UserError("--tokenizer-type HuggingFaceTokenizer needs --tokenizer-model; give a folder or name")
        else:
            _require_file("--tokenizer-model", self.tokenizer_model, self.tokenizer_type)


def _require_file(name: str, path: str | None, tokenizer_type: str) -> None:
    if path is None:
        raise UserError(f"--tokenizer-type {tokenizer_type} needs {name}; give the path of that file")
    if not Path(path).is_file():
        raise UserError(f"{name} {path}: no such file; check the path")
