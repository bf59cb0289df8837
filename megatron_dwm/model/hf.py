"""The language model as a Hugging Face Llama or GPT-2: its configuration, both ways, and its gathered weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.utils import unwrap_model

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.errors import UserError
from megatron_dwm.model.hf_weights import is_llama, to_hf_state_dict
from megatron_dwm.model.transformer_config import has_tanh_gelu
from megatron_dwm.runtime.device import current_device

if TYPE_CHECKING:
    from transformers import GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What megatron-core's rotary scaling takes for granted, beside its factor: Llama 3's."""


def gather_first_layers(
    chunks: Sequence[Any], model: ModelConfig, *, num_layers: int, vocab_size: int
) -> dict[str, torch.Tensor]:
    """The first layers as the state of a LlamaModel or GPT2Model with ``num_layers`` layers, on every rank.

    Every rank must call it. Parameters must be up to date, which they are not between a step of a distributed
    optimizer with overlapped gathering and the next forward pass.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        vocab_size: embedding rows to keep, usually the vocabulary without its padding.
    """
    state = gather_full_state(chunks, lambda key: not key.startswith("output_layer."), num_layers=num_layers)
    return to_hf_state_dict(state, model, layers=num_layers, vocab_size=vocab_size)


def gather_full_state(
    chunks: Sequence[Any], wanted: Callable[[str], bool], *, num_layers: int | None = None
) -> dict[str, torch.Tensor]:
    """Unsharded float32 copies of the wanted parameters on the CPU of every rank, whatever the layout.

    Every rank must call it.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        wanted: tells by its checkpoint key whether a parameter is wanted.
        num_layers: only that many first layers; all if not given.

    Returns:
        checkpoint key to tensor; parameters of layers are stacked, [layers, ...].
    """
    shards = [shard for shard in _main_shards(chunks) if wanted(shard.key)]
    if num_layers is not None:
        shards = [s for s in shards if s.prepend_axis_num == 0 or s.global_offset[0] < num_layers]
    shapes = _agree_on_shapes({shard.key: shard.global_shape for shard in shards})
    state = {}
    for key, shape in shapes.items():
        if num_layers is not None and key.startswith("decoder.layers."):
            shape = (num_layers, *shape[1:])
        full = torch.zeros(shape, dtype=torch.float32, device=current_device())
        for shard in shards:
            if shard.key == key:
                full[shard.global_slice()] = shard.data.detach().float()
        # Every element is filled on exactly one rank and zero on the others.
        dist.all_reduce(full)
        state[key] = full.cpu()
    return state


def _main_shards(chunks: Sequence[Any]) -> list[ShardedTensor]:
    """This rank's parts of the parameters, without those that another rank holds too and is to provide."""
    shards = []
    for chunk in unwrap_model(list(chunks)):
        sharded = chunk.sharded_state_dict()
        apply_factories(sharded)
        shards += [
            value
            for value in nested_values(sharded)
            if isinstance(value, ShardedTensor) and is_main_replica(value.replica_id)
        ]
    return shards


def _agree_on_shapes(own: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """All ranks' keys and global shapes, in the same order everywhere."""
    everybody: list[dict[str, tuple[int, ...]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everybody, own)
    return dict(sorted(item for shapes in everybody for item in shapes.items()))


def hf_config(model: ModelConfig, *, vocab_size: int, num_layers: int) -> PretrainedConfig:
    """The Hugging Face configuration that computes what the language model computes.

    Rotary positions make it a Llama, learned ones a GPT-2.

    Raises:
        UserError: the architecture is neither's; the message names the flag that does not fit.
    """
    if is_llama(model):
        return _llama_config(model, vocab_size, num_layers)
    if model.positions == "learned_absolute":
        return _gpt2_config(model, vocab_size, num_layers)
    raise UserError(
        f"a Hugging Face model cannot express --position-embedding-type {model.positions}; use rope or learned_absolute"
    )


def _llama_config(model: ModelConfig, vocab_size: int, num_layers: int) -> LlamaConfig:
    from transformers import LlamaConfig

    _refuse(
        "a Hugging Face Llama cannot express",
        {
            f"--normalization {model.normalization}; use RMSNorm": model.normalization != "RMSNorm",
            "a feed-forward layer without gate; add --swiglu": not model.swiglu,
            "biases; add --disable-bias-linear": model.add_bias_linear,
            "--add-qkv-bias; leave it out": model.add_qkv_bias,
            f"--rotary-percent {model.rotary_percent}; use 1.0": model.rotary_percent != 1.0,
            "--rotary-interleaved; leave it out": model.rotary_interleaved,
        }
        | _refused_norms(model),
    )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    if model.use_rope_scaling:
        rope |= {"rope_type": "llama3", "factor": model.rope_scaling_factor, **LLAMA3_ROPE}
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden,
        intermediate_size=model.ffn,
        num_hidden_layers=num_layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.query_groups,
        head_dim=model.head_size,
        hidden_act="silu",
        max_position_embeddings=model.max_position_embeddings or model.sequence,
        initializer_range=model.init_method_std,
        rms_norm_eps=model.layernorm_epsilon,
        tie_word_embeddings=not model.untie_embeddings_and_output_weights,
        rope_parameters=rope,
        attention_dropout=model.attention_dropout,
        bos_token_id=None,
        eos_token_id=None,
    )


def _gpt2_config(model: ModelConfig, vocab_size: int, num_layers: int) -> GPT2Config:
    from transformers import GPT2Config

    _refuse(
        "a Hugging Face GPT-2 cannot express",
        {
            f"--normalization {model.normalization}; use LayerNorm": model.normalization != "LayerNorm",
            "--swiglu; leave it out": model.swiglu,
            "--squared-relu; leave it out": model.squared_relu,
            "--disable-bias-linear; leave it out": not model.add_bias_linear,
            "--group-query-attention; leave it out": model.query_groups != model.heads,
            f"--kv-channels {model.kv_channels}; leave it out": model.head_size * model.heads != model.hidden,
        }
        | _refused_norms(model),
    )
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=model.max_position_embeddings or model.sequence,
        n_embd=model.hidden,
        n_layer=num_layers,
        n_head=model.heads,
        n_inner=model.ffn,
        activation_function="gelu_new" if has_tanh_gelu(model) else "gelu",
        resid_pdrop=model.hidden_dropout,
        embd_pdrop=model.hidden_dropout,
        attn_pdrop=model.attention_dropout,
        layer_norm_epsilon=model.layernorm_epsilon,
        initializer_range=model.init_method_std,
        tie_word_embeddings=not model.untie_embeddings_and_output_weights,
        bos_token_id=None,
        eos_token_id=None,
    )


