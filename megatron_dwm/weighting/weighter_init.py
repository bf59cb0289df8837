"""Initialization of a weighter that is not read from a folder: random, or with layers of the language model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.errors import UserError


def random_weighter_model(config: WeightingConfig, vocab_size: int, seq_length: int, eod: int, seed: int) -> Any:
    """Return a classifier of ``--dwm-arch`` and the size flags, the same on every rank.

    Raises:
        UserError: the hidden size is not divisible by the number of attention heads.
    """
    from transformers import AutoConfig

    if config.dwm_arch == "ngram":
        return ngram_weighter_model(config, vocab_size, eod, seed)
    sizes: dict[str, Any] = {
        "hidden_size": config.dwm_hidden_size,
        "num_hidden_layers": config.dwm_num_layers,
        "num_attention_heads": config.dwm_num_attention_heads,
        "max_position_embeddings": seq_length,
    }
    if config.dwm_hidden_size % config.dwm_num_attention_heads:
        raise UserError(
            f"--dwm-hidden-size {config.dwm_hidden_size} is not divisible by --dwm-num-attention-heads "
            f"{config.dwm_num_attention_heads}; change one"
        )
    ffn = config.dwm_ffn_hidden_size or 4 * config.dwm_hidden_size
    if config.dwm_arch == "gpt2":
        sizes["n_inner"] = ffn
    else:
        sizes["intermediate_size"] = ffn
    if config.dwm_arch == "llama":
        sizes["num_key_value_heads"] = config.dwm_num_attention_heads
    if config.dwm_arch == "modernbert":
        # Every layer attends to the whole sample, and the score is computed from the mean over its tokens.
        sizes.update(global_attn_every_n_layers=1, classifier_pooling="mean", cls_token_id=None, sep_token_id=None)
    hf_config = AutoConfig.for_model(config.dwm_arch, vocab_size=vocab_size, **sizes, **_label_settings(eod))
    model = model_from_config(hf_config, seed)
    zero_head(model)
    return model


def default_ngram_buckets(vocab_size: int) -> int:
    """Return a number of buckets with which few n-grams collide.

    One bucket per token of the vocabulary ranks samples worse than 16, and 128 no better (docs/lab-notes.md).
    """
    return int(max(1 << 17, 1 << (16 * vocab_size - 1).bit_length()))


def ngram_weighter_model(config: WeightingConfig, vocab_size: int, eod: int, seed: int) -> Any:
    """Return an n-gram weighter of the ``--dwm-ngram`` flags, for samples of any length."""
    from megatron_dwm.weighting.ngram.configuration import NgramConfig

    hf_config = NgramConfig(
        vocab_size=vocab_size,
        ngram_lengths=config.dwm_ngram_lengths,
        ngram_buckets=config.dwm_ngram_buckets or default_ngram_buckets(vocab_size),
        hidden_size=config.dwm_ngram_hidden_size,
        calibration_points=0 if config.dwm_ngram_hidden_size else config.dwm_calibration_points,
        **_label_settings(eod),
    )
    model = model_from_config(hf_config, seed)
    if not model.is_linear:
        zero_head(model)
    return model


def lm_shaped_model(model: ModelConfig, config: WeightingConfig, vocab_size: int, eod: int, seed: int) -> Any:
    """Return a random classifier of the shape of the language model's embedding and first layers.

    Raises:
        UserError: the language model's architecture has no Hugging Face counterpart, or it has too few layers.
    """
    from megatron_dwm.model.hf_config import hf_config

    check_init_from_lm(model, config)
    settings = hf_config(model, vocab_size=vocab_size, num_layers=config.dwm_num_layers, has_any_tokenizer=True)
    settings.update(_label_settings(eod))
    return model_from_config(settings, seed)


def check_init_from_lm(model: ModelConfig, config: WeightingConfig) -> None:
    """Raise UserError, before anything is built, if the weighter cannot be started from this language model."""
    from megatron_dwm.model.hf_config import hf_config

    if config.dwm_num_layers > model.num_layers:
        raise UserError(
            f"--dwm-num-layers {config.dwm_num_layers} exceeds --num-layers {model.num_layers}; "
            "--dwm-init-from lm copies the language model's first layers"
        )
    try:
        hf_config(model, vocab_size=8, num_layers=config.dwm_num_layers)
    except UserError as error:
        raise UserError(f"--dwm-init-from lm: {error}; or use --dwm-init-from random") from None


def model_from_config(hf_config: Any, seed: int) -> Any:
    """Return a classifier with weights drawn from ``seed``, without changing the global random state."""
    from transformers import AutoModelForSequenceClassification

    with seeded(seed):
        return AutoModelForSequenceClassification.from_config(hf_config)


def weighter_model_from_json(hf_config: str) -> Any:
    """Return a classifier of the architecture in a Hugging Face configuration's JSON, whose weights must be loaded."""
    from transformers import AutoConfig

    values = json.loads(hf_config)
    return model_from_config(AutoConfig.for_model(**values), seed=0)


def zero_head(model: Any) -> None:
    """Zero the head, so that an untrained weighter gives uniform weights."""
    heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1]
    head = heads[-1]
    torch.nn.init.zeros_(head.weight)
    if head.bias is not None:
        torch.nn.init.zeros_(head.bias)


def _label_settings(eod: int) -> dict[str, Any]:
    # The pad token tells the classifier where a sample ends; samples are full, so the last token is read.
    return {"num_labels": 1, "pad_token_id": eod, "eos_token_id": eod, "bos_token_id": None}


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Use ``seed`` in the block, and restore the global random state afterwards."""
    # Only the CPU's generator: torch.manual_seed would also seed the GPU's, which the language model's dropout uses.
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
