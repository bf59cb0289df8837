"""Padding of the vocabulary that a model was not trained with changes nothing that the model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from transformers import AutoModelForCausalLM

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.model.full_state import gather_full_state
from megatron_dwm.model.hf_config import hf_config
from megatron_dwm.model.hf_weights import to_hf_state_dict
from megatron_dwm.model.vocabulary import Vocabulary
from tests.distributed.built_model import LAYOUTS, build_model, parse_model, random_tokens
from tests.distributed.harness import run_distributed
from tests.distributed.passes import logits, losses_and_gradients
from tests.small_runs import GPT, LLAMA, VOCAB_SIZE, Flags

TOKENS = 30
"""Of 64 rows: with two tensor-parallel ranks the second has nothing but padding."""
SHIFT = -35.0
MODEL_PARALLEL = ["one process", "TP2, sequence parallel", "TP2 x PP2"]
MODELS: dict[str, tuple[Flags, float | None]] = {
    "gpt2, tied": ({**GPT, "--init-method-std": 0.2}, None),
    "llama, untied": ({**LLAMA, "--init-method-std": 0.2}, None),
    "gpt2 with strongly negative logits, as a published one": ({**GPT, "--init-method-std": 0.2}, SHIFT),
}
"""Flags, and by how much the logits are shifted."""
SEQUENCES = random_tokens(7) % TOKENS


def _shift_logits(chunks: list[Any], shift: float) -> None:
    """Let the final hidden state be 1 in its first place, where each token's output weight is ``shift``; the padding's
    is 0, as in an imported model."""
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            if "word_embeddings" in name or "output_layer" in name:
                rows = torch.arange(param.size(0)) + param.size(0) * parallel_state.get_tensor_model_parallel_rank()
                param.data[rows < TOKENS, 0] = shift
                param.data[rows >= TOKENS] = 0
            if name.endswith("final_layernorm.weight"):
                param.data[0] = 0
            if name.endswith("final_layernorm.bias"):
                param.data[0] = 1


Trained = tuple[torch.Tensor | None, torch.Tensor | None, dict[str, torch.Tensor], dict[str, torch.Tensor]]
"""Logits, losses, gradients and parameters."""


def _all_trained(models: list[tuple[Flags, float | None]]) -> list[Trained]:
    return [_trained(flags, shift) for flags, shift in models]


def _trained(flags: Flags, shift: float | None) -> Trained:
    built = build_model(flags, vocabulary=Vocabulary(VOCAB_SIZE, TOKENS))
    if shift is not None:
        _shift_logits(built.chunks, shift)
    state = gather_full_state(built.chunks, lambda key: True)
    return logits(built.chunks, SEQUENCES), *losses_and_gradients(built, SEQUENCES), state


def _hugging_face(model: ModelConfig, state: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """The model without padding."""
    config = hf_config(model, vocab_size=TOKENS, num_layers=model.num_layers)
    language_model: Any = AutoModelForCausalLM.from_config(config).eval()
    state = to_hf_state_dict(state, model, layers=model.num_layers, vocab_size=TOKENS)
    head = state.pop("lm_head.weight", None)
    language_model.base_model.load_state_dict(state, strict=True)
    if head is not None:
        language_model.lm_head.load_state_dict({"weight": head}, strict=True)
    return language_model.to(dtype)


def _assert_as_hugging_face(flags: Flags, shift: float | None, results: list[Trained]) -> None:
    reference = _hugging_face(parse_model(flags), results[0][3], torch.float32)
    expected = reference(SEQUENCES[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(expected.transpose(1, 2), SEQUENCES[:, 1:], reduction="none")
    if shift is not None:
        assert float(expected.detach().mean()) == pytest.approx(shift, abs=3)
    (losses.mean(1).mean()).backward()
    gradient = reference.get_input_embeddings().weight.grad
    assert any(found is not None for found, *_ in results)
    for found, found_losses, gradients, _ in results:
        if found is not None:
            assert found_losses is not None
            torch.testing.assert_close(found[..., :TOKENS], expected.detach(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found_losses, losses.detach(), rtol=1e-5, atol=1e-5)
            assert (found[..., TOKENS:].exp() == 0).all()
        embedding = gradients["embedding.word_embeddings.weight"]
        torch.testing.assert_close(embedding[:TOKENS], gradient, rtol=1e-4, atol=1e-6)
        for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert key not in gradients or not gradients[key][TOKENS:].any()


@pytest.fixture(scope="module", params=MODEL_PARALLEL)
def trained(request: pytest.FixtureRequest) -> dict[str, list[Trained]]:
    """Of each model what each rank has computed, in one layout."""
    world, parallel = LAYOUTS[request.param]
    results = run_distributed(_all_trained, world, [({**flags, **parallel}, shift) for flags, shift in MODELS.values()])
    return {name: [found[number] for found in results] for number, name in enumerate(MODELS)}


@pytest.mark.parametrize("name", MODELS)
def test_losses_logits_and_gradients_are_those_without_padding(name: str, trained: dict[str, list[Trained]]):
    _assert_as_hugging_face(*MODELS[name], trained[name])


@pytest.mark.parametrize("layout", ["one process", "TP2"])
def test_the_padding_is_nothing_in_16_bits_too(layout: str):
    """The loss of each token is the cross entropy of the very logits, in the precision of the loss."""
    world, parallel = LAYOUTS[layout]
    precisions = (["--bf16"], ["--fp16"], ["--fp16", "--fp16-lm-cross-entropy"])
    models = [({**GPT, **parallel, **dict.fromkeys(flags, True), "--loss-scale": 1}, SHIFT) for flags in precisions]
    results = run_distributed(_all_trained, world, models)
    for rank in results:
        for precision, (found, losses, gradients, _) in zip(precisions, rank, strict=True):
            assert found is not None and losses is not None
            expected = torch.nn.functional.cross_entropy(
                found[..., :TOKENS].float().transpose(1, 2), SEQUENCES[:, 1:], reduction="none"
            )
            # fp16 has 11 bits, and losses are about 3.
            tolerance = 2e-2 if "--fp16-lm-cross-entropy" in precision else 1e-5
            torch.testing.assert_close(losses.float(), expected, rtol=tolerance, atol=tolerance)
            assert not gradients["embedding.word_embeddings.weight"][TOKENS:].any()
