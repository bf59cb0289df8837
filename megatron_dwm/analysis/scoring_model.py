"""The models that score documents: a classifier, or a language model whose perplexity is the score.

They need their folder and transformers, but not Megatron.

Shape legend: b windows of a batch, t tokens of the longest of them, v vocabulary size.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import exp
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_dwm.data.tokenizer_folder import load_tokenizer_folder
from megatron_dwm.errors import UserError, shortened
from megatron_dwm.model.quiet_loading import quiet_loading
from megatron_dwm.weighting.export_manifest import read_manifest, trained_length, verify_export
from megatron_dwm.weighting.weighter import is_finite
from megatron_dwm.weighting.windows import SpecialTokens, Window, cut, pad_windows, position_limit

Rule = Literal["mean", "max", "first"]
_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens of a batch by default; fewer on a CPU, whose caches are small."""


def require_all_weights(named: str, missing: Sequence[str]) -> None:
    """Refuse a model with weights that its folder lacks.

    Raises:
        UserError: there are such weights.
    """
    if missing:
        raise UserError(f"{named}: its weights lack {missing[0]}; give a whole model")


def load_model(
    auto_class: Any, folder: Path, flag: str, noun: str, dtype: torch.dtype | Literal["auto"] = "auto"
) -> tuple[Any, Any, list[str]]:
    """Load a model and its tokenizer from a folder.

    Args:
        auto_class: transformers' class that loads the model.
        flag: the flag that names the folder, for messages.
        noun: what the folder should be, for messages.
        dtype: precision of the weights; "auto" is that of their files.

    Returns:
        model, tokenizer, and the names of the weights that the folder lacks, which are random.

    Raises:
        UserError: one of the two cannot be loaded, or they do not fit each other, or a weight is not finite.
    """
    named = f"{flag} {folder}"
    tokenizer = load_tokenizer_folder(folder, flag)
    try:
        with quiet_loading():
            model, report = auto_class.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # transformers and safetensors raise many kinds of errors
        raise UserError(f"{named}: cannot be loaded ({shortened(error)}); give {noun}") from None
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{named}: its tokenizer has {len(tokenizer)} tokens and its model only {model.config.vocab_size}; put the "
            "tokenizer there that it was trained with"
        )
    if not is_finite(model):
        raise UserError(f"{named}: its weights are not finite; give another")
    return model, tokenizer, sorted(report["missing_keys"])


