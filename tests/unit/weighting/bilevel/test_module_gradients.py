"""Passes over any torch module: alignments against autograd's gradients of single samples, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from megatron_dwm.errors import UserError
from megatron_dwm.weighting.bilevel.module_gradients import (
    ModuleBatch,
    ModuleGradients,
    alignments,
    next_token_losses,
)

VOCABULARY, LENGTH, SAMPLES = 20, 9, 5


class Layers(torch.nn.Module):
    """Logits of layers that megatron-core's hooks know nothing of."""

    def __init__(self, middle: torch.nn.Module) -> None:
        super().__init__()
        self.embedding, self.middle = torch.nn.Embedding(VOCABULARY, 8), middle
        self.norm, self.output = torch.nn.BatchNorm1d(8), torch.nn.Linear(8, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.middle(torch.nn.functional.dropout(self.embedding(tokens), 0.5, self.training))
        return self.output(self.norm(hidden.transpose(1, 2)).transpose(1, 2))


class Squared(torch.autograd.Function):
    """A function that says how it is differentiated backward, and not forward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class Opaque(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Squared.apply(x)


class Residual(torch.nn.Module):
    """A layer of which a part gets no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            constant = self.frozen(x)
        return self.trained(x) + constant


class Recurrent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = torch.nn.GRU(8, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(x)[0]


def gpt2() -> GPT2LMHeadModel:
    """A transformer with tied embeddings, and with dropout in training."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def checkpointed() -> GPT2LMHeadModel:
    model = gpt2()
    model.gradient_checkpointing_enable()
    return model


def padded() -> Layers:
    """Layers whose embedding of token 3 has no gradient, although the token occurs."""
    layers = Layers(torch.nn.Tanh())
    layers.embedding = torch.nn.Embedding(VOCABULARY, 8, padding_idx=3)
    return layers


MODELS = {
    "gpt2": gpt2,
    "gradient checkpointing": checkpointed,
    "padding": padded,
    "gated": lambda: Layers(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GLU())),
    "no gradients in a part": lambda: Layers(Residual()),
    "recurrent": lambda: Layers(Recurrent()),
    "torch's transformer": lambda: Layers(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
    "opaque": lambda: Layers(Opaque()),
}


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(seed))


def uneven(seed: int) -> dict[str, torch.Tensor]:
    """A batch whose samples have different numbers of tokens that count."""
    labels = tokens(seed)
    for sample in range(SAMPLES):
        labels[sample, LENGTH - sample :] = -100
    return {"input_ids": tokens(seed), "labels": labels}


def made(name: str) -> tuple[torch.nn.Module, dict[Any, torch.Tensor]]:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    return model, {param: torch.randn_like(param) for param in model.parameters()}


def by_autograd(model: torch.nn.Module, batch: Any, direction: dict[Any, torch.Tensor]) -> torch.Tensor:
    model.eval()
    products = []
    for loss in next_token_losses(model, batch):
        gradients = torch.autograd.grad(loss, list(direction), retain_graph=True, materialize_grads=True)
        products.append(sum((g * v).sum() for g, v in zip(gradients, direction.values(), strict=True)))
    model.train()
    return torch.stack(products)


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "forward-mode") for name in MODELS if name != "opaque"), ("gpt2", "backward"), ("opaque", "backward")],
)
def test_alignments_are_products_with_the_gradients_of_single_samples(name: str, method: Any):
    model, direction = made(name)
    batch = uneven(1) if name == "gpt2" else tokens(1)
    state, random_state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    found = alignments(model, batch, direction, method=method)
    expected = by_autograd(model, batch, direction)
    assert found.dtype == torch.float64 and found.shape == (SAMPLES,)
    assert float((found - expected).abs().max()) < 1e-12 * float(expected.abs().max())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state) and all(part.training for part in model.modules())


def test_parameters_without_a_direction_do_not_move():
    model, direction = made("gated")
    part = {param: v for param, v in direction.items() if param.dim() == 2}
    assert 0 < len(part) < len(direction)
    expected = by_autograd(model, tokens(1), part)
    for method in ("forward-mode", "backward"):
        found = alignments(model, tokens(1), part, method=method)
        assert float((found - expected).abs().max()) < 1e-12 * float(expected.abs().max())


def test_the_losses_are_those_of_transformers():
    model, _ = made("gpt2")
    batch = uneven(1)
    model.eval()
    with torch.no_grad():
        mean, expected = next_token_losses(model, batch).mean(), model(**batch).loss
    assert float(mean) == pytest.approx(float(expected), abs=1e-6)  # which computes it in float32


def test_a_module_without_a_forward_mode_is_named():
    model, direction = made("opaque")
    with pytest.raises(NotImplementedError, match="Layers cannot be differentiated in forward mode; use method='back"):
        alignments(model, tokens(1), direction)


def test_a_module_whose_gradients_a_hook_changes_takes_backward_passes():
    model, direction = made("gated")
    expected = by_autograd(model, tokens(1), direction)
    model.output.weight.register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(NotImplementedError, match=r"use method='backward' \(it has hooks on its gradients\)"):
        alignments(model, tokens(1), direction)
    found = alignments(model, tokens(1), direction, method="backward")
    assert float((found - by_autograd(model, tokens(1), direction)).abs().max()) < 1e-12
    assert float((found - expected).abs().max()) > 1e-3


def test_sparse_gradients_are_read():
    torch.manual_seed(0)
    layers = torch.nn.Embedding(VOCABULARY, 8, sparse=True), torch.nn.Linear(8, VOCABULARY)
    model = torch.nn.Sequential(*layers).double()
    _, direction = ModuleGradients(model).gradient(ModuleBatch(tokens(2), tokens(2)))
    dense, sparse = (alignments(model, tokens(1), direction, method=m) for m in ("forward-mode", "backward"))
    assert torch.allclose(dense, sparse, rtol=1e-12)


def test_the_target_gradient_is_scaled_as_adam_scales_its_step():
    """For a parameter that moves by η P m, with β₁ = 0 by η P times the gradient: the step itself shows P."""
    model, _ = made("gated")
    model.eval()  # batch norm sees the same statistics before and after
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.0, 0.9), eps=1e-6)
    next_token_losses(model, tokens(1)).mean().backward()
    before = {param: param.detach().clone() for param in model.parameters()}
    steps = {param: param.grad.clone() for param in model.parameters()}
    optimizer.step()
    moved = {param: (before[param] - param.detach()) / 1e-3 for param in before}
    with torch.no_grad():
        for param, value in before.items():
            param.copy_(value)
    passes = ModuleGradients(model, preconditioning_optimizer=optimizer)
    loss, direction = passes.gradient(ModuleBatch(tokens(1), tokens(1)))
    assert loss == pytest.approx(float(next_token_losses(model, tokens(1)).mean().detach()))
    for param, v in direction.items():
        assert torch.allclose(v, moved[param], rtol=1e-9), steps[param]


def test_an_optimizer_without_second_moments_is_refused():
    model, _ = made("gated")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    next_token_losses(model, tokens(1)).mean().backward()
    optimizer.step()
    passes = ModuleGradients(model, preconditioning_optimizer=optimizer)
    with pytest.raises(UserError, match=r"SGD keeps no second moments; give WeightingConfig\(dwm_preconditioner='none"):
        passes.gradient(ModuleBatch(tokens(1), tokens(1)))