def _refused_norms(model: ModelConfig) -> dict[str, bool]:
    return {
        "--qk-layernorm; leave it out": model.qk_layernorm,
        "--apply-layernorm-1p; leave it out": model.layernorm_zero_centered_gamma,
    }


def _refuse(subject: str, misfits: Mapping[str, bool]) -> None:
    """Raise for the first misfit that holds; its name is ``"what; remedy"``."""
    for name, holds in misfits.items():
        if holds:
            raise UserError(f"{subject} {name}")


def causal_language_model(
    full_state: Mapping[str, torch.Tensor], model: ModelConfig, *, vocab_size: int
) -> PreTrainedModel:
    """The LlamaForCausalLM or GPT2LMHeadModel of a full state, in its precision.

    Args:
        full_state: checkpoint key to unsharded tensor, as :func:`gather_full_state` returns it.
        vocab_size: embedding rows to keep, usually the vocabulary without its padding.

    Raises:
        UserError: the architecture is neither's, or the state is not this model's.
    """
    from transformers import AutoModelForCausalLM

    try:
        state = to_hf_state_dict(full_state, model, layers=model.layers, vocab_size=vocab_size)
    except (KeyError, IndexError) as error:
        raise UserError(f"the checkpoint does not hold the model that its arguments describe: {error}") from error
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(
            hf_config(model, vocab_size=vocab_size, num_layers=model.layers),
            dtype=full_state["embedding.word_embeddings.weight"].dtype,
        )
    head = state.pop("lm_head.weight", None)
    language_model.base_model.load_state_dict(state, strict=True, assign=True)
    if head is not None:
        language_model.lm_head.load_state_dict({"weight": head}, strict=True, assign=True)
    language_model.tie_weights()
    return language_model


def model_config(config: PretrainedConfig) -> ModelConfig:
    """The language model that computes what a LlamaForCausalLM or GPT2LMHeadModel of ``config`` computes.

    The inverse of :func:`hf_config`; the sequence length is all the positions there are.

    Raises:
        UserError: the architecture is another, or has something that the language model has not.
    """
    if config.model_type == "llama":
        return ModelConfig(**_common_sizes(config), **_llama_flags(config))
    if config.model_type == "gpt2":
        return ModelConfig(**_common_sizes(config), **_gpt2_flags(config))
    raise UserError(f"a {config.model_type} model cannot be imported; use a llama or gpt2 one")


def _common_sizes(config: PretrainedConfig) -> dict[str, Any]:
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "init_method_std": config.initializer_range,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
    }


def _llama_flags(config: PretrainedConfig) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    kind, base = rope.pop("rope_type"), rope.pop("rope_theta")
    factor = rope.pop("factor", 8.0)
    _refuse(
        "a Llama cannot be imported that has",
        {
            f"hidden_act {config.hidden_act}": config.hidden_act != "silu",
            "attention_bias": config.attention_bias,
            "mlp_bias": config.mlp_bias,
            f"rope_theta {base}": base != int(base),
            f"rope_type {kind}": kind not in ("default", "llama3"),
            f"the rope_parameters {rope}": rope != (LLAMA3_ROPE if kind == "llama3" else {}),
        },
    )
    return {
        "position_embedding_type": "rope",
        "rotary_base": int(base),
        "use_rope_scaling": kind == "llama3",
        "rope_scaling_factor": factor,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "ffn_hidden_size": config.intermediate_size,
        "kv_channels": config.head_dim,
        "group_query_attention": config.num_key_value_heads != config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads
        if config.num_key_value_heads != config.num_attention_heads
        else 1,
        "hidden_dropout": 0.0,
        "attention_dropout": config.attention_dropout,
    }


def _gpt2_flags(config: PretrainedConfig) -> dict[str, Any]:
    activation = config.activation_function
    _refuse(
        "a GPT-2 cannot be imported that has",
        {
            f"activation_function {activation}": activation not in ("gelu_new", "gelu_pytorch_tanh", "gelu"),
            "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
            "attention scores that are not scaled": not config.scale_attn_weights,
            "add_cross_attention": config.add_cross_attention,
            f"embd_pdrop {config.embd_pdrop} beside resid_pdrop {config.resid_pdrop}": config.embd_pdrop
            != config.resid_pdrop,
        },
    )
    return {
        "layernorm_epsilon": config.layer_norm_epsilon,
        "bias_gelu_fusion": activation != "gelu",
        "ffn_hidden_size": config.n_inner,
        "hidden_dropout": config.resid_pdrop,
        "attention_dropout": config.attn_pdrop,
    }
