"""The language model and its Hugging Face copy compute the same, whatever the layout it is gathered from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.errors import UserError
from megatron_dwm.model.full_state import gather_full_state
from megatron_dwm.model.hf_config import hf_config, model_config
from megatron_dwm.model.hf_model import gather_first_layers
from megatron_dwm.model.hf_weights import from_hf_state_dict, to_hf_state_dict
from tests.distributed import tiny
from tests.distributed.harness import run_distributed

LAYOUTS = {
    "one process": ParallelConfig(),
    "TP2 SP": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "PP2": ParallelConfig(pipeline_model_parallel_size=2),
    "interleaved PP2": ParallelConfig(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2),
    "TP2 PP2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "DP2": ParallelConfig(),
}
WORLDS = {"one process": 1, "TP2 SP": 2, "PP2": 2, "interleaved PP2": 2, "TP2 PP2": 4, "DP2": 2}

MODELS = {
    "gpt2": tiny.gpt(num_layers=4),
    "llama": tiny.llama(num_layers=4),
    "gpt2 with exact GELU and its own head": tiny.gpt(
        bias_gelu_fusion=False, untie_embeddings_and_output_weights=True, ffn_hidden_size=40
    ),
    "llama with tied head, wide heads, one group": tiny.llama(
        untie_embeddings_and_output_weights=False, kv_channels=16, num_query_groups=1, rotary_base=500
    ),
    "llama with scaled rotary frequencies": tiny.llama(
        use_rope_scaling=True, rope_scaling_factor=32.0, rotary_base=500000, kv_channels=64
    ),
    "gpt2 scaled by layer number": tiny.gpt(apply_query_key_layer_scaling=True),
}
UNPADDED = 50


def _logits_and_state(model: ModelConfig, parallel: ParallelConfig) -> tuple[Any, dict[str, torch.Tensor]]:
    tiny.initialize(parallel, parallel.virtual_stages(model.layers))
    chunks, _ = tiny.build(model, parallel)
    for chunk in chunks:
        chunk.eval()
    full = gather_full_state(chunks, lambda key: True)
    state = to_hf_state_dict(full, model, layers=model.layers, vocab_size=UNPADDED)
    return tiny.logits(chunks), state


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
        return language_model(tiny.samples()[:, :-1] % UNPADDED).logits


def _assert_equal_to_hf(monkeypatch: pytest.MonkeyPatch, model: ModelConfig, layout: str) -> None:
    known = tiny.samples() % UNPADDED
    monkeypatch.setattr(tiny, "samples", lambda: known)  # tokens that the unpadded vocabulary has
    results = run_distributed(_logits_and_state, WORLDS[layout], model, LAYOUTS[layout])
    expected = _hf_logits(model, dict(results[0][1]))
    computed = [logits for logits, _ in results if logits is not None]
    assert computed
    for logits in computed:
        torch.testing.assert_close(logits[..., :UNPADDED], expected, rtol=1e-5, atol=1e-5)
    for _, state in results[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in results[0][1].items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_hugging_face_copy_has_the_logits_of_every_layout(monkeypatch, name: str, layout: str):
    _assert_equal_to_hf(monkeypatch, MODELS[name], layout)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("gpt2", "llama")])
def test_the_hugging_face_copy_has_the_logits_of_every_architecture(monkeypatch, name: str):
    _assert_equal_to_hf(monkeypatch, MODELS[name], "one process")


def test_the_hugging_face_copy_has_the_logits_of_ranks_that_share_a_query_group(monkeypatch):
    _assert_equal_to_hf(monkeypatch, MODELS["llama with tied head, wide heads, one group"], "TP2 SP")


def _full_state(model: ModelConfig) -> dict[str, torch.Tensor]:
    tiny.initialize(LAYOUTS["one process"])
    chunks, _ = tiny.build(model, LAYOUTS["one process"])
    return gather_full_state(chunks, lambda key: True)


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_configuration_come_back_from_hugging_face(name: str):
    model = MODELS[name]
    (full,) = run_distributed(_full_state, 1, model)
    state = to_hf_state_dict(full, model, layers=model.layers, vocab_size=UNPADDED)
    back = model_config(hf_config(model, vocab_size=UNPADDED, num_layers=model.layers))
    assert hf_config(back, vocab_size=UNPADDED, num_layers=model.layers).to_dict() == (
        hf_config(model, vocab_size=UNPADDED, num_layers=model.layers).to_dict()
    )
    again = from_hf_state_dict(state, back, padded_vocab_size=tiny.VOCAB_SIZE)
    assert again.keys() == full.keys()
    for key, tensor in full.items():
        if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert not again[key][UNPADDED:].any()
            tensor[UNPADDED:] = 0
        assert torch.equal(again[key], tensor), key


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_first_layers_start_a_classifier(name: str):
    model = MODELS[name]

    def gather() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        parallel = LAYOUTS["interleaved PP2"]
        tiny.initialize(parallel, parallel.virtual_stages(model.layers))
        chunks, _ = tiny.build(model, parallel)
        full = gather_full_state(chunks, lambda key: True)
        first = gather_first_layers(chunks, model, num_layers=2, vocab_size=UNPADDED)
        return first, to_hf_state_dict(full, model, layers=range(1, 3), vocab_size=UNPADDED)

    first, middle = run_distributed(gather, 2)[0]
    config = hf_config(model, vocab_size=UNPADDED, num_layers=2)
    config.update({"num_labels": 1, "pad_token_id": 0})
    classifier = AutoModelForSequenceClassification.from_config(config)
    classifier.base_model.load_state_dict(first, strict=True)
    assert classifier(tiny.samples()[:, :-1] % UNPADDED).logits.shape == (tiny.NUM_SAMPLES, 1)
    # The second of the first two layers is the first of the layers 1 and 2.
    stem = "layers" if name == "llama" else "h"
    second = {k.removeprefix(f"{stem}.1."): t for k, t in first.items() if k.startswith(f"{stem}.1.")}
    assert second
    for key, tensor in second.items():
        assert torch.equal(tensor, middle[f"{stem}.0.{key}"])
        assert not torch.equal(tensor, first[f"{stem}.0.{key}"])


def test_gathering_keeps_to_the_wanted_parameters():
    def keys() -> list[str]:
        parallel = LAYOUTS["PP2"]
        tiny.initialize(parallel)
        chunks, _ = tiny.build(tiny.gpt(), parallel)
        state = gather_full_state(chunks, lambda key: key.endswith("final_layernorm.weight"))
        assert dist.get_world_size() == 2
        return list(state)

    assert run_distributed(keys, 2) == [["decoder.final_layernorm.weight"]] * 2


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (tiny.llama(normalization="LayerNorm"), "--normalization LayerNorm"),
        (tiny.llama(swiglu=False), "--swiglu"),
        (tiny.llama(add_bias_linear=True), "--disable-bias-linear"),
        (tiny.llama(add_qkv_bias=True), "--add-qkv-bias"),
        (tiny.llama(qk_layernorm=True), "--qk-layernorm"),
        (tiny.llama(rotary_percent=0.5), "--rotary-percent 0.5"),
        (tiny.llama(rotary_interleaved=True), "--rotary-interleaved"),
        (tiny.gpt(normalization="RMSNorm"), "--normalization RMSNorm"),
        (tiny.gpt(swiglu=True), "--swiglu"),
        (tiny.gpt(squared_relu=True), "--squared-relu"),
        (tiny.gpt(add_bias_linear=False), "--disable-bias-linear"),
        (tiny.gpt(group_query_attention=True, num_query_groups=2), "--group-query-attention"),
        (tiny.gpt(kv_channels=16), "--kv-channels 16"),
        (tiny.gpt(qk_layernorm=True), "--qk-layernorm"),
        (tiny.gpt(layernorm_zero_centered_gamma=True), "--apply-layernorm-1p"),
        (tiny.gpt(position_embedding_type="none"), "--position-embedding-type none"),
    ],
)
def test_an_architecture_that_hugging_face_lacks_is_refused_by_its_flag(model: ModelConfig, named: str):
    with pytest.raises(UserError, match=named):
        hf_config(model, vocab_size=UNPADDED, num_layers=1)
