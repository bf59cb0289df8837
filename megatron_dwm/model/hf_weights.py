"""The weights of a GPT under megatron-core's checkpoint keys and under Hugging Face's names, both ways.

A *full state* maps checkpoint keys to unsharded tensors, those of layers stacked: [layers, ...]. A *Hugging Face
state* has the names of a LlamaModel or GPT2Model, and ``lm_head.weight`` if the model has an output layer of its own.

Shape legend: h hidden size, n heads, g query groups, d head size, f feed-forward size, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from megatron_dwm.config.model import ModelConfig

_LAYERS = "decoder.layers."
_QKV = "self_attention.linear_qkv"
_FC1 = "mlp.linear_fc1"
_HEAD = "lm_head.weight", "output_layer.weight"
_VOCABULARY = "embed_tokens.weight", "wte.weight", "lm_head.weight"

# Hugging Face's name to checkpoint key, where the tensors are the same or each other's transposes.
_LLAMA_ENDS = {
    "embed_tokens.weight": "embedding.word_embeddings.weight",
    "norm.weight": "decoder.final_layernorm.weight",
}
_LLAMA_LAYER = {
    "input_layernorm.weight": f"{_QKV}.layer_norm_weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "post_attention_layernorm.weight": f"{_FC1}.layer_norm_weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
}
_GPT2_ENDS = {
    "wte.weight": "embedding.word_embeddings.weight",
    "wpe.weight": "embedding.position_embeddings.weight",
    "ln_f.weight": "decoder.final_layernorm.weight",
    "ln_f.bias": "decoder.final_layernorm.bias",
}
_GPT2_LAYER = {
    "ln_1.weight": f"{_QKV}.layer_norm_weight",
    "ln_1.bias": f"{_QKV}.layer_norm_bias",
    "attn.c_proj.weight": "self_attention.linear_proj.weight",
    "attn.c_proj.bias": "self_attention.linear_proj.bias",
    "ln_2.weight": f"{_FC1}.layer_norm_weight",
    "ln_2.bias": f"{_FC1}.layer_norm_bias",
    "mlp.c_fc.weight": f"{_FC1}.weight",
    "mlp.c_fc.bias": f"{_FC1}.bias",
    "mlp.c_proj.weight": "mlp.linear_fc2.weight",
    "mlp.c_proj.bias": "mlp.linear_fc2.bias",
}
_GPT2_TRANSPOSED = "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"  # GPT-2 keeps them [in, out]


def is_llama(model: ModelConfig) -> bool:
    """Whether the model's Hugging Face form is a Llama; else it is a GPT-2."""
    return model.positions == "rope"


def to_hf_state_dict(
    full_state: Mapping[str, torch.Tensor], model: ModelConfig, *, layers: range | int, vocab_size: int
) -> dict[str, torch.Tensor]:
    """The Hugging Face state of a full state.

    Args:
        full_state: without ``output_layer.weight`` there is no head.
        layers: the layers to take, or how many first ones; they are numbered from 0 again.
        vocab_size: embedding rows to keep, usually the vocabulary without its padding.
    """
    taken = range(layers) if isinstance(layers, int) else layers
    ends, stem, layer_of = (
        (_LLAMA_ENDS, "layers", _to_llama_layer) if is_llama(model) else (_GPT2_ENDS, "h", _to_gpt2_layer)
    )
    state = {name: full_state[key] for name, key in ends.items()}
    if _HEAD[1] in full_state:
        state[_HEAD[0]] = full_state[_HEAD[1]]
    for name in _VOCABULARY:
        if name in state:
            state[name] = state[name][:vocab_size]
    for number, layer in enumerate(taken):
        layer_state = {key.removeprefix(_LAYERS): t[layer] for key, t in full_state.items() if key.startswith(_LAYERS)}
        state |= {f"{stem}.{number}.{name}": tensor for name, tensor in layer_of(layer_state, model).items()}
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def from_hf_state_dict(
    state: Mapping[str, torch.Tensor], model: ModelConfig, *, padded_vocab_size: int
) -> dict[str, torch.Tensor]:
    """The full state of a Hugging Face state: the inverse of :func:`to_hf_state_dict`.

    Args:
        state: with ``lm_head.weight`` if and only if the model has an output layer of its own.
        padded_vocab_size: rows of the embedding; those beyond the vocabulary are zero.
    """
    ends, stem, layer_of = (
        (_LLAMA_ENDS, "layers", _from_llama_layer) if is_llama(model) else (_GPT2_ENDS, "h", _from_gpt2_layer)
    )
    names = dict(ends)
    if model.untie_embeddings_and_output_weights:
        names[_HEAD[0]] = _HEAD[1]
    full = {
        key: _padded(state[name], padded_vocab_size) if name in _VOCABULARY else state[name].clone()
        for name, key in names.items()
    }
    layers = [layer_of(_below(state, f"{stem}.{number}."), model) for number in range(model.layers)]
    for key in layers[0]:
        full[_LAYERS + key] = torch.stack([layer[key] for layer in layers])
    return full


def _below(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


def _to_llama_layer(layer_state: Mapping[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    query, key, value = _split_qkv(layer_state[f"{_QKV}.weight"], model)
    gate, up = layer_state[f"{_FC1}.weight"].chunk(2)
    return {name: layer_state[core] for name, core in _LLAMA_LAYER.items()} | {
        "self_attn.q_proj.weight": query,
        "self_attn.k_proj.weight": key,
        "self_attn.v_proj.weight": value,
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
    }


def _from_llama_layer(layer_state: Mapping[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    projections = [layer_state[f"self_attn.{letter}_proj.weight"] for letter in "qkv"]
    return {core: layer_state[name] for name, core in _LLAMA_LAYER.items()} | {
        f"{_QKV}.weight": _join_qkv(projections, model),
        f"{_FC1}.weight": torch.cat([layer_state["mlp.gate_proj.weight"], layer_state["mlp.up_proj.weight"]]),
    }


def _to_gpt2_layer(layer_state: Mapping[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    state = {
        name: layer_state[core].T if name in _GPT2_TRANSPOSED else layer_state[core]
        for name, core in _GPT2_LAYER.items()
    }
    return state | {
        "attn.c_attn.weight": torch.cat(_split_qkv(layer_state[f"{_QKV}.weight"], model)).T,
        "attn.c_attn.bias": torch.cat(_split_qkv(layer_state[f"{_QKV}.bias"], model)),
    }


def _from_gpt2_layer(layer_state: Mapping[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    state = {
        core: layer_state[name].T if name in _GPT2_TRANSPOSED else layer_state[name]
        for name, core in _GPT2_LAYER.items()
    }
    return state | {
        f"{_QKV}.weight": _join_qkv(layer_state["attn.c_attn.weight"].T.chunk(3), model),
        f"{_QKV}.bias": _join_qkv(layer_state["attn.c_attn.bias"].chunk(3), model),
    }


def _split_qkv(qkv: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [n d, ...], keys [g d, ...] and values [g d, ...] of megatron-core's fused projection.

    Args:
        qkv: [g (n/g + 2) d, ...]: for each query group its queries, then its key, then its value.
    """
    per_group = model.heads // model.query_groups
    groups = qkv.view(model.query_groups, per_group + 2, model.head_size, *qkv.shape[1:])
    query, key, value = torch.split(groups, [per_group, 1, 1], dim=1)
    return query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2)


def _join_qkv(projections: Iterable[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """The inverse of :func:`_split_qkv`."""
    groups = [part.reshape(model.query_groups, -1, model.head_size, *part.shape[1:]) for part in projections]
    return torch.cat(groups, dim=1).flatten(0, 2)
