"""The passes of an outer update over any torch module that is not sharded: gradient and alignments.

The alignment a_i = ⟨v, ∇ l_i⟩ is the derivative of sample i's loss along v. Forward-mode differentiation computes it
for all samples in one forward pass, without a graph, for any kind of layer. For a module with an operation that
has no forward mode, one backward pass per sample is made instead.

Shape legend: n samples of this process, s sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from megatron_dwm.runtime.collectives import all_reduce_over_world, world_size
from megatron_dwm.weighting.bilevel.alignment import Direction, inner_product
from megatron_dwm.weighting.bilevel.preconditioner import precondition_by_torch

SampleLosses = Callable[[torch.nn.Module, Any], torch.Tensor]
"""Losses [n] of a batch's samples under a module, such that the loss that is trained is the mean of weight times loss.

Called with the module and a batch as the training loop has it.
"""
Method = Literal["forward-mode", "backward"]

IGNORED_LABEL = -100
"""transformers' label of a token whose loss does not count."""


def tokens_of(batch: Any) -> torch.Tensor:
    """Return the tokens [n, s] of a batch: a tensor of them, or a mapping with ``input_ids``."""
    tokens: torch.Tensor = batch if isinstance(batch, torch.Tensor) else batch["input_ids"]
    return tokens


def next_token_losses(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Return the samples' losses [n] of predicting each next token; their mean is the mean over the batch's tokens.

    Args:
        model: returns logits [n, s, vocabulary] of tokens, or an object that has them as ``logits``.
        batch: tokens [n, s], or a mapping with ``input_ids`` and, where some tokens do not count, ``labels``. Other
            entries go to the model by name.
    """
    tokens = tokens_of(batch)
    if isinstance(batch, torch.Tensor):
        output, labels = model(batch), tokens
    else:
        labels = batch.get("labels", tokens)
        output = model(**{name: value for name, value in batch.items() if name != "labels"})
    logits: torch.Tensor = getattr(output, "logits", output)
    counted = (labels[:, 1:] != IGNORED_LABEL).sum().clamp(min=1)
    losses: torch.Tensor = token_losses_of(logits, labels).sum(dim=1) * len(labels) / counted
    return losses


def token_losses_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the losses [n, s] of logits [n, s, vocabulary] for the next token in ``labels`` [n, s].

    They are 0 where the next label is ignored, and in the last position, which has no next label. This is what
    transformers' models compute, in the same order of operations.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    losses: torch.Tensor = F.cross_entropy(
        logits.to(wide).flatten(0, 1), following.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses.view_as(following)


def alignments(
    model: torch.nn.Module,
    batch: Any,
    direction: Mapping[torch.nn.Parameter, torch.Tensor],
    sample_losses: SampleLosses = next_token_losses,
    *,
    method: Method = "forward-mode",
) -> torch.Tensor:
    """Return ⟨v, ∇ l_i⟩ of each of the batch's samples [n], float64, at the current parameters.

    The module is evaluated without dropout, and is not changed. Its attention is computed by
    torch's reference kernel, which supports every kind of differentiation.

    Args:
        model: any module on one device, also wrapped in torch's DistributedDataParallel.
        batch: what ``sample_losses`` takes.
        direction: v, by parameter; parameters without an entry are not included in the product.
        sample_losses: the losses [n].
        method: ``forward-mode``: one forward pass in forward mode; ``backward``: one backward pass for each sample.

    Raises:
        NotImplementedError: an operation of the module has no forward mode, or a hook changes its gradients.
    """
    module = unwrapped(model)
    params = {name: param for name, param in module.named_parameters() if param in direction}
    with evaluating(module), _reference_attention():
        if method == "backward":
            return _by_backward_passes(sample_losses(module, batch), list(params.values()), direction)
        try:
            return _in_forward_mode(module, batch, params, direction, sample_losses)
        except RuntimeError as error:  # NotImplementedError is a RuntimeError
            if not isinstance(error, NotImplementedError) and "autograd.Function" not in str(error):
                raise
            raise NotImplementedError(
                f"{type(module).__name__} cannot be differentiated in forward mode; use method='backward' ({error})"
            ) from error


def _in_forward_mode(
    module: torch.nn.Module,
    batch: Any,
    params: Mapping[str, torch.nn.Parameter],
    direction: Mapping[torch.nn.Parameter, torch.Tensor],
    sample_losses: SampleLosses,
) -> torch.Tensor:
    if _has_gradient_hooks(module):
        raise NotImplementedError("it has hooks on its gradients")
    losses_module = _Losses(module, sample_losses)

    def losses(values: dict[str, torch.Tensor]) -> Any:
        return torch.func.functional_call(losses_module, values, (batch,))

    primals = {f"module.{name}": param.detach() for name, param in params.items()}
    tangents = {f"module.{name}": direction[param].to(param.dtype) for name, param in params.items()}
    with _requiring_no_gradients(module), _DerivativesAsInBackward():
        found: torch.Tensor = torch.func.jvp(losses, (primals,), (tangents,))[1].detach().double()
    return found


def _has_gradient_hooks(module: torch.nn.Module) -> bool:
    owners = [*module.modules(), *module.parameters()]
    return any(getattr(owner, name, None) for owner in owners for name in ("_backward_hooks", "_backward_pre_hooks"))


class _DerivativesAsInBackward(TorchFunctionMode):  # type: ignore[misc, no-any-unimported, unused-ignore]
    """Makes forward-mode derivatives those of a backward pass: no_grad stops them, and padding embeddings have none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.requires_grad_:  # by transformers' gradient checkpointing; there is no backward pass
            return args[0]
        result = func(*args, **kwargs)
        if getattr(func, "__name__", "") == "_set_grad_enabled":
            torch._C._set_fwd_grad_enabled(torch.is_grad_enabled())  # noqa: SLF001 - there is no public name
        if func is F.embedding:
            given = dict(zip(("input", "weight", "padding_idx"), args, strict=False), **kwargs)
            if (padding := given.get("padding_idx")) is not None:
                is_padding = given["input"] == padding % len(given["weight"])
                result = torch.where(is_padding[..., None], result.detach(), result)
        return result


@contextmanager
def _requiring_no_gradients(module: torch.nn.Module) -> Iterator[None]:
    """Make no parameter require gradients inside the context, so that nothing is stored for a backward pass."""
    requiring = [param for param in module.parameters() if param.requires_grad]
    for param in requiring:
        param.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for param in requiring:
            param.requires_grad_()


@contextmanager
def _reference_attention() -> Iterator[None]:
    """Compute attention with torch's reference kernel inside the context."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _by_backward_passes(
    losses: torch.Tensor, params: list[torch.nn.Parameter], direction: Mapping[torch.nn.Parameter, torch.Tensor]
) -> torch.Tensor:
    products = torch.zeros(len(losses), dtype=torch.float64, device=losses.device)
    for number, loss in enumerate(losses):
        gradients = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        for param, gradient in zip(params, gradients, strict=True):
            if gradient is not None:
                products[number] += inner_product(gradient.to_dense(), direction[param].to(gradient.device))
    return products


class _Losses(torch.nn.Module):
    """The losses as a module, so that torch can replace the parameters in it."""

    def __init__(self, module: torch.nn.Module, sample_losses: SampleLosses) -> None:
        super().__init__()
        self.module, self.sample_losses = module, sample_losses

    def forward(self, batch: Any) -> torch.Tensor:
        return self.sample_losses(self.module, batch)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside torch's DistributedDataParallel, because these passes must not communicate."""
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        within: torch.nn.Module = model.module
        return within
    return model


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Keep the module in evaluation mode inside the context: there is no dropout, and no random stream advances."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@dataclass(frozen=True)
class ModuleBatch:
    """A batch in the training loop's format, and its tokens."""

    content: Any
    tokens: torch.Tensor
    """[n, s], int64."""

    def __len__(self) -> int:
        return len(self.tokens)


class ModuleGradients:
    """Passes over a module, for :class:`~megatron_dwm.weighting.bilevel.outer_update.OuterUpdate`.

    Every process of torch.distributed holds the whole module and has different samples.
    """

    check_for_nan = True
    loss_scale = 1.0

    def __init__(
        self,
        model: torch.nn.Module,
        sample_losses: SampleLosses = next_token_losses,
        *,
        preconditioning_optimizer: torch.optim.Optimizer | None = None,
        method: Method = "forward-mode",
    ) -> None:
        """
        Args:
            model: the module.
            sample_losses: its losses.
            preconditioning_optimizer: an Adam optimizer whose second moments scale the target gradient; None for the
                gradient itself.
            method: how alignments are computed.
        """
        self.model, self.sample_losses = unwrapped(model), sample_losses
        self.optimizer, self.method = preconditioning_optimizer, method

    @contextmanager
    def deterministic(self) -> Iterator[None]:
        """Disable dropout inside the context; no random stream advances."""
        with evaluating(self.model):
            yield

    def gradient(self, batch: ModuleBatch) -> tuple[float, Direction]:
        """Return the mean loss of all processes' batches, and its gradient, preconditioned; a collective call.

        Raises:
            UserError: the optimizer is not an Adam whose preconditioner is known.
        """
        params = [param for param in self.model.parameters() if param.requires_grad]
        loss = self.sample_losses(self.model, batch.content).mean()
        gradients = torch.autograd.grad(loss, params, allow_unused=True)
        direction = {}
        for param, gradient in zip(params, gradients, strict=True):
            v = torch.zeros_like(param) if gradient is None else gradient.detach().to_dense()
            v = v.to(torch.promote_types(param.dtype, torch.float32), copy=True).contiguous()
            direction[param] = self._mean_over_world(v)
        if self.optimizer is not None:
            precondition_by_torch(direction, self.optimizer)
        return float(self._mean_over_world(loss.detach().double())), direction

    def align(self, batch: ModuleBatch, direction: Direction) -> torch.Tensor:
        """Return the alignments of this process's samples [n], float64."""
        return alignments(self.model, batch.content, direction, self.sample_losses, method=self.method)

    def discard(self, direction: Direction) -> None:
        """Free v."""
        direction.clear()

    def _mean_over_world(self, tensor: torch.Tensor) -> torch.Tensor:
        all_reduce_over_world(tensor)
        return tensor.div_(world_size())
