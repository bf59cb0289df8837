"""The model card of an exported language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dwm.config.flags import flag_name
from megatron_dwm.model_card import bullets, render_card

_DATA = ("data_path", "train_data_path", "valid_data_path", "test_data_path", "split")


def language_model_card(
    saved: Mapping[str, Any], language_model: Any, tokenizer: Any, *, name: str, effect: str | None
) -> str:
    """Return the card.

    Args:
        saved: the checkpoint's arguments.
        language_model: the Hugging Face model; its parameters need no storage.
        tokenizer: the Hugging Face tokenizer.
        name: name of the folder.
        effect: what was measured of the run; None if nothing is known.
    """
    window, samples = saved.get("seq_length"), saved.get("consumed_train_samples")
    is_weighted = bool(samples) and saved.get("dwm_mode", "off") != "off"
    origin = "pretrained with Megatron-DWM" if samples else "from a checkpoint that Megatron-DWM imported"
    weighting = (
        "None: all samples had the same weight."
        if not is_weighted
        else bullets(
            {
                "Mode": f"`{saved['dwm_mode']}`",
                "Target set": _words(saved.get("dwm_target_data_path")),
                "Weighter": saved.get("dwm_load") or f"{saved.get('dwm_arch')}, from {saved.get('dwm_init_from')}",
                "Stages": saved.get("dwm_num_stages") if saved["dwm_mode"] == "bilevel" else None,
            }
        )
    )
    sections = {
        "Data": bullets(
            {
                **{f"`{flag_name(field)}`": _words(saved.get(field)) for field in _DATA},
                "Tokenizer": f"{saved.get('tokenizer_type')}, {len(tokenizer):,} tokens",
                "Seen in training": f"{samples:,} samples of {window} tokens" if samples else None,
            }
        )
        or "Not recorded.",
        "Weighting of the data": weighting,
        "Measured effect": effect or "Not recorded in this folder.",
        "Limits": "\n".join(
            [
                f"* It was trained on sequences of {window} tokens. The tokenizer truncates to that with "
                "`truncation=True`, and generation stops there; longer sequences were not tried.",
                "* It continues text. It was not trained to follow instructions, nor to be safe, and it repeats "
                "what its data say.",
            ]
        ),
        "How to load": "\n".join(
            [
                "```python",
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                "",
                f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
                f'model = AutoModelForCausalLM.from_pretrained("{name}")',
                "```",
            ]
        ),
    }
    kind = type(language_model).__name__
    return render_card(
        name,
        task="text-generation",
        tags=["pretrained"],
        introduction=f"A language model of {language_model.num_parameters():,} parameters ({kind}), {origin}.",
        sections=sections,
    )


def _words(value: Any) -> str | None:
    if not value:
        return None
    return f"`{' '.join(map(str, value)) if isinstance(value, list) else value}`"
