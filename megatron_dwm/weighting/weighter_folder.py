"""A weighter from a Hugging Face folder: a classifier with one output, with any tokenizer and maximum length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_dwm.data.hf_tokenizers import digest_of, fingerprint_of
from megatron_dwm.data.tokenizer_folder import load_tokenizer_folder
from megatron_dwm.errors import UserError, shortened
from megatron_dwm.model.hf_folder import check_dtypes, weight_files
from megatron_dwm.model.quiet_loading import quiet_loading
from megatron_dwm.safe_unpickling import DAMAGE, short_reason
from megatron_dwm.weighting.export_manifest import trained_length, verify_export
from megatron_dwm.weighting.sample_reader import SampleReader, TextReader, WindowReader
from megatron_dwm.weighting.weighter import is_finite, scoring_digest
from megatron_dwm.weighting.weighter_init import seeded, zero_head
from megatron_dwm.weighting.windows import UNLIMITED_LENGTH, position_limit


@dataclass(frozen=True)
class SampleTokens:
    """The format of a run's samples."""

    seq_length: int
    vocab_size: int
    eod: int
    """End-of-document token, used for padding if a folder defines no padding token."""
    fingerprint: str
    """Fingerprint of the tokenizer's vocabulary."""
    text_of: Callable[[npt.NDArray[np.integer[Any]]], str]
    """Returns the text of a sample's tokens [s]."""


@dataclass(frozen=True)
class WeighterFolder:
    """A classifier, and how it reads a run's samples."""

    path: str
    model: Any
    reader: SampleReader | None
    """Converts samples to its input; None if it reads the sample's tokens."""
    separate_tokenizer: Any | None
    """Its tokenizer, of Hugging Face, if that is not the run's."""
    fingerprint: str
    """Fingerprint of its tokenizer's vocabulary."""
    reading: str
    """A description of how it reads the samples, for the log; may be empty."""
    tokenizer_digest: str = ""
    """Digest of its tokenizer, if that is not the run's."""

    @property
    def digest(self) -> str:
        """A digest of all that its scores depend on."""
        return scoring_digest(self.model, self.tokenizer_digest)


