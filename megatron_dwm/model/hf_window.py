"""Conversion of sliding windows between ``--window-size`` and Hugging Face configurations.

A Hugging Face window of w tokens includes the token itself; ``--window-size`` counts only the w - 1 before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_dwm.config.model import ModelConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_IN_ALL_LAYERS = ("mistral", "phi3")
"""model_types with a window in all layers, or in none."""
_BY_LAYER = ("qwen2", "qwen3")
"""model_types that declare for each layer whether it has a window."""
_SLIDING, _FULL = "sliding_attention", "full_attention"


def window_flags(config: PretrainedConfig) -> dict[str, Any]:
    """Return the flags of a configuration's window; empty if it has none, or one that no sequence exceeds."""
    window = getattr(config, "sliding_window", None)
    if (
        config.model_type not in (*_IN_ALL_LAYERS, *_BY_LAYER)
        or window is None
        or window >= config.max_position_embeddings
    ):
        return {}
    has_window = [True] * config.num_hidden_layers
    if config.model_type in _BY_LAYER:
        has_window = [layer == _SLIDING for layer in config.layer_types]
    if not any(has_window):
        return {}
    pattern = None if all(has_window) else f"[{','.join(str(int(has)) for has in has_window)}]"
    return {"window_size": f"{window - 1},0", "window_attn_skip_freq": pattern}


def has_window_in_all_layers(model: ModelConfig) -> bool:
    """Return whether every layer has a window that limits the attention."""
    return all(_layers(model))


def can_have_window(model: ModelConfig, kind: str) -> bool:
    """Return whether configurations of this model_type can express windows in some layers."""
    if not any(_layers(model)) or kind in _BY_LAYER:
        return True
    return kind in _IN_ALL_LAYERS and has_window_in_all_layers(model)


def window_values(model: ModelConfig, kind: str, num_layers: int) -> dict[str, Any]:
    """Return the values of a configuration that express the window of the first layers.

    Args:
        kind: the configuration's model_type, which can express it.
    """
    if kind not in (*_IN_ALL_LAYERS, *_BY_LAYER):
        return {}
    if model.window is None or not any(_layers(model)):
        return {"sliding_window": None}
    values: dict[str, Any] = {"sliding_window": model.window[0] + 1}
    if kind in _BY_LAYER:
        layers = _layers(model)[:num_layers]
        types = [_SLIDING if has else _FULL for has in layers]
        # For older versions of transformers: layers from this one on have the window.
        first = layers.index(True) if True in layers else num_layers
        values |= {"use_sliding_window": True, "layer_types": types, "max_window_layers": first}
    return values


def _layers(model: ModelConfig) -> list[bool]:
    """Return, for each layer in megatron-core's order, whether its window is shorter than the sequences."""
    positions = model.max_position_embeddings or model.seq_length
    if model.window is None or model.window[0] + 1 >= positions:
        return [False] * model.num_layers
    skipped = model.layers_of("window_attn_skip_freq")
    if isinstance(skipped, list):
        return [bool(has) for has in skipped]
    return [skipped is None or number % skipped != 0 for number in range(1, model.num_layers + 1)]
