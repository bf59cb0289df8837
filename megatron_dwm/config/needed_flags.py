"""Flags of the language model that have no effect without another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ROPE, _YARN = "--position-embedding-type rope", "--position-embedding-type yarn"
YARN_FIELDS = (
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
)
"""Fields that describe YaRN's rotary positions."""
_NEEDED = {
    "num_query_groups": "--group-query-attention",
    "rotary_base": f"{_ROPE} or yarn",
    **dict.fromkeys(
        (
            "rotary_percent",
            "rotary_interleaved",
            "use_rope_scaling",
            "rotary_seq_len_interpolation_factor",
        ),
        _ROPE,
    ),
    **dict.fromkeys(YARN_FIELDS, _YARN),
    "no_rope_freq": _ROPE,
    "rope_scaling_factor": "--use-rope-scaling",
    "window_attn_skip_freq": "--window-size",
    "dwm_qk_norm_all_heads": "--qk-layernorm",
    **dict.fromkeys(("glu_linear_offset", "activation_func_clamp_value"), "--swiglu or --quick-geglu"),
    **dict.fromkeys(("recompute_method", "recompute_num_layers", "recompute_modules"), "--recompute-granularity"),
    **dict.fromkeys(
        (
            "fp8_recipe",
            "fp8_margin",
            "fp8_interval",
            "fp8_amax_history_len",
            "fp8_amax_compute_algo",
            "fp8_wgrad",
            "first_last_layers_bf16",
            "num_layers_at_start_in_bf16",
            "num_layers_at_end_in_bf16",
        ),
        "--fp8-format",
    ),
}
"""Fields that have no effect without another flag, and that flag."""
TOLERATED_IN_MEGATRON_SCRIPTS = {"recompute_method", "recompute_num_layers"}
"""Those of them that Megatron-LM scripts give even without the other flag."""


def missing_flag(field: str, values: Mapping[str, Any]) -> str | None:
    """Return the flag without which ``field`` has no effect; None if ``values``, of ModelConfig's fields, have it."""
    rope = values.get("position_embedding_type") == "rope" or values.get("use_rotary_position_embeddings")
    yarn = values.get("position_embedding_type") == "yarn"
    given = {
        "--group-query-attention": values.get("group_query_attention"),
        _ROPE: rope,
        _YARN: yarn,
        _NEEDED["rotary_base"]: rope or yarn,
        "--use-rope-scaling": values.get("use_rope_scaling"),
        "--window-size": values.get("window_size"),
        "--qk-layernorm": values.get("qk_layernorm"),
        "--swiglu or --quick-geglu": values.get("swiglu") or values.get("quick_geglu"),
        "--recompute-granularity": values.get("recompute_granularity")
        or values.get("recompute_activations")
        or values.get("checkpoint_activations")
        or values.get("activations_checkpoint_method"),
        "--fp8-format": values.get("fp8"),
    }
    needed = _NEEDED.get(field)
    return None if needed is None or given[needed] else needed
