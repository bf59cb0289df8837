"""The language model as a Hugging Face Llama or GPT-2: its configuration and its weights.

Shape legend: h hidden size, n heads, g query groups, d head size, f feed-forward size, v vocabulary.
"""

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
from megatron_dwm.model.builder import current_device
from megatron_dwm.model.transformer_config import has_tanh_gelu

if TYPE_CHECKING:
    from transformers import GPT2Config, LlamaConfig, PretrainedConfig

ROPE_SCALING_CONTEXT = 8192
"""Context of the model that megatron-core's rotary scaling stretches; Llama 3's."""


def gather_first_layers(
    chunks: Sequence[Any], model: ModelConfig, *, num_layers: int, vocab_size: int
) -> dict[str, torch.Tensor]:
    """The first layers as the state of a LlamaModel or GPT2Model with ``num_layers`` layers, on every rank.

    Every rank must call it. Parameters must be up to date, which they are not between a step of a distributed
    optimiser with overlapped gathering and the next forward pass.

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
    if model.positions == "rope":
        return _llama_config(model, vocab_size, num_layers)
    if model.positions == "learned_absolute":
        return _gpt2_config(model, vocab_size, num_layers)
    raise UserError(
        f"a Hugging Face model cannot express --position-embedding-type {model.positions}; use rope or learned_absolute"
    )


def _llama_config(model: ModelConfig, vocab_size: int, num_layers: int) -> LlamaConfig:
    from transformers import LlamaConfig

    _refuse(
        "Llama",
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
        rope |= {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": ROPE_SCALING_CONTEXT,
        }
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
        "GPT-2",
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


def _refuse(family: str, misfits: Mapping[str, bool]) -> None:
    """Raise for the first misfit that holds; its name is ``"what; remedy"``."""
    for name, holds in misfits.items():
        if holds:
            what, remedy = name.split("; ")
            raise UserError(f"a Hugging Face {family} cannot express {what}; {remedy}")


def to_hf_state_dict(
    full_state: Mapping[str, torch.Tensor], model: ModelConfig, *, layers: range | int, vocab_size: int
) -> dict[str, torch.Tensor]:
    """The weights under the names of a LlamaModel or GPT2Model, and ``lm_head.weight`` if the model has one.

    Args:
        full_state: what :func:`gather_full_state` returned; without ``output_layer.weight`` there is no head.
        layers: the layers to take, or how many first ones; they are numbered from 0 again.
        vocab_size: embedding rows to keep, usually the vocabulary without its padding.
    """
    taken = range(layers) if isinstance(layers, int) else layers
    is_llama = model.positions == "rope"
    convert = _llama_layer if is_llama else _gpt2_layer
    state = _llama_ends(full_state) if is_llama else _gpt2_ends(full_state)
    if "output_layer.weight" in full_state:
        state["lm_head.weight"] = full_state["output_layer.weight"]
    for name in ("embed_tokens.weight", "wte.weight", "lm_head.weight"):
        if name in state:
            state[name] = state[name][:vocab_size]
    prefix = "decoder.layers."
    for number, layer in enumerate(taken):
        own = {k.removeprefix(prefix): t[layer] for k, t in full_state.items() if k.startswith(prefix)}
        stem = f"layers.{number}" if is_llama else f"h.{number}"
        state |= {f"{stem}.{name}": tensor for name, tensor in convert(own, model).items()}
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def _llama_ends(full: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        "embed_tokens.weight": full["embedding.word_embeddings.weight"],
        "norm.weight": full["decoder.final_layernorm.weight"],
    }


def _gpt2_ends(full: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        "wte.weight": full["embedding.word_embeddings.weight"],
        "wpe.weight": full["embedding.position_embeddings.weight"],
        "ln_f.weight": full["decoder.final_layernorm.weight"],
        "ln_f.bias": full["decoder.final_layernorm.bias"],
    }


def _llama_layer(own: Mapping[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    query, key, value = _split_qkv(own["self_attention.linear_qkv.weight"], model)
    gate, up = own["mlp.linear_fc1.weight"].chunk(2)
    return {
        "input_layernorm.weight": own["self_attention.linear_qkv.layer_norm_weight"],
        "self_attn.q_proj.weight": query,
        "self_attn.k_proj.weight": key,
        "self_attn.v_proj.weight": value,
        "self_attn.o_proj.weight": own["self_attention.linear_proj.weight"],
        "post_attention_layernorm.weight": own["mlp.linear_fc1.layer_norm_weight"],
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": own["mlp.linear_fc2.weight"],
    }


def _gpt2_layer(own: Mapping[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    # GPT-2 keeps its weights [in, out].
    return {
        "ln_1.weight": own["self_attention.linear_qkv.layer_norm_weight"],
        "ln_1.bias": own["self_attention.linear_qkv.layer_norm_bias"],
        "attn.c_attn.weight": torch.cat(_split_qkv(own["self_attention.linear_qkv.weight"], model)).T,
        "attn.c_attn.bias": torch.cat(_split_qkv(own["self_attention.linear_qkv.bias"], model)),
        "attn.c_proj.weight": own["self_attention.linear_proj.weight"].T,
        "attn.c_proj.bias": own["self_attention.linear_proj.bias"],
        "ln_2.weight": own["mlp.linear_fc1.layer_norm_weight"],
        "ln_2.bias": own["mlp.linear_fc1.layer_norm_bias"],
        "mlp.c_fc.weight": own["mlp.linear_fc1.weight"].T,
        "mlp.c_fc.bias": own["mlp.linear_fc1.bias"],
        "mlp.c_proj.weight": own["mlp.linear_fc2.weight"].T,
        "mlp.c_proj.bias": own["mlp.linear_fc2.bias"],
    }


def _split_qkv(qkv: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [n d, ...], keys [g d, ...] and values [g d, ...] of megatron-core's fused projection.

    Args:
        qkv: [g (n/g + 2) d, ...]: for each query group its queries, then its key, then its value.
    """
    per_group = model.heads // model.query_groups
    groups = qkv.view(model.query_groups, per_group + 2, model.head_size, *qkv.shape[1:])
    query, key, value = groups.split([per_group, 1, 1], dim=1)
    return query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2)
