"""Flags from the arguments that a checkpoint was saved with, by this program or Megatron-LM."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dwm.config.flags import declared_flags, flag_name
from megatron_dwm.config.layer_patterns import parse_layers
from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.needed_flags import YARN_FIELDS, missing_flag
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.errors import UserError
from megatron_dwm.safe_unpickling import UnreadableFileError, read_common_state, read_torch_file
from megatron_dwm.special_files import require_plain_files

UNKNOWN_PARTS = (
    "experimental_attention_variant",
    "is_hybrid_model",
    "linear_attention_freq",
    "mtp_num_layers",
    "multi_latent_attention",
    "num_experts",
)
"""Arguments in Megatron-LM's checkpoints that, if set, make a different model from the same tensors."""

_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels")
_OURS = ("dwm_qk_norm_all_heads", "dwm_output_norm")
"""Parts of models that Megatron-LM does not have."""
_PARTS = (
    "num_query_groups",
    "position_embedding_type",
    "normalization",
    "qk_layernorm",
    *_OURS,
    "swiglu",
    "quick_geglu",
    "attention_output_gate",
    "softmax_type",
    "add_bias_linear",
    "add_qkv_bias",
    "untie_embeddings_and_output_weights",
)
"""What determines the model's tensors, together with the sizes."""
_FUNCTION = (
    "add_position_embedding",
    "squared_relu",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "qk_l2_norm",
    "window_size",
    "window_attn_skip_freq",
    "no_rope_freq",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
    *YARN_FIELDS,
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
)
"""What the model computes with the same tensors."""

# Always taken from the checkpoint. Megatron-LM takes all but four of them, and so trains another model if these are not
# given again: use_rope_scaling, rope_scaling_factor, layernorm_epsilon and qk_layernorm.
_ALWAYS = (
    *_PARTS,
    *_FUNCTION,
    "group_query_attention",
    "use_rotary_position_embeddings",
    "apply_query_key_layer_scaling",
    "attention_dropout",
    "hidden_dropout",
    "tiktoken_pattern",
)
_IF_NOT_GIVEN = (
    *_SIZES,
    "seq_length",
    "max_position_embeddings",
    "padded_vocab_size",
    "tokenizer_type",
    "tokenizer_model",
)


RENAMED = {"dwm_valid_data_path": "dwm_target_data_path"}
"""Arguments that earlier versions saved under another name, with the current one."""


def first_rank_file(folder: Path) -> Path | None:
    """Return the first rank's file of a checkpoint in Megatron-LM's older format; None if it has another format."""
    return next(iter(sorted(folder.glob("mp_rank_00*/model_optim_rng.pt"))), None)


def read_arguments(folder: Path) -> dict[str, Any]:
    """Return the arguments that the checkpoint in ``folder`` was saved with, by their current names.

    ``trust_remote_code`` is not among them: only the user who loads the checkpoint may allow it.

    Raises:
        UserError: it has none.
    """
    path = first_rank_file(folder)
    require_plain_files(folder if path is None else path.parent, str(folder), "the checkpoint is damaged, give another")
    try:
        common = read_common_state(folder) if path is None else read_torch_file(path)
    except UnreadableFileError as error:
        raise UserError(f"{folder}: {error}; the checkpoint is damaged, give another") from None
    arguments = common.get("args") if isinstance(common, dict) else None
    if not isinstance(arguments, Namespace):
        name = path.name if path else "common.pt"
        raise UserError(f"{folder}: its {name} holds no arguments; it is not a checkpoint of pretraining")
    return {RENAMED.get(name, name): value for name, value in vars(arguments).items() if name != "trust_remote_code"}


