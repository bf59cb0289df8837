"""Conversion of a GPT's weights between megatron-core's checkpoint keys and Hugging Face's names.

A *full state* maps checkpoint keys to unsharded tensors, those of layers stacked: [layers, ...]. A *Hugging Face
state* has the names of the base model (LlamaModel, GPT2Model, ...), and ``lm_head.weight`` if the model has a separate
output layer. Each checkpoint tensor, and each layer's part of a stacked tensor, is converted separately, so that a
model can be converted piece by piece.

Shape legend: h hidden size, n heads, g query groups, d head size, f feed-forward size, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.errors import UserError
from megatron_dwm.model.hf_config import architecture

LAYERS = "decoder.layers."
"""Prefix of the checkpoint keys of layers, whose tensors are stacked."""
_ATTENTION = "self_attention."
_QKV, _PROJ, _FC1, _FC2 = f"{_ATTENTION}linear_qkv", f"{_ATTENTION}linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"
_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
VOCABULARY = (_EMBEDDING, _HEAD)
"""Checkpoint keys of the tensors that have a row for each token."""


def _one(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return (tensor,)


def _only(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0]


@dataclass(frozen=True)
class Conversion:
    """A checkpoint tensor and the corresponding Hugging Face tensors; those of a layer without its prefix."""

    key: str
    names: tuple[str, ...]
    split: Callable[[torch.Tensor], Sequence[torch.Tensor]] = _one
    """The Hugging Face tensors, in the order of ``names``."""
    join: Callable[[Sequence[torch.Tensor]], torch.Tensor] = _only
    """The inverse of ``split``."""


@dataclass(frozen=True)
class Piece:
    """A conversion for one of a model's layers, or for weights outside the layers."""

    conversion: Conversion
    layer: int | None

    @property
    def key(self) -> str:
        """The checkpoint key."""
        return self.conversion.key if self.layer is None else LAYERS + self.conversion.key

    def names(self, model: ModelConfig, number: int | None = None) -> list[str]:
        """Return the Hugging Face names.

        Args:
            number: number of the layer there, if it is different.
        """
        if self.layer is None:
            return list(self.conversion.names)
        stem = "h" if architecture(model) == "gpt2" else "layers"
        place = self.layer if number is None else number
        return [f"{stem}.{place}.{name}" for name in self.conversion.names]


def pieces(model: ModelConfig, layers: range) -> Iterator[Piece]:
    """Yield the pieces of a model in the order of its weights: embedding, ``layers``, last norm, head."""
    first, last = _ends(model)
    for conversion in first:
        yield Piece(conversion, None)
    for layer in layers:
        for conversion in _of_layer(model):
            yield Piece(conversion, layer)
    for conversion in last:
        yield Piece(conversion, None)


def to_hf_state_dict(
    full_state: Mapping[str, torch.Tensor], model: ModelConfig, *, layers: range | int, vocab_size: int
) -> dict[str, torch.Tensor]:
    """Return the Hugging Face state of a full state.

    Args:
        full_state: without ``output_layer.weight`` there is no head.
        layers: the layers to take, or how many first ones; they are numbered from 0 again.
        vocab_size: embedding rows to keep, usually the vocabulary without its padding.
    """
    taken = range(layers) if isinstance(layers, int) else layers
    state: dict[str, torch.Tensor] = {}
    for piece in pieces(model, taken):
        if piece.key == _HEAD and _HEAD not in full_state:
            continue
        tensor = full_state[piece.key] if piece.layer is None else full_state[piece.key][piece.layer]
        number = None if piece.layer is None else piece.layer - taken.start
        state |= zip(piece.names(model, number), to_hf(piece, tensor, vocab_size), strict=True)
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def to_hf(piece: Piece, tensor: torch.Tensor, vocab_size: int) -> Sequence[torch.Tensor]:
    """Return the Hugging Face tensors of a piece, in the order of its names; views where possible."""
    return piece.conversion.split(tensor[:vocab_size] if piece.key in VOCABULARY else tensor)


