"""Protocols for what this program uses of megatron-core's model chunks and optimizers, which are not typed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class ModelChunk(Protocol):
    """A ``DistributedDataParallel`` model chunk: the layers of one virtual pipeline stage, with gradient buffers.

    Each of its parameters has its gradient in ``param.main_grad``.
    """

    module: Any
    """The GPTModel, or a Float16Module around it."""
    config: Any
    """Its TransformerConfig."""
    buffers: Any
    """The gradient buffers, in buckets."""
    bucket_groups: Any
    """Groups of buckets of parameters and gradients; the buckets of a group communicate together."""
    ddp_config: Any
    """Its DistributedDataParallelConfig."""
    use_forward_hook: bool
    """Whether forward passes gather the parameters that they need (``--overlap-param-gather``)."""

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return token losses [b, s], or logits without ``labels``; hidden states before the last stage."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Iterate over the parameters."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Iterate over the parameters and their names."""

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Yield the model's modules with their names."""

    def modules(self) -> Iterator[torch.nn.Module]:
        """Iterate over all modules."""

    def train(self) -> Any:
        """Switch dropout on."""

    def eval(self) -> Any:
        """Switch dropout off."""

    def zero_grad_buffer(self) -> None:
        """Set the gradients to zero."""

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context in which backward passes communicate no gradients."""

    def start_grad_sync(self) -> None:
        """Start to reduce the gradients over the data-parallel group."""

    def start_param_sync(self, *, force_sync: bool = False) -> None:
        """Start to gather the parameters over the data-parallel group; finish at once with ``force_sync``."""

    def enable_forward_pre_hook(self) -> None:
        """Let forward passes gather the parameters that they need."""

    def disable_forward_pre_hook(self) -> None:
        """Gather all parameters now, and none in forward passes."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Set parameters and buffers."""


class Optimizer(Protocol):
    """A ``MegatronOptimizer``: it steps on the gradients in the chunks' buffers.

    Its parts are what :func:`~megatron_dwm.model.optimizer_parts.optimizer_parts` returns.
    """

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """torch's parameter groups."""

    def zero_grad(self) -> None:
        """Free the gradients outside the chunks' buffers."""

    def step(self) -> tuple[bool, float | None, int | None]:
        """Update the parameters; return whether it did (fp16 may overflow), the gradient's norm and number of zeros."""

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Multiply a loss by the loss scale."""

    def get_loss_scale(self) -> torch.Tensor:
        """Return the loss scale; 1 unless training is in fp16."""

    def get_parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters that this rank updates: fp32 masters of 16-bit ones, and only its shards."""

    def reload_model_params(self) -> None:
        """Set the masters to the model's parameters."""

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], *, is_loading: bool = False, metadata: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the state as a checkpoint holds it."""

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