def effective_arguments(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``saved`` without the values that have no effect, some of which Megatron-LM saves.

    Raises:
        UserError: they describe a model that this program does not train.
    """
    foreign = {name: saved[name] for name in UNKNOWN_PARTS if saved.get(name)}
    if foreign:
        name, value = next(iter(foreign.items()))
        raise UserError(
            f"--load: the checkpoint was saved with {name}={value}; this program has no such model; give another "
            "checkpoint"
        )
    known = {name: value for name, value in saved.items() if missing_flag(name, saved) is None}
    # Megatron-LM saves parsed values, and the same pattern can be written in several ways.
    values = {name: known[name] for name in ("window_size", "window_attn_skip_freq", "no_rope_freq") if known.get(name)}
    return known | {name: _as_text(name, value, saved["num_layers"]) for name, value in values.items()}


def _as_text(name: str, value: Any, num_layers: int) -> str:
    """Return the shortest spelling of ``value`` for a flag of a window or of layers.

    Raises:
        UserError: the flag cannot express it.
    """
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value).replace(" ", "")
    if name == "window_size":
        return text.strip("()")
    return str(parse_layers(flag_name(name), text, num_layers)).replace(" ", "")


def with_saved_arguments(given: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags' values under ``--use-checkpoint-args``.

    As in Megatron-LM, the architecture is always the checkpoint's, and sizes are the checkpoint's if they are not
    given. So is the tokenizer, which Megatron-LM always takes from the checkpoint.

    Args:
        given: values of the flags that were given, by field.
        saved: a checkpoint's arguments.

    Raises:
        UserError: they describe a model that this program does not train.
    """
    known = {name: value for name, value in effective_arguments(saved).items() if value is not None}
    kept = {name: value for name, value in given.items() if name not in _ALWAYS or name not in saved}
    taken = {name: known[name] for name in (*_IF_NOT_GIVEN, *_ALWAYS) if name in known}
    return taken | kept


def differing_flag(run: Mapping[str, Any], saved: Mapping[str, Any], *, finetune: bool = False) -> str | None:
    """Return how a run's model differs from a checkpoint's; None if it does not.

    Args:
        run: the arguments that the run would save.
        saved: the arguments that the checkpoint was saved with.
        finetune: whether the model may compute something different with the same tensors.

    Returns:
        the flag, its value and the checkpoint's, and a remedy.

    Raises:
        UserError: the checkpoint's arguments describe a model that this program does not train.
    """
    ours, theirs = _architecture(run), _architecture(saved)
    if finetune and {"rope", "yarn"} == {side.get("position_embedding_type") for side in (ours, theirs)}:
        ours["position_embedding_type"] = theirs["position_embedding_type"]  # the same tensors
    names = [*_SIZES, *_PARTS, *(() if finetune else _FUNCTION)]
    if ours.get("position_embedding_type") == "learned_absolute":
        names.append("max_position_embeddings")
    if run.get("vocab_file") and not finetune:  # as in Megatron-LM
        names += ["max_position_embeddings", "make_vocab_size_divisible_by", "tokenizer_type"]
    for name in names:
        value, found = ours.get(name), theirs.get(name)
        is_known = name in run and name in saved  # then None is a value; other versions of Megatron-LM lack some names
        if value != found and (is_known or None not in (value, found)):
            remedy = "change it, or load with --finetune" if name in _FUNCTION else "change it, or --load"
            return f"{_difference(name, value, found)}; {remedy}"
    return None


def _difference(name: str, value: Any, found: Any) -> str:
    (item,) = (
        item for config in (ModelConfig, TokenizerConfig) for item in declared_flags(config) if item.field == name
    )
    if item.value_type is not None and None not in (value, found):
        return f"{item.names[0]} {value} is not what the checkpoint was saved with, {found}"
    given = "given" if item.value_type is None else None  # a switch has no value
    here, there = ("not given" if side in (item.default, None) else given or side for side in (value, found))
    return f"{item.names[0]} is {here}, but was {there} when the checkpoint was saved"


def _architecture(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``arguments`` in a canonical form, so that flags with the same meaning compare equal."""
    known = dict.fromkeys(_OURS, False) | effective_arguments(arguments)
    if known.get("use_rotary_position_embeddings"):
        known["position_embedding_type"] = "rope"
    if not known.get("group_query_attention"):
        known["num_query_groups"] = known.get("num_attention_heads")
    if known.get("add_bias_linear"):
        known["add_qkv_bias"] = True
    return known