def from_hf(
    piece: Piece, state: Mapping[str, torch.Tensor], model: ModelConfig, padded_vocab_size: int
) -> torch.Tensor:
    """Return the checkpoint tensor of a piece; rows beyond the vocabulary are zero."""
    tensor = piece.conversion.join([state[name] for name in piece.names(model)])
    if piece.key not in VOCABULARY:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(padded_vocab_size - len(tensor), *tensor.shape[1:])])


def require_finite(place: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor unchanged, if all of its numbers are finite.

    Args:
        place: the origin of the tensor, for the message.

    Raises:
        UserError: a number is not finite.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{place} holds numbers that are not finite; give a model that has not diverged")
    return tensor


def _ends(model: ModelConfig) -> tuple[list[Conversion], list[Conversion]]:
    """Return the conversions of the weights before and after the layers."""
    is_gpt2 = architecture(model) == "gpt2"
    first = [Conversion(_EMBEDDING, ("wte.weight" if is_gpt2 else "embed_tokens.weight",))]
    if is_gpt2:
        first.append(Conversion("embedding.position_embeddings.weight", ("wpe.weight",)))
    last = _norm(model, "decoder.final_layernorm.", "ln_f" if is_gpt2 else "norm")
    if model.untie_embeddings_and_output_weights:
        last.append(Conversion(_HEAD, ("lm_head.weight",)))
    return first, last


def _of_layer(model: ModelConfig) -> list[Conversion]:
    return _of_gpt2_layer(model) if architecture(model) == "gpt2" else _of_llama_layer(model)


def _norm(model: ModelConfig, key: str, name: str) -> list[Conversion]:
    """Return the conversions of a norm's weight and, if it has one, its bias; a Nemotron stores the weight minus 1."""
    weight = Conversion(f"{key}weight", (f"{name}.weight",))
    if architecture(model) == "nemotron" and not model.layernorm_zero_centered_gamma:
        weight = Conversion(
            weight.key,
            weight.names,
            lambda tensor: ((tensor.float() - 1).to(tensor.dtype),),
            lambda tensors: tensors[0].float() + 1,  # the sum may not fit into 16 bits
        )
    bias = [Conversion(f"{key}bias", (f"{name}.bias",))] if model.normalization == "LayerNorm" else []
    return [weight, *bias]


def _of_llama_layer(model: ModelConfig) -> list[Conversion]:
    """Return the conversions of a layer with Llama's names; only Phi-3 fuses matrices, only OLMo2 norms outputs."""
    is_fused = architecture(model) == "phi3"

    def split_qkv(qkv: torch.Tensor) -> Sequence[torch.Tensor]:
        return _split_qkv(qkv, model)

    def join_qkv(projections: Sequence[torch.Tensor]) -> torch.Tensor:
        return _join_qkv(projections, model)

    def split_fused_qkv(qkv: torch.Tensor) -> Sequence[torch.Tensor]:
        return (torch.cat(_split_qkv(qkv, model)),)

    def join_fused_qkv(fused: Sequence[torch.Tensor]) -> torch.Tensor:
        queries, keys = model.num_attention_heads * model.head_size, model.query_groups * model.head_size
        return _join_qkv(fused[0].split([queries, keys, keys]), model)

    if model.dwm_output_norm:
        conversions = [
            *_norm(model, f"{_PROJ}.post_layernorm.", "post_attention_layernorm"),
            *_norm(model, f"{_FC2}.post_layernorm.", "post_feedforward_layernorm"),
        ]
    else:
        conversions = [
            *_norm(model, f"{_QKV}.layer_norm_", "input_layernorm"),
            *_norm(model, f"{_FC1}.layer_norm_", "post_attention_layernorm"),
        ]
    for kind in ("weight", "bias"):
        if kind == "bias" and not (model.add_bias_linear or model.add_qkv_bias):
            continue
        if is_fused:
            conversions.append(
                Conversion(f"{_QKV}.{kind}", (f"self_attn.qkv_proj.{kind}",), split_fused_qkv, join_fused_qkv)
            )
        else:
            names = tuple(f"self_attn.{letter}_proj.{kind}" for letter in "qkv")
            conversions.append(Conversion(f"{_QKV}.{kind}", names, split_qkv, join_qkv))
    if model.qk_layernorm:
        for letter in "qk":
            conversions += _norm(model, f"{_ATTENTION}{letter}_layernorm.", f"self_attn.{letter}_norm")
    kinds = ("weight", "bias") if model.add_bias_linear else ("weight",)
    conversions += [Conversion(f"{_PROJ}.{kind}", (f"self_attn.o_proj.{kind}",)) for kind in kinds]
    for kind in kinds:
        if model.swiglu and not is_fused:
            names = (f"mlp.gate_proj.{kind}", f"mlp.up_proj.{kind}")
            conversions.append(Conversion(f"{_FC1}.{kind}", names, _halves, _concatenated))
        else:
            name = "mlp.gate_up_proj" if is_fused else "mlp.up_proj"
            conversions.append(Conversion(f"{_FC1}.{kind}", (f"{name}.{kind}",)))
    return conversions + [Conversion(f"{_FC2}.{kind}", (f"mlp.down_proj.{kind}",)) for kind in kinds]


def _of_gpt2_layer(model: ModelConfig) -> list[Conversion]:
    """Return the conversions of a GPT-2 layer; its matrices are [in, out], with queries, keys and values in one."""

    def split_qkv(qkv: torch.Tensor) -> Sequence[torch.Tensor]:
        return (torch.cat(_split_qkv(qkv, model)).T,)

    def join_qkv(fused: Sequence[torch.Tensor]) -> torch.Tensor:
        return _join_qkv(fused[0].T.chunk(3), model)

    def split_qkv_bias(bias: torch.Tensor) -> Sequence[torch.Tensor]:
        return (torch.cat(_split_qkv(bias, model)),)

    def join_qkv_bias(fused: Sequence[torch.Tensor]) -> torch.Tensor:
        return _join_qkv(fused[0].chunk(3), model)

    def linear(key: str, name: str) -> list[Conversion]:
        weight = Conversion(f"{key}.weight", (f"{name}.weight",), _transposed, _transposed_only)
        return [weight, Conversion(f"{key}.bias", (f"{name}.bias",))]

    return [
        *_norm(model, f"{_QKV}.layer_norm_", "ln_1"),
        Conversion(f"{_QKV}.weight", ("attn.c_attn.weight",), split_qkv, join_qkv),
        Conversion(f"{_QKV}.bias", ("attn.c_attn.bias",), split_qkv_bias, join_qkv_bias),
        *linear(_PROJ, "attn.c_proj"),
        *_norm(model, f"{_FC1}.layer_norm_", "ln_2"),
        *linear(_FC1, "mlp.c_fc"),
        *linear(_FC2, "mlp.c_proj"),
    ]


def _transposed(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return (tensor.T,)


def _transposed_only(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].T


def _halves(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return tensor.chunk(2)


def _concatenated(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(tensors))


def _split_qkv(qkv: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split megatron-core's fused projection into queries [n d, ...], keys [g d, ...] and values [g d, ...].

    Args:
        qkv: [g (n/g + 2) d, ...]: for each query group its queries, then its key, then its value.
    """
    per_group = model.num_attention_heads // model.query_groups
    groups = qkv.view(model.query_groups, per_group + 2, model.head_size, *qkv.shape[1:])
    query, key, value = torch.split(groups, [per_group, 1, 1], dim=1)
    return query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2)


def _join_qkv(projections: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """Join queries, keys and values; the inverse of :func:`_split_qkv`."""
    groups = [part.reshape(model.query_groups, -1, model.head_size, *part.shape[1:]) for part in projections]
    return torch.cat(groups, dim=1).flatten(0, 2)
