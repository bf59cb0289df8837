"""The language model and its Hugging Face copy compute the same, whatever the layout it is gathered from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.errors import UserError
from megatron_dwm.model.full_state import gather_full_state
from megatron_dwm.model.hf_config import hf_config, model_config
from megatron_dwm.model.hf_model import gather_first_layers
from megatron_dwm.model.hf_weights import from_hf_state_dict, to_hf_state_dict
from tests.distributed.built_model import LAYOUTS, HfState, build_model, parse_model, random_tokens
from tests.distributed.harness import run_distributed
from tests.distributed.passes import logits
from tests.small_runs import GPT, LLAMA, NUM_SAMPLES, VOCAB_SIZE, Flags

MODELS: dict[str, Flags] = {
    "gpt2": GPT,
    "llama": LLAMA,
    "gpt2 with exact GELU and its own head": {
        **GPT,
        "--no-bias-gelu-fusion": True,
        "--untie-embeddings-and-output-weights": True,
        "--ffn-hidden-size": 40,
    },
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
    "gpt2 scaled by layer number": {**GPT, "--apply-query-key-layer-scaling": True},
}
UNPADDED = 50
TOKENS = random_tokens(7) % UNPADDED
"""Tokens that the unpadded vocabulary has."""


def _logits_and_state(flags: Flags) -> tuple[Any, HfState]:
    built = build_model(flags)
    for chunk in built.chunks:
        chunk.eval()
    full = gather_full_state(built.chunks, lambda key: True)
    model = built.config.model
    state = to_hf_state_dict(full, model, layers=model.layers, vocab_size=UNPADDED)
    return logits(built.chunks, TOKENS), state


def _hf_logits(model: ModelConfig, state: dict[str, torch.Tensor]) -> torch.Tensor:
    config = hf_config(model, vocab_size=UNPADDED, num_layers=model.layers)
    kind: Any = LlamaForCausalLM if config.model_type == "llama" else GPT2LMHeadModel
    language_model = kind(config).eval()
    head = state.pop("lm_head.weight", None)
    assert (head is not None) == model.untie_embeddings_and_output_weights
    language_model.base_model.load_state_dict(state, strict=True)
    if head is not None:
        language_model.lm_head.load_state_dict({"weight": head}, strict=True)
    with torch.no_grad():
        return language_model(TOKENS[:, :-1]).logits


def _assert_equal_to_hf(flags: Flags, layout: str) -> None:
    processes, parallel = LAYOUTS[layout]
    results = run_distributed(_logits_and_state, processes, {**flags, **parallel})
    expected = _hf_logits(parse_model(flags), dict(results[0][1]))
    computed = [found for found, _ in results if found is not None]
    assert computed
    for found in computed:
        torch.testing.assert_close(found[..., :UNPADDED], expected, rtol=1e-5, atol=1e-5)
    for _, state in results[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in results[0][1].items())


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("llama", layout) for layout in ("one process", "TP2, sequence parallel", "PP2, interleaved", "TP2 x PP2")),
        *(("gpt2", layout) for layout in ("one process", "PP2", "TP2 x PP2", "DP2")),
    ],
)
def test_the_hugging_face_copy_has_the_logits_of_every_layout(name: str, layout: str):
    _assert_equal_to_hf(MODELS[name], layout)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("gpt2", "llama")])
def test_the_hugging_face_copy_has_the_logits_of_every_architecture(name: str):
    _assert_equal_to_hf(MODELS[name], "one process")


def test_the_hugging_face_copy_has_the_logits_of_ranks_that_share_a_query_group():
    _assert_equal_to_hf(MODELS["llama with tied head, wide heads, one group"], "TP2, sequence parallel")


def _full_state(flags: Flags) -> dict[str, torch.Tensor]:
    return gather_full_state(build_model(flags).chunks, lambda key: True)


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_configuration_come_back_from_hugging_face(name: str):
    model = parse_model(MODELS[name])
    (full,) = run_distributed(_full_state, 1, MODELS[name])
    state = to_hf_state_dict(full, model, layers=model.layers, vocab_size=UNPADDED)
    back = model_config(hf_config(model, vocab_size=UNPADDED, num_layers=model.layers))
    assert hf_config(back, vocab_size=UNPADDED, num_layers=model.layers).to_dict() == (
        hf_config(model, vocab_size=UNPADDED, num_layers=model.layers).to_dict()
    )
    again = from_hf_state_dict(state, back, padded_vocab_size=VOCAB_SIZE)
    assert again.keys() == full.keys()
    for key, tensor in full.items():
        if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert not again[key][UNPADDED:].any()
            tensor[UNPADDED:] = 0
        assert torch.equal(again[key], tensor), key


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_first_layers_start_a_classifier(name: str):
    processes, parallel = LAYOUTS["PP2, interleaved"]
    model = parse_model(MODELS[name])

    def gather() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        chunks = build_model({**MODELS[name], **parallel}).chunks
        full = gather_full_state(chunks, lambda key: True)
        first = gather_first_layers(chunks, model, num_layers=2, vocab_size=UNPADDED)
        return first, to_hf_state_dict(full, model, layers=range(1, 3), vocab_size=UNPADDED)

    first, middle = run_distributed(gather, processes)[0]
    config = hf_config(model, vocab_size=UNPADDED, num_layers=2)
    config.update({"num_labels": 1, "pad_token_id": 0})
    classifier = AutoModelForSequenceClassification.from_config(config)
    classifier.base_model.load_state_dict(first, strict=True)
    assert classifier(TOKENS[:, :-1]).logits.shape == (NUM_SAMPLES, 1)
    # The second of the first two layers is the first of the layers 1 and 2.
    stem = "layers" if name == "llama" else "h"
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
        ({**LLAMA, "--normalization": "LayerNorm"}, "--normalization LayerNorm"),
        ({**LLAMA, "--swiglu": False}, "--swiglu"),
        ({**LLAMA, "--disable-bias-linear": False}, "--disable-bias-linear"),
        ({**LLAMA, "--add-qkv-bias": True}, "--add-qkv-bias"),
        ({**LLAMA, "--qk-layernorm": True}, "--qk-layernorm"),
        ({**LLAMA, "--rotary-percent": 0.5}, "--rotary-percent 0.5"),
        ({**LLAMA, "--rotary-interleaved": True}, "--rotary-interleaved"),
        ({**GPT, "--normalization": "RMSNorm"}, "--normalization RMSNorm"),
        ({**GPT, "--swiglu": True, "--ffn-hidden-size": 48}, "--swiglu"),
        ({**GPT, "--squared-relu": True}, "--squared-relu"),
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
