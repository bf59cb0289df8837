"""What a weighter starts as: random parameters, layers of the language model, or a Hugging Face folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.data.hf_tokenizers import fingerprint_of_folder
from megatron_dwm.errors import UserError
from megatron_dwm.safe_unpickling import DAMAGE, short_reason
from megatron_dwm.weighting.export_manifest import verify_export

NGRAM = "dwm_ngram"
"""transformers' name of the n-gram weighter's architecture; the class itself would import transformers."""


def random_weighter_model(config: WeightingConfig, vocab_size: int, seq_length: int, eod: int, seed: int) -> Any:
    """A classifier of ``--dwm-arch`` and the size flags, the same on every rank."""
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
        # Every layer sees the whole sample, and the score is read off the mean over its tokens. None is special.
        sizes.update(global_attn_every_n_layers=1, classifier_pooling="mean", cls_token_id=None, sep_token_id=None)
    hf_config = AutoConfig.for_model(config.dwm_arch, vocab_size=vocab_size, **sizes, **_label_settings(eod))
    model = model_from_config(hf_config, seed)
    zero_head(model)
    return model


def ngram_weighter_model(config: WeightingConfig, vocab_size: int, eod: int, seed: int) -> Any:
    """An n-gram weighter of the ``--dwm-ngram`` flags; it takes samples of any length."""
    from megatron_dwm.weighting.ngram.configuration import NgramConfig

    hf_config = NgramConfig(
        vocab_size=vocab_size,
        ngram_lengths=config.dwm_ngram_lengths,
        ngram_buckets=config.dwm_ngram_buckets,
        hidden_size=config.dwm_ngram_hidden_size,
        **_label_settings(eod),
    )
    model = model_from_config(hf_config, seed)
    if not model.is_linear:
        zero_head(model)
    return model


def weighter_model_from_lm(
    chunks: Sequence[Any], model: ModelConfig, config: WeightingConfig, vocab_size: int, eod: int, seed: int
) -> Any:
    """A classifier whose embedding and layers are the language model's first ones; every rank must call it.

    Raises:
        UserError: the language model's architecture has no Hugging Face counterpart, or it has too few layers.
    """
    from megatron_dwm.model.hf_config import hf_config
    from megatron_dwm.model.hf_model import gather_first_layers

    check_init_from_lm(model, config)
    settings = hf_config(model, vocab_size=vocab_size, num_layers=config.dwm_num_layers)
    settings.update(_label_settings(eod))
    classifier = model_from_config(settings, seed)
    state = gather_first_layers(chunks, model, num_layers=config.dwm_num_layers, vocab_size=vocab_size)
    classifier.base_model.load_state_dict(state)
    zero_head(classifier)
    return classifier


def check_init_from_lm(model: ModelConfig, config: WeightingConfig) -> None:
    """Raise UserError, before anything is built, if the weighter cannot be started from this language model."""
    from megatron_dwm.model.hf_config import hf_config

    if config.dwm_num_layers > model.layers:
        raise UserError(
            f"--dwm-num-layers {config.dwm_num_layers} exceeds --num-layers {model.layers}; "
            "--dwm-init-from lm copies the language model's first layers"
        )
    try:
        hf_config(model, vocab_size=8, num_layers=config.dwm_num_layers)
    except UserError as error:
        raise UserError(f"--dwm-init-from lm: {error}; or use --dwm-init-from random") from None


def weighter_model_from_folder(
    flag: str, folder: str, seq_length: int, vocab_size: int, eod: int, fingerprint: str, seed: int
) -> Any:
    """A classifier from any Hugging Face folder with the run's tokenizer; a language model's gets a new head.

    Args:
        flag: the flag that names ``folder``, for messages.
        eod: end-of-document token, which pads where the folder names no token for that.

    Raises:
        UserError: the folder is missing, cannot be loaded, has more than one label, another tokenizer, or is made for
            shorter samples.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{flag} {folder}: no config.json there; give a Hugging Face model folder")
    is_export = verify_export(flag, Path(folder))
    try:
        has_same_tokenizer = fingerprint_of_folder(Path(folder)) == fingerprint
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
    if not has_same_tokenizer:
        raise UserError(
            f"{flag} {folder}: its tokenizer is not this run's; use a weighter trained with the same tokenizer"
        )
    try:
        hf_config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _check_layers(Path(folder), hf_config)
        with _seeded(seed):
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                num_labels=1,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except (*DAMAGE, SafetensorError) as error:
        reason = short_reason(error)
        raise UserError(f"{flag} {folder}: cannot be loaded as a classifier with one label ({reason})") from None
    positions = _usable_positions(model)
    if positions is not None and positions < seq_length:
        raise UserError(
            f"{flag} {folder}: made for {positions} positions, fewer than --seq-length {seq_length}; "
            "use another weighter"
        )
    if hf_config.vocab_size < vocab_size:
        raise UserError(
            f"{flag} {folder}: its {hf_config.vocab_size} embeddings are fewer than the {vocab_size} tokens"
        )
    if model.config.pad_token_id is None:  # a language model's; without one a classifier takes no batches
        model.config.pad_token_id = eod
    missing = sorted(report["missing_keys"])
    essential = missing if is_export else [key for key in missing if _is_of_base_model(key, model)]
    if essential:
        raise UserError(f"{flag} {folder}: its weights lack {essential[0]}; give a whole model")
    if not all(bool(torch.isfinite(param).all()) for param in model.parameters()):
        raise UserError(f"{flag} {folder}: its weights are not finite; give another")
    if missing:
        zero_head(model)
    return model