class ScoringModel:
    """A classifier and its tokenizer from a folder, on one device."""

    flag, noun = "--weighter", "the folder of an exported weighter"

    def __init__(self, folder: str, window: int | None, batch_tokens: int | None, device: torch.device) -> None:
        """
        Args:
            window: maximum number of tokens that are scored at once; by default the model's training length.
            batch_tokens: tokens of a batch, including padding; the default depends on the device.

        Raises:
            UserError: the folder holds no such model, or no tokenizer that fits it.
        """
        self.folder, self.device = Path(folder), device
        self.batch_tokens = batch_tokens or _BATCH_TOKENS[device.type]
        if not (self.folder / "config.json").is_file():
            raise UserError(f"{self.flag} {folder}: no config.json there; give {self.noun}")
        verify_export(self.flag, self.folder)
        model, self.tokenizer, missing = load_model(
            self._auto_class(), self.folder, self.flag, self.noun, torch.float32
        )
        self._check(model, missing)
        self.model = model.to(device).eval()
        limit = position_limit(model)
        if window is not None and limit is not None and window > limit:
            raise UserError(f"--window {window}: the model's positions end at {limit}; give at most that")
        self.window = window or min(trained_length(self.folder, model.config) or 512, limit or sys.maxsize)
        self.special = self._special_tokens()

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of texts, without special tokens."""
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def score(self, documents: Sequence[Sequence[int]], rule: Rule) -> list[float]:
        """Return a score for each document of token ids, without special tokens."""
        windows = [
            (number, window)
            for number, ids in enumerate(documents)
            for window in cut(ids, self.window, self.special)[: 1 if rule == "first" else None]
        ]
        windows.sort(key=lambda item: len(item[1].ids))
        found: list[list[tuple[float, int]]] = [[] for _ in documents]
        batch: list[tuple[int, Window]] = []
        for number, window in windows:
            # The next window is the longest so far, and gives the batch its width.
            if batch and (len(batch) + 1) * len(window.ids) > self.batch_tokens:
                self._score_batch(batch, found)
                batch = []
            batch.append((number, window))
        if batch:
            self._score_batch(batch, found)
        return [self._finished(_combined(scores, rule)) for scores in found]

    def _auto_class(self) -> Any:
        """Return transformers' class that loads the model."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def _check(self, model: Any, missing: Sequence[str]) -> None:
        """Refuse a model that is not a trained classifier with one label.

        Raises:
            UserError: it has more than one label, or weights that are not in the folder.
        """
        if model.config.num_labels != 1 or missing:
            raise UserError(f"{self.flag} {self.folder}: no trained classifier with one label; give {self.noun}")

    def _special_tokens(self) -> SpecialTokens:
        """Return the special tokens around a window; none for a run's weighters, as their exports record."""
        adds_special_tokens = read_manifest(self.folder).get("special_tokens", True)
        return SpecialTokens.of(self.tokenizer) if adds_special_tokens else SpecialTokens()

    def _score_batch(self, batch: list[tuple[int, Window]], found: list[list[tuple[float, int]]]) -> None:
        for (number, window), score in zip(batch, self._forward([w for _, w in batch]).tolist(), strict=True):
            found[number].append((score, window.size))

    def _forward(self, windows: list[Window]) -> torch.Tensor:
        """Return the scores [b] of windows."""
        pad = self.model.config.pad_token_id
        if pad is None and len(windows) > 1:  # such a classifier takes no batches
            return torch.cat([self._forward([window]) for window in windows])
        tokens, mask = pad_windows(windows, pad or 0, self.device)
        with torch.inference_mode(), self.precision():
            logits: torch.Tensor = self.model(input_ids=tokens, attention_mask=mask).logits
        return logits.squeeze(-1).float()

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context that the model computes in: bf16 on a GPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def _finished(self, score: float) -> float:
        """Return the final form of a document's score."""
        return score


class PerplexityModel(ScoringModel):
    """A language model; a document's score is its perplexity.

    Each window begins with the end-of-document token, from which its first token is predicted, like the documents
    that the model was trained on.
    """

    flag, noun = "--language-model", "the folder of a language model, such as export-hf writes"

    def _auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def _check(self, model: Any, missing: Sequence[str]) -> None:
        require_all_weights(f"{self.flag} {self.folder}", missing)

    def _special_tokens(self) -> SpecialTokens:
        """Return the end-of-document token, which stands before a window.

        Raises:
            UserError: the tokenizer has none.
        """
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"{self.flag} {self.folder}: its tokenizer has no end-of-sentence token; give another")
        return SpecialTokens((self.tokenizer.eos_token_id,))

    def _forward(self, windows: list[Window]) -> torch.Tensor:
        """Return the mean negative log-likelihoods [b] of the tokens of windows."""
        tokens, mask = pad_windows(windows, 0, self.device)
        with torch.inference_mode(), self.precision():
            logits = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1]  # [b, t - 1, v]
            # [b, t - 1]
            losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none")
            counts = mask[:, 1:]
        return (losses * counts).sum(dim=1) / counts.sum(dim=1)

    def _finished(self, score: float) -> float:
        return exp(min(score, _MAX_NATS))


_MAX_NATS = 700.0
"""exp() of a much larger number would overflow."""


def _combined(scores: list[tuple[float, int]], rule: Rule) -> float:
    """Return a document's score; in the mean, windows count by their tokens."""
    if rule == "mean":
        return sum(score * size for score, size in scores) / sum(size for _, size in scores)
    return max(score for score, _ in scores)