def read_weighter_folder(flag: str, folder: str, samples: SampleTokens, seed: int) -> WeighterFolder:
    """Read a classifier from any Hugging Face folder; a language model gets a new head.

    A classifier with another tokenizer reads the samples' texts. A classifier with a shorter maximum length than the
    samples scores them in windows, unless its positions are rotary or absent.

    Args:
        flag: the flag that names ``folder``, for messages.
        samples: the format of the run's samples.
        seed: seed of a new head.

    Raises:
        UserError: the folder is missing or damaged, cannot be loaded, has more than one label, or a tokenizer that
            does not fit its model.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{flag} {folder}: no config.json there; give a Hugging Face model folder")
    is_export = verify_export(flag, Path(folder))
    try:
        tokenizer = load_tokenizer_folder(Path(folder))
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
    fingerprint = fingerprint_of(tokenizer)
    has_separate_tokenizer = fingerprint != samples.fingerprint
    model, missing = _load(flag, folder, seed)
    tokens = len(tokenizer) if has_separate_tokenizer else samples.vocab_size
    if model.config.vocab_size < tokens:
        raise UserError(
            f"{flag} {folder}: its {model.config.vocab_size} embeddings are fewer than the {tokens} tokens; "
            "give another"
        )
    if model.config.pad_token_id is None:  # as in a language model; a classifier needs one for batches
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        separate_pad = next(pad for pad in pads if pad is not None)
        model.config.pad_token_id = separate_pad if has_separate_tokenizer else samples.eod
    if not 0 <= model.config.pad_token_id < model.config.vocab_size:
        raise UserError(
            f"{flag} {folder}: its padding token, {model.config.pad_token_id}, is not in the vocabulary; give another"
        )
    essential = missing if is_export else [key for key in missing if _is_of_base_model(key, model)]
    if essential:
        raise UserError(f"{flag} {folder}: its weights lack {essential[0]}; give a whole model")
    if not is_finite(model):
        raise UserError(f"{flag} {folder}: its weights are not finite; give another")
    if missing:
        zero_head(model)
    if has_separate_tokenizer:
        reader, reading = text_reader(flag, folder, model, tokenizer, samples)
        return WeighterFolder(folder, model, reader, tokenizer, fingerprint, reading, digest_of(tokenizer))
    if windows := window_reader(model, samples.seq_length):
        reading = (
            f"its maximum length is {windows.window}: samples of {samples.seq_length} tokens are scored in windows of "
            f"{windows.window} tokens, and the mean is the score"
        )
        return WeighterFolder(folder, model, windows, None, fingerprint, reading)
    trained, reading = trained_length(Path(folder), model.config), ""
    if trained is not None and trained < samples.seq_length:
        reading = (
            f"made for {trained} tokens; samples of {samples.seq_length} tokens are scored whole (no maximum length)"
        )
    return WeighterFolder(folder, model, None, None, fingerprint, reading)


def text_reader(flag: str, folder: str, model: Any, tokenizer: Any, samples: SampleTokens) -> tuple[SampleReader, str]:
    """Return a reader of the samples' texts, and its description for the log.

    Args:
        flag: the flag that names ``folder``, for messages.
        model: the classifier that reads them.
        tokenizer: the folder's tokenizer.

    Raises:
        UserError: the tokenizer does not work.
    """
    window, length = position_limit(model), getattr(tokenizer, "model_max_length", UNLIMITED_LENGTH)
    if window is not None and length < UNLIMITED_LENGTH:
        window = min(window, length)
    try:
        reader = TextReader(samples.text_of, tokenizer, window)
    except Exception as error:  # tokenizers raise whatever a damaged vocabulary makes them raise
        reason = shortened(error)
        raise UserError(f"{flag} {folder}: its tokenizer fails ({reason}); give another") from None
    how = "whole" if window is None else f"in windows of {window} tokens"
    return reader, f"it has another tokenizer: the samples' texts are rebuilt, tokenized again and scored {how}"


def window_reader(model: Any, seq_length: int) -> WindowReader | None:
    """Return a reader that cuts samples into windows; None if the classifier reads them whole."""
    window = position_limit(model)
    return WindowReader(window) if window is not None and window < seq_length else None


def _load(flag: str, folder: str, seed: int) -> tuple[Any, list[str]]:
    """Return the classifier, and the names of the parameters that are missing in the folder.

    Raises:
        UserError: it cannot be loaded.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        hf_config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _check_layers(Path(folder), hf_config)
        with seeded(seed), quiet_loading():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                num_labels=1,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        _check_types(Path(folder), hf_config, model)
    except UserError as error:
        raise UserError(f"{flag} {folder}: {error}") from None
    except (*DAMAGE, SafetensorError) as error:
        reason = short_reason(error)
        raise UserError(
            f"{flag} {folder}: cannot be loaded as a classifier with one label ({reason}); give another"
        ) from None
    return model, sorted(report["missing_keys"])


def _check_types(folder: Path, hf_config: Any, model: Any) -> None:
    """Check that the weights are floating-point numbers; transformers converts others, without their scales.

    Raises:
        UserError: they are not, or are quantized.
    """
    if getattr(hf_config, "quantization_config", None):
        raise UserError("config.json has a quantization_config; give a model that is not quantized")
    files = weight_files(folder)
    check_dtypes(files, (name for name, _ in model.named_parameters() if name in files))


def _check_layers(folder: Path, hf_config: Any) -> None:
    """Check, before building it, that a classifier has no more layers than there are tensors.

    Raises:
        ValueError: it has more layers.
    """
    from safetensors import safe_open

    path, layers = folder / "model.safetensors", getattr(hf_config, "num_hidden_layers", None)
    if not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        tensors = len(file.keys())
    if isinstance(layers, int) and layers > tensors:
        raise ValueError(f"{layers} layers of {tensors} tensors")


def _is_of_base_model(key: str, model: Any) -> bool:
    """Return whether a tensor is in the layers below the classifier's head, which a language model must have too."""
    return key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key