def _check_layers(folder: Path, hf_config: Any) -> None:
    """Check, before they are made, that a classifier's layers can be those whose tensors are there.

    Raises:
        ValueError: there are more than tensors.
    """
    from safetensors import safe_open

    path, layers = folder / "model.safetensors", getattr(hf_config, "num_hidden_layers", None)
    if not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        tensors = len(file.keys())
    if isinstance(layers, int) and layers > tensors:
        raise ValueError(f"{layers} layers of {tensors} tensors")


def _usable_positions(model: Any) -> int | None:
    """Return for how many tokens a classifier has positions; None if for any number."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings - module.padding_idx - 1)  # RoBERTa counts on from the padding token's
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    return positions


def _is_of_base_model(key: str, model: Any) -> bool:
    """Whether a tensor is of the layers below the classifier's head, which a language model's folder must have."""
    return key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key


def model_from_config(hf_config: Any, seed: int) -> Any:
    """A classifier with weights drawn from ``seed``, leaving the global random state as it is."""
    from transformers import AutoModelForSequenceClassification

    with _seeded(seed):
        return AutoModelForSequenceClassification.from_config(hf_config)


def weighter_model_from_json(hf_config: str) -> Any:
    """A classifier of the architecture in a Hugging Face configuration's JSON; its weights are to be loaded."""
    from transformers import AutoConfig

    values = json.loads(hf_config)
    return model_from_config(AutoConfig.for_model(**values), seed=0)


def zero_head(model: Any) -> None:
    """Make all scores exactly 0, so that an untrained weighter gives uniform weights."""
    heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1]
    head = heads[-1]
    torch.nn.init.zeros_(head.weight)
    if head.bias is not None:
        torch.nn.init.zeros_(head.bias)


def _label_settings(eod: int) -> dict[str, Any]:
    # The pad token tells the classifier where a sample ends; samples are full, so the last token is read.
    return {"num_labels": 1, "pad_token_id": eod, "eos_token_id": eod, "bos_token_id": None}


@contextlib.contextmanager
def _seeded(seed: int) -> Any:
    # The CPU's stream alone: torch.manual_seed would also seed the GPU's, which the language model's dropout uses.
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
