"""A Hugging Face folder is read as it is, or refused where config.json is not true of the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from megatron_dwm.errors import UserError
from megatron_dwm.model.hf_folder import read_hugging_face

SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 9,
}
State = dict[str, torch.Tensor]


def _llama(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | changes))).to(dtype)
    model.save_pretrained(folder)
    return model


def _declare(folder: Path, **properties: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | properties))


def _rewrite(folder: Path, change: Callable[[State], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_keep_the_precision_of_the_files(tmp_path: Path, dtype: torch.dtype):
    saved = _llama(tmp_path, dtype)
    _declare(tmp_path, dtype="float16")
    read = read_hugging_face(tmp_path)
    assert read.vocab_size == 9 and read.model.untie_embeddings_and_output_weights
    known = dict(saved.base_model.state_dict()) | {"lm_head.weight": saved.lm_head.weight}
    assert set(read.state) == set(known) and len(read.state) == len(known)
    for name, tensor in known.items():
        assert read.state[name].dtype == dtype and torch.equal(read.state[name], tensor)


def test_pickled_and_sharded_weights_are_read_too(tmp_path: Path):
    saved = _llama(tmp_path)
    saved.save_pretrained(tmp_path / "sharded", max_shard_size="1KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text((tmp_path / "config.json").read_text())
    torch.save(saved.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    for kind in ("sharded", "pickled"):
        state = read_hugging_face(tmp_path / kind).state
        assert all(torch.equal(state[name], tensor) for name, tensor in saved.base_model.state_dict().items())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a head of its own": (
        {"tie_word_embeddings": True},
        "tie_word_embeddings true, but the weights have a separate lm_head.weight",
    ),
    "biases that are not there": ({"attention_bias": True, "mlp_bias": True}, r"weights lack .*\.bias"),
    "more key heads": ({"num_key_value_heads": 4}, "num_key_value_heads"),
    "wider heads": ({"head_dim": 4}, "num_key_value_heads, head_dim"),
    "a larger vocabulary": ({"vocab_size": 10}, "correct vocab_size"),
    "fewer layers": ({"num_hidden_layers": 1}, r"hold model\.layers\.1.* which the model of config.json does not have"),
    "more layers": ({"num_hidden_layers": 3}, r"weights lack model\.layers\.2"),
    "more layers than there are tensors": (
        {"num_hidden_layers": 10**9},
        "num_hidden_layers 1000000000 and the weights",
    ),
    "another feed-forward size": ({"intermediate_size": 16}, "correct the sizes"),
    "two bases of rotation": ({"rope_theta": 500000.0}, "rope_theta 500000.0 and 10000.0 in rope_parameters"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_declared_property_that_the_weights_deny_is_named(name: str, tmp_path: Path, capfd: pytest.CaptureFixture):
    declared, said = WRONG[name]
    _llama(tmp_path)
    _declare(tmp_path, **declared)
    capfd.readouterr()
    with pytest.raises(UserError, match=said) as caught:
        read_hugging_face(tmp_path)
    assert str(caught.value).startswith(f"--input {tmp_path}: ") and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_biases_that_are_not_declared_are_named(tmp_path: Path):
    _llama(tmp_path)
    _rewrite(tmp_path, lambda state: state.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(8)}))
    with pytest.raises(UserError, match=r"hold model\.layers\.0\.self_attn\.q_proj\.bias.*attention_bias"):
        read_hugging_face(tmp_path)


def test_quantized_weights_and_adapters_are_refused(tmp_path: Path):
    """Whether a file says so or a tensor does."""
    _llama(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    for dtype in (torch.int8, torch.float8_e4m3fn):
        _rewrite(tmp_path, lambda state, dtype=dtype: state.update({name: state[name].float().to(dtype)}))
        with pytest.raises(UserError, match=rf"{name} has type {dtype}; give a model that is not quantized"):
            read_hugging_face(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"its adapter .adapter_config\.json. is not merged into its weights; merge it"):
        read_hugging_face(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    _declare(tmp_path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match=r"config\.json has a quantization_config; give a model that is not quantized"):
        read_hugging_face(tmp_path)


def test_a_head_that_is_missing_is_named(tmp_path: Path):
    _llama(tmp_path)
    _rewrite(tmp_path, lambda state: state.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"weights lack lm_head\.weight"):
        read_hugging_face(tmp_path)


def test_a_tied_head_that_is_saved_as_well_is_no_difference(tmp_path: Path):
    _llama(tmp_path, tie_word_embeddings=True)
    _rewrite(tmp_path, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    read = read_hugging_face(tmp_path)
    assert "lm_head.weight" not in read.state and not read.model.untie_embeddings_and_output_weights


def test_saved_frequencies_must_be_the_declared_ones(tmp_path: Path):
    """As files of 2023 have them."""
    _llama(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _rewrite(tmp_path, lambda state: state.update({name: torch.tensor([1.0]).half()}))
    assert read_hugging_face(tmp_path).model.rotary_base == 10000
    _rewrite(tmp_path, lambda state: state.update({name: torch.tensor([0.5])}))
    with pytest.raises(UserError, match=rf"frequencies in {name}.*rope_parameters"):
        read_hugging_face(tmp_path)


def test_a_gpt2_as_it_was_published(tmp_path: Path):
    """Names without a prefix, masks among the weights, no head."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=4, vocab_size=9))
    model.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}
    state |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 4, 4).tril() for layer in range(2)}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read = read_hugging_face(tmp_path)
    assert all(torch.equal(read.state[name], tensor) for name, tensor in model.transformer.state_dict().items())


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"no config\.json there"):
        read_hugging_face(tmp_path)
    _llama(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        read_hugging_face(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors and no pytorch_model\.bin"):
        read_hugging_face(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        read_hugging_face(tmp_path)
