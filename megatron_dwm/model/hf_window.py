"""Sliding windows of attention as Hugging Face models have them, both ways.

A window of w tokens there holds a token's own and the w - 1 before it; ``--window-size`` counts those before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_dwm.config.model import ModelConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_IN_ALL_LAYERS = ("mistral", "phi3")
"""model_types of which all layers have a window, or none."""
_BY_LAYER = ("qwen2", "qwen3")
"""Those that say of each layer whether it has one."""
_SLIDING, _FULL = "sliding_attention", "full_attention"


def window_flags(config: PretrainedConfig) -> dict[str, Any]:
    """Return the flags of a configuration's window; none if it has none, or one that no sequence exceeds."""
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
    """Tell whether no layer's tokens see all that come before them."""
    return all(_layers(model))


def can_have_window(model: ModelConfig, kind: str) -> bool:
    """Tell whether a configuration of this model_type can say which layers have a window; any can say that none has."""
    if not any(_layers(model)) or kind in _BY_LAYER:
        return True
    return kind in _IN_ALL_LAYERS and has_window_in_all_layers(model)


def window_values(model: ModelConfig, kind: str, num_layers: int) -> dict[str, Any]:
    """Return what a configuration says of the window of the first layers.

    Args:
        kind: the configuration's model_type, which can say it.
    """
    if kind not in (*_IN_ALL_LAYERS, *_BY_LAYER):
        return {}
    if model.window is None or not any(_layers(model)):
        return {"sliding_window": None}
    values: dict[str, Any] = {"sliding_window": model.window[0] + 1}
    if kind in _BY_LAYER:
        layers = _layers(model)[:num_layers]
        types = [_SLIDING if has else _FULL for has in layers]
        # What older versions of transformers go by: layers from this one on have the window.
        first = layers.index(True) if True in layers else num_layers
        values |= {"use_sliding_window": True, "layer_types": types, "max_window_layers": first}
    return values


def _layers(model: ModelConfig) -> list[bool]:
    """Return whether each layer has a window that is shorter than the sequences, as megatron-core counts layers."""
    positions = model.max_position_embeddings or model.sequence
    if model.window is None or model.window[0] + 1 >= positions:
        return [False] * model.layers
    skipped = model.layers_of("window_attn_skip_freq")
    if isinstance(skipped, list):
        return [bool(has) for has in skipped]
    return [skipped is None or number % skipped != 0 for number in range(1, model.layers + 1)]
