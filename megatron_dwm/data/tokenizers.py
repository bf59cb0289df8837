"""Megatron-Core's tokenizers, built from the flags."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.data.tokenizer_folder import REMEDY, require_vocabulary
from megatron_dwm.errors import UserError, shortened
from megatron_dwm.extras import require_packages
from megatron_dwm.runtime.compat import build_core_tokenizer
from megatron_dwm.special_files import require_plain_files

if TYPE_CHECKING:
    from megatron.core.tokenizers.text.text_tokenizer import MegatronTokenizerText


def build_tokenizer(config: TokenizerConfig) -> MegatronTokenizerText:
    """Build Megatron-Core's tokenizer from local files (transformers looks up a Hugging Face *name*).

    Raises:
        UserError: the files cannot be read, or are not valid for this type.
    """
    if config.tokenizer_type == "TikTokenizer":
        require_packages("--tokenizer-type TikTokenizer", "tiktoken")
    if config.tokenizer_type == "HuggingFaceTokenizer":
        require_plain_files(Path(str(config.tokenizer_model)), f"--tokenizer-model {config.tokenizer_model}", REMEDY)
    try:
        if config.tokenizer_type == "GPT2BPETokenizer":
            return _build_gpt2(config)
        tokenizer = _core_build(config)
    except Exception as error:  # Megatron-Core raises whatever its libraries and asserts raise
        raise UserError(_build_failure(config, error)) from error
    if config.tokenizer_type == "HuggingFaceTokenizer":
        model = str(config.tokenizer_model)
        require_vocabulary(tokenizer._tokenizer.tokenizer, model, f"--tokenizer-model {model}")
    if config.tokenizer_sentencepiece_legacy:
        _name_control_pieces(tokenizer)
    return tokenizer


def _core_build(config: TokenizerConfig) -> MegatronTokenizerText:
    tokenizer: MegatronTokenizerText = build_core_tokenizer(asdict(config))
    return tokenizer


def _build_gpt2(config: TokenizerConfig) -> MegatronTokenizerText:
    """Build GPT-2's byte-level BPE from a vocabulary and a merge file.

    Megatron-Core looks up "gpt2" on the Hub even if both files are given, so it gets a folder with the files.
    """
    with tempfile.TemporaryDirectory() as folder:
        for path, name in ((config.vocab_file, "vocab.json"), (config.merge_file, "merges.txt")):
            shutil.copyfile(str(path), Path(folder, name))  # TokenizerConfig requires both
        Path(folder, "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
        in_folder = replace(
            config,
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=folder,
            vocab_file=None,
            merge_file=None,
        )
        tokenizer = _core_build(in_folder)
    # The names of the datasets' index caches follow from these, so they must not hold the folder's random name.
    tokenizer.path = "GPT2BPETokenizer"
    tokenizer._tokenizer.tokenizer.name_or_path = "gpt2"
    tokenizer.additional_args |= {"vocab_file": config.vocab_file, "merges_file": config.merge_file}
    return tokenizer


def _name_control_pieces(tokenizer: MegatronTokenizerText) -> None:
    """Set the names by which the legacy SentencePiece wrapper looks up the ids of its control pieces."""
    library = tokenizer._tokenizer
    pieces = library.tokenizer
    for name in ("bos", "eos", "pad"):
        index = getattr(pieces, f"{name}_id")()
        if index >= 0:
            setattr(library, f"{name}_token", pieces.id_to_piece(index))


def _build_failure(config: TokenizerConfig, error: Exception) -> str:
    given = {
        "--tokenizer-model": config.tokenizer_model,
        "--vocab-file": config.vocab_file,
        "--merge-file": config.merge_file,
        "--tokenizer-metadata": config.tokenizer_metadata,
    }
    files = ", ".join(f"{name} {path}" for name, path in given.items() if path is not None)
    reason = shortened(error, 300) or type(error).__name__
    remedy = "check that the file fits the type and is complete"
    if config.tokenizer_type == "TikTokenizer" and isinstance(error, AssertionError):  # raised for a wrong size
        remedy = (
            "check that --vocab-size (131072 if not given) is no larger than the file's tokens plus "
            f"--tiktoken-num-special-tokens {config.tiktoken_num_special_tokens}"
        )
    kind = f"--tokenizer-type {config.tokenizer_type}"
    return f"{kind} cannot be built from {files or 'its flags'}: {reason}; {remedy}"


def end_of_document(tokenizer: MegatronTokenizerText, config: TokenizerConfig) -> int:
    """Return the id that ends a document.

    Raises:
        UserError: the tokenizer has none.
    """
    end = getattr(tokenizer, "eod", None)
    if end is None or end < 0:
        raise UserError(
            f"{describe_tokenizer(config)} has no end-of-document token; use one with an end-of-sentence token"
        )
    return int(end)


def padded_vocab_size(vocab_size: int, make_vocab_size_divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Round ``vocab_size`` up to a multiple of the product of the other two."""
    multiple = make_vocab_size_divisible_by * tensor_model_parallel_size
    return math.ceil(vocab_size / multiple) * multiple


def vocabulary_rows(vocab_size: int, model: ModelConfig, tensor_model_parallel_size: int) -> int:
    """Return the rows of the embedding that the flags make for a tokenizer of ``vocab_size`` tokens.

    Raises:
        UserError: ``--padded-vocab-size`` gives fewer rows than there are tokens.
    """
    rows = model.padded_vocab_size
    if rows is None:
        return padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by, tensor_model_parallel_size)
    if rows < vocab_size:
        raise UserError(f"--padded-vocab-size {rows} is less than the tokenizer's {vocab_size} tokens; raise it")
    return rows


def describe_tokenizer(config: TokenizerConfig) -> str:
    """Return the type and the file of a tokenizer, for messages."""
    return f"--tokenizer-type {config.tokenizer_type} ({config.tokenizer_model or config.vocab_file})"
