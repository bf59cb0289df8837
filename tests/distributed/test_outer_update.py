"""The outer update: its hypergradient against central differences, and that it changes nothing but the weighter."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from megatron_dwm.model.optimizer_parts import optimizer_parts
from megatron_dwm.model.parameter_copy import ParameterCopy
from megatron_dwm.training.step import train_step
from megatron_dwm.weighting.weighter import Weighter
from megatron_dwm.weighting.weights import target_score_gradient, weights_from_scores
from tests.distributed.built_model import LAYOUTS, BuiltModel, Reference, build_model, inner, random_mask, random_tokens
from tests.distributed.harness import run_distributed
from tests.small_runs import GPT, LLAMA, NUM_SAMPLES, SEQ_LENGTH, VOCAB_SIZE, Flags


def classifier(seed: int = 0) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=SEQ_LENGTH,
        pad_token_id=0,
    )
    config.update({"num_labels": 1})
    return LlamaForSequenceClassification(config)


def test_the_hypergradient_is_the_central_difference_of_the_target_loss_after_a_step():
    """∂ l_val(θ'(φ)) / ∂φ = Σ_i ∂l_val/∂s_i · ∂s_i/∂φ, all in float64, θ' one step of plain SGD.

    The closed form takes v at θ', so it is exact; what is left is the central difference's own error, (1e-5)², and
    float64's rounding over 2e-5.
    """
    rate, temperature, epsilon = 0.05, 0.7, 1e-5
    ((state, _),) = run_distributed(lambda: (build_model(GPT).parameters(), None), 1)
    tokens, mask, target, target_mask = random_tokens(1), random_mask(2), random_tokens(5), random_mask(6)
    torch.manual_seed(0)
    # GPT-2s for both: Hugging Face's Llama computes its norms in fp32 whatever the model's type.
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=8, n_head=2, n_layer=1, n_positions=SEQ_LENGTH, pad_token_id=0)
    config.update({"num_labels": 1})
    weighter = GPT2ForSequenceClassification(config).double().eval()
    with torch.no_grad():
        weighter.score.weight.mul_(30)

    def scores() -> torch.Tensor:
        return weighter(input_ids=tokens[:, :-1], use_cache=False).logits.squeeze(-1)

    def stepped() -> tuple[Reference, list[dict[str, torch.Tensor]]]:
        """θ' as a model, and the samples' gradients at θ."""
        reference = Reference(GPT, state)
        losses = reference.losses(tokens, mask)
        gradients = [reference.gradient(loss) for loss in losses]
        w = weights_from_scores(scores().detach(), temperature) / NUM_SAMPLES
        with torch.no_grad():
            for name, param in reference.params.items():
                param -= rate * sum(weight * gradient[name] for weight, gradient in zip(w, gradients, strict=True))
        return reference, gradients

    reference, gradients = stepped()
    v = reference.gradient(reference.losses(target, target_mask).mean())
    alignments = torch.stack([inner(v, gradient) for gradient in gradients])
    scored = scores()
    scored.backward(target_score_gradient(alignments, scored.detach(), temperature, rate))

    transformer = weighter.transformer
    for param in (weighter.score.weight, transformer.h[0].mlp.c_fc.weight, transformer.wte.weight):
        direction = torch.randn(param.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        sides = []
        for sign in (1, -1):
            param.data += sign * epsilon * direction
            moved, _ = stepped()
            sides.append(moved.losses(target, target_mask).mean().item())
            param.data -= sign * epsilon * direction
        difference = (sides[0] - sides[1]) / (2 * epsilon)
        assert abs(difference) > 1e-6
        assert float((param.grad * direction).sum()) == pytest.approx(difference, rel=1e-4)


def fingerprint(built: BuiltModel) -> dict[str, str]:
    """Digests of everything in a run but the weighter."""
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    tensors = {
        "parameters": [p.data for chunk in built.chunks for p in chunk.parameters()],
        "optimizer": [
            value
            for part in optimizer_parts(built.optimizer)
            for state in part.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ],
        "random streams": [torch.get_rng_state(), *(tracker[name] for name in sorted(tracker))],
    }
    flags = {
        "hooks": [chunk.use_forward_hook for chunk in built.chunks],
        "training": [module.training for chunk in built.chunks for module in chunk.modules()],
        "dropout": [getattr(module, "hidden_dropout", None) for chunk in built.chunks for module in chunk.modules()],
        "configuration": {k: str(v) for k, v in vars(built.engine.config).items() if "func" in k},
    }
    digests = {
        name: hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in values)).hexdigest()
        for name, values in tensors.items()
    }
    return digests | {name: str(value) for name, value in flags.items()}


def updates(flags: Flags) -> tuple[list[tuple[dict[str, str], dict[str, str]]], list[str], Any]:
    """Two steps, an outer update after each: fingerprints before and after the updates, weighter hashes, alignments."""
    built = build_model({**flags, "--hidden-dropout": 0.2, "--attention-dropout": 0.2})
    weighter = Weighter(classifier(), built.config.weighting, torch.device("cpu"))
    outer = built.outer(weighter)
    pairs, hashes = [], [weighter.hash()]
    results = []
    for number in range(2):
        batch = built.batch(random_tokens(1 + number), random_mask(2))
        target = built.batch(random_tokens(5 + number), random_mask(6))
        before = ParameterCopy.of(built.chunks)
        train_step(built.engine, built.optimizer, _NoSchedule(), batch, 2, None)
        with built.engine.full_parameters():
            first = fingerprint(built)
            result = outer.run(batch, target, before)
            assert result is not None
            pairs.append((first, fingerprint(built)))
        hashes.append(weighter.hash())
        results.append(result)
    return pairs, hashes, results[-1].alignments


class _NoSchedule:
    def step(self, increment: int) -> None:
        """A constant learning rate."""


@pytest.mark.parametrize(
    "layout", ["PP2, interleaved", "TP2, sequence parallel, x DP2, distributed optimizer, overlapped"]
)
def test_an_update_changes_the_weighter_alike_on_all_ranks_and_nothing_else(layout: str):
    world, parallel = LAYOUTS[layout]
    results = run_distributed(updates, world, {**LLAMA, **parallel})
    for pairs, hashes, alignments in results:
        for before, after in pairs:
            assert after == before
        assert len(set(hashes)) == 3
        assert hashes == results[0][1]
        assert torch.equal(alignments, results[0][2])


def trainings(parallel: Flags) -> list[dict[str, str]]:
    """Digests of runs without updates, with exact alignments, and with those of finite differences."""
    differences = {"--dwm-alignment": "finite-difference"}
    return [trained(parallel, False), trained(parallel, True), trained({**parallel, **differences}, True)]


def trained(flags: Flags, updating: bool) -> dict[str, str]:
    """Digests of the run after three steps with dropout, with an outer update after the first two of them or not."""
    dropout = {"--hidden-dropout": 0.2, "--attention-dropout": 0.2}
    built = build_model({**LLAMA, **flags, **dropout, "--micro-batch-size": 4})
    outer = built.outer(Weighter(classifier(), built.config.weighting, torch.device("cpu")))
    for number in range(3):
        batch, target = (built.batch(random_tokens(seed + number), random_mask(2)) for seed in (1, 5))
        before = ParameterCopy.of(built.chunks)
        train_step(built.engine, built.optimizer, _NoSchedule(), batch, 4, None)
        if updating and number < 2:
            with built.engine.full_parameters():
                assert outer.run(batch, target, before) is not None
    with built.engine.full_parameters():
        digests = fingerprint(built)
    parallel_state.destroy_model_parallel()
    return {name: digests[name] for name in ("parameters", "optimizer", "random streams")}


@pytest.mark.parametrize("layout", ["TP2 x PP2", "TP2, sequence parallel, x DP2, distributed optimizer, overlapped"])
def test_training_goes_on_as_if_there_had_been_no_update(layout: str):
    world, parallel = LAYOUTS[layout]
    for plain, exact, differences in run_distributed(trainings, world, parallel):
        assert exact == plain and differences == plain


def test_a_replica_that_has_drifted_ends_the_run_at_the_next_update():
    def drift() -> str:
        built = build_model({**LLAMA, "--dwm-preconditioner": "none"})
        weighter = Weighter(classifier(), built.config.weighting, torch.device("cpu"))
        if built.parallel_state.rank == 1:
            weighter.model.score.weight.data[0, 0] += 1e-3
        batch, target = built.batch(random_tokens(1), random_mask(2)), built.batch(random_tokens(5), random_mask(6))
        with pytest.raises(RuntimeError, match="replicas differ"):
            built.outer(weighter).run(batch, target, ParameterCopy.of(built.chunks))
        return "noticed"

    assert run_distributed(drift, 2) == ["noticed", "noticed"]
