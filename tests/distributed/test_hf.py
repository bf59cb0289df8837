"""The language model and its Hugging Face copy compute the same, whatever the layout it is gathered from."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.errors import UserError
from megatron_dwm.model.full_state import gather_full_state
from megatron_dwm.model.hf_config import hf_config, model_config
from megatron_dwm.model.hf_model import gather_first_layers
from megatron_dwm.model.hf_weights import LAYERS, from_hf, pieces, to_hf_state_dict
from tests.distributed.built_model import LAYOUTS, HfState, build_model, parse_model, random_tokens
from tests.distributed.harness import run_distributed
from tests.distributed.passes import logits
from tests.small_runs import GPT, LLAMA, NUM_SAMPLES, OLMO2, VOCAB_SIZE, Flags

QWEN3: Flags = {**LLAMA, "--qk-layernorm": True, "--kv-channels": 8}
NEMOTRON: Flags = {
    **GPT,
    "--position-embedding-type": "rope",
    "--group-query-attention": True,
    "--num-query-groups": 2,
    "--squared-relu": True,
    "--disable-bias-linear": True,
    "--rotary-percent": 0.5,
    "--kv-channels": 8,
    "--untie-embeddings-and-output-weights": True,
}
YARN: Flags = {
    **LLAMA,
    "--position-embedding-type": "yarn",
    "--rotary-scaling-factor": 4.0,
    "--yarn-original-max-position-embeddings": 64,
    "--kv-channels": 32,
}
MODELS: dict[str, Flags] = {
    "gpt2": GPT,
    "llama": LLAMA,
    "qwen2": {**LLAMA, "--add-qkv-bias": True},
    "qwen3": QWEN3,
    "olmo2": OLMO2,
    "olmo2 with tied head, wide heads, one group": {
        **OLMO2,
        "--untie-embeddings-and-output-weights": False,
        "--kv-channels": 16,
        "--num-query-groups": 1,
    },
    "nemotron": NEMOTRON,
    "phi3": {**LLAMA, "--rotary-percent": 0.5, "--kv-channels": 8},
    "gpt2 with exact GELU and its own head": {
        **GPT,
        "--no-bias-gelu-fusion": True,
        "--untie-embeddings-and-output-weights": True,
        "--ffn-hidden-size": 40,
    },
    "gpt2 with squared ReLU": {**GPT, "--squared-relu": True, "--no-bias-gelu-fusion": True},
    "llama with tied head, wide heads, one group": {
        **LLAMA,
        "--untie-embeddings-and-output-weights": False,
        "--kv-channels": 16,
        "--num-query-groups": 1,
        "--rotary-base": 500,
    },
    "llama with scaled rotary frequencies": {
        **LLAMA,
        "--use-rope-scaling": True,
        "--rope-scaling-factor": 32.0,
        "--rotary-base": 500000,
        "--kv-channels": 64,
    },
    "llama with biases and interpolated positions": {
        **LLAMA,
        "--disable-bias-linear": False,
        "--rotary-seq-len-interpolation-factor": 4,
    },
    "llama with YaRN": YARN,
    "qwen2 with YaRN's attention scaled": {
        **YARN,
        "--add-qkv-bias": True,
        "--mscale": 2.0,
        "--yarn-beta-fast": 4.0,
        "--no-yarn-correction-range-round-to-int": True,
    },
    "nemotron with tanh GELU, biases and gains centered on zero": {
        **NEMOTRON,
        "--apply-layernorm-1p": True,
        "--squared-relu": False,
        "--disable-bias-linear": False,
        "--rotary-percent": 1.0,
    },
    "gpt2 scaled by layer number": {**GPT, "--apply-query-key-layer-scaling": True},
}
MODELS = {name: {**flags, "--num-layers": 4} for name, flags in MODELS.items()}  # interleaved stages need as many
UNPADDED = 50
TOKENS = random_tokens(7) % UNPADDED
"""Tokens that the unpadded vocabulary has."""


def _logits_and_states(flags: Flags) -> tuple[Any, HfState, dict[str, torch.Tensor]]:
    built = build_model(flags)
    for chunk in built.chunks:
        chunk.eval()
    full = gather_full_state(built.chunks, lambda key: True)
    model = built.config.model
    state = to_hf_state_dict(full, model, layers=model.num_layers, vocab_size=UNPADDED)
    return logits(built.chunks, TOKENS), state, full


def _hf_logits(model: ModelConfig, state: dict[str, torch.Tensor]) -> torch.Tensor:
    config = hf_config(model, vocab_size=UNPADDED, num_layers=model.num_layers)
    language_model: Any = AutoModelForCausalLM.from_config(config).eval()
    head = state.pop("lm_head.weight", None)
    assert (head is not None) == model.untie_embeddings_and_output_weights
    language_model.base_model.load_state_dict(state, strict=True)
    if head is not None:
        language_model.lm_head.load_state_dict({"weight": head}, strict=True)
    with torch.no_grad():
        return language_model(TOKENS[:, :-1]).logits


def _assert_equal_to_hf(flags: Flags, layout: str) -> tuple[HfState, dict[str, torch.Tensor]]:
    """Return the Hugging Face state and the full state of the model."""
    processes, parallel = LAYOUTS[layout]
    results = run_distributed(_logits_and_states, processes, {**flags, **parallel})
    expected = _hf_logits(parse_model(flags), dict(results[0][1]))
    computed = [found for found, *_ in results if found is not None]
    assert computed
    for found in computed:
        torch.testing.assert_close(found[..., :UNPADDED], expected, rtol=1e-5, atol=1e-5)
    for _, state, _ in results[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in results[0][1].items())
    return results[0][1:]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("llama", layout) for layout in ("TP2, sequence parallel", "PP2, interleaved")),
        *(("gpt2", layout) for layout in ("TP2 x PP2", "DP2")),
        ("qwen2", "TP2 x PP2"),
        ("qwen3", "TP2, sequence parallel"),
        ("olmo2", "TP2 x PP2"),
        ("nemotron", "TP2 x PP2"),
        ("llama with YaRN", "PP2, interleaved"),
    ],
)
def test_the_hugging_face_copy_has_the_logits_of_every_layout(name: str, layout: str):
    _assert_equal_to_hf(MODELS[name], layout)


@pytest.mark.parametrize("name", MODELS)
def test_the_hugging_face_copy_has_the_logits_of_every_architecture_and_leads_back(name: str):
    model = parse_model(MODELS[name])
    state, full = _assert_equal_to_hf(MODELS[name], "one process")
    back = model_config(hf_config(model, vocab_size=UNPADDED, num_layers=model.num_layers))
    # How gains are stored is not part of a configuration.
    back = dataclasses.replace(back, layernorm_zero_centered_gamma=model.layernorm_zero_centered_gamma)
    assert hf_config(back, vocab_size=UNPADDED, num_layers=model.num_layers).to_dict() == (
        hf_config(model, vocab_size=UNPADDED, num_layers=model.num_layers).to_dict()
    )
    parts: dict[str, list[torch.Tensor]] = {}
    for piece in pieces(back, range(back.num_layers)):
        parts.setdefault(piece.key, []).append(from_hf(piece, state, back, VOCAB_SIZE))
    again = {key: torch.stack(part) if key.startswith(LAYERS) else part[0].clone() for key, part in parts.items()}
    assert again.keys() == full.keys()
    for key, tensor in full.items():
        if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert not again[key][UNPADDED:].any()
            tensor[UNPADDED:] = 0
        assert torch.equal(again[key], tensor), key


@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_the_hugging_face_copy_has_the_logits_of_ranks_that_share_a_query_group(name: str):
    _assert_equal_to_hf(MODELS[f"{name} with tied head, wide heads, one group"], "TP2, sequence parallel")


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "qwen3", "olmo2"])
def test_the_first_layers_start_a_classifier(name: str):
    processes, parallel = LAYOUTS["PP2, interleaved"]
    model = parse_model(MODELS[name])

    def gather() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        chunks = build_model({**MODELS[name], **parallel}).chunks
        full = gather_full_state(chunks, lambda key: True)
        first = gather_first_layers(chunks, model, num_layers=2, vocab_size=UNPADDED)
        return first, to_hf_state_dict(full, model, layers=range(1, 3), vocab_size=UNPADDED)

    first, middle = run_distributed(gather, processes)[0]
    config = hf_config(model, vocab_size=UNPADDED, num_layers=2, has_any_tokenizer=True)
    config.update({"num_labels": 1, "pad_token_id": 0})
    classifier = AutoModelForSequenceClassification.from_config(config)
    classifier.base_model.load_state_dict(first, strict=True)
    assert classifier(TOKENS[:, :-1]).logits.shape == (NUM_SAMPLES, 1)
    # The second of the first two layers is the first of the layers 1 and 2.
    stem = "h" if name == "gpt2" else "layers"
    second = {k.removeprefix(f"{stem}.1."): t for k, t in first.items() if k.startswith(f"{stem}.1.")}
    assert second
    for key, tensor in second.items():
        assert torch.equal(tensor, middle[f"{stem}.0.{key}"])
        assert not torch.equal(tensor, first[f"{stem}.0.{key}"])


def test_gathering_keeps_to_the_wanted_parameters():
    def keys() -> list[str]:
        state = gather_full_state(
            build_model({**GPT, **LAYOUTS["PP2"][1]}).chunks, lambda key: key.endswith("final_layernorm.weight")
        )
        assert dist.get_world_size() == 2
        return list(state)

    assert run_distributed(keys, 2) == [["decoder.final_layernorm.weight"]] * 2


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({**LLAMA, "--normalization": "LayerNorm"}, "--swiglu with LayerNorm"),
        ({**LLAMA, "--swiglu": False}, "add --swiglu"),
        ({**QWEN3, "--disable-bias-linear": False}, "biases; add --disable-bias-linear"),
        ({**QWEN3, "--add-qkv-bias": True}, "--add-qkv-bias"),
        ({**NEMOTRON, "--add-qkv-bias": True}, "--add-qkv-bias"),
        (
            {**OLMO2, "--disable-bias-linear": False},
            "OLMo2 cannot express biases; add --disable-bias-linear",
        ),
        ({**OLMO2, "--dwm-qk-norm-all-heads": False}, "add --qk-layernorm --dwm-qk-norm-all-heads"),
        ({**OLMO2, "--dwm-output-norm": False}, "--dwm-qk-norm-all-heads; leave it out, or add --dwm-output-norm"),
        ({**NEMOTRON, "--dwm-output-norm": True}, "--dwm-output-norm; leave it out"),
        ({**NEMOTRON, "--qk-layernorm": True}, "--qk-layernorm"),
        ({**LLAMA, "--rotary-percent": 0.5, "--use-rope-scaling": True}, "scaled rotary frequencies"),
        ({**LLAMA, "--use-rope-scaling": True, "--rotary-seq-len-interpolation-factor": 2}, "leave one out"),
        ({**LLAMA, "--hidden-size": 18, "--kv-channels": 8}, "--num-attention-heads 4"),
        ({**LLAMA, "--rotary-interleaved": True}, "--rotary-interleaved"),
        ({**GPT, "--normalization": "RMSNorm"}, "--normalization RMSNorm"),
        ({**GPT, "--swiglu": True, "--ffn-hidden-size": 48}, "--swiglu"),
        ({**GPT, "--disable-bias-linear": True}, "--disable-bias-linear"),
        ({**GPT, "--group-query-attention": True, "--num-query-groups": 2}, "--group-query-attention"),
        ({**GPT, "--kv-channels": 16}, "--kv-channels 16"),
        ({**GPT, "--qk-layernorm": True}, "--qk-layernorm"),
        ({**GPT, "--apply-layernorm-1p": True}, "--apply-layernorm-1p"),
        ({**GPT, "--position-embedding-type": "none"}, "--position-embedding-type none"),
    ],
)
def test_an_architecture_that_hugging_face_lacks_is_refused_by_its_flag(flags: Flags, named: str):
    model = parse_model(flags)
    with pytest.raises(UserError, match=named):
        hf_config(model, vocab_size=UNPADDED, num_layers=1)
