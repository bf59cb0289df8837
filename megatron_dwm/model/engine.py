"""One pass over a batch through megatron-core's pipeline schedule.

Shape legend: n samples of this replica, b samples of a microbatch, s sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.data.batch import Batch
from megatron_dwm.errors import UserError
from megatron_dwm.runtime.process_groups import ParallelState


@dataclass(frozen=True)
class SampleLosses:
    """Token losses of this replica's samples, as the last pipeline stage sums them."""

    total: torch.Tensor
    """Σ of the unmasked tokens' losses [n], float32."""
    tokens: torch.Tensor
    """Unmasked tokens [n], float32."""

    @property
    def mean(self) -> torch.Tensor:
        """Mean token loss l_i of each sample [n]; 0 for a sample without an unmasked token."""
        return self.total / self.tokens.clamp(min=1)


class PipelineEngine:
    """Runs forward and backward passes of the model over batches.

    The loss of a microbatch is Megatron-LM's, Σ mask · loss / Σ mask, with each sample's token losses multiplied by its
    scale. Scales of 1.0 leave every bit of it as it is.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        config: Any,
        parallel_state: ParallelState,
        seq_length: int,
        *,
        document_end: int | None = None,
        check_for_nan: bool = True,
    ) -> None:
        """
        Args:
            chunks: this rank's DistributedDataParallel model chunks.
            config: the chunks' TransformerConfig.
            document_end: end-of-document token that attention must not cross, if any.
            check_for_nan: raise FloatingPointError at a loss that is not finite.
        """
        self.chunks, self.config, self.parallel_state, self.seq_length = (
            list(chunks),
            config,
            parallel_state,
            seq_length,
        )
        self.document_end, self.check_for_nan = document_end, check_for_nan

    def run(
        self,
        batch: Batch,
        micro_batch_size: int,
        *,
        sample_weights: torch.Tensor | None = None,
        forward_only: bool = False,
        force_all_reduce: bool = False,
    ) -> SampleLosses | None:
        """Pass ``batch`` through the model, leaving gradients in the chunks' buffers.

        Args:
            micro_batch_size: samples of one microbatch; it divides the batch.
            sample_scale: factor of each sample's token losses [n], if any.
            forward_only: losses only, no gradients.
            force_all_reduce: leave the whole gradient on every data-parallel rank, also under the distributed
                optimizer.

        Returns:
            the samples' unscaled losses on the last pipeline stage, None on the others.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        scales = [None] * (len(batch) // micro_batch_size)
        if sample_weights is not None:
            scales = list(sample_weights.to(batch.loss_mask).split(micro_batch_size))
        micros = list(zip(batch.microbatches(micro_batch_size), scales, strict=True))
        iterators = [iter(micros) for _ in self.chunks]
        for chunk in self.chunks:
            chunk.force_all_reduce = force_all_reduce
        # megatron-core's aligned reduction always scatters; without it the chunks reduce when they are ready.
        aligned = {"grad_sync_func": None} if force_all_reduce else {}
        try:
            with _attributes(self.config, aligned):
                reports = get_forward_backward_func()(
                    forward_step_func=self._forward_step,
                    data_iterator=iterators if len(iterators) > 1 else iterators[0],
                    model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                    num_microbatches=len(micros),
                    seq_length=self.seq_length,
                    micro_batch_size=micro_batch_size,
                    decoder_seq_length=self.seq_length,
                    forward_only=forward_only,
                    force_all_reduce=force_all_reduce,
                )
        finally:
            for chunk in self.chunks:
                chunk.force_all_reduce = False
        if not self.parallel_state.is_last_pipeline_stage:
            return None
        losses = SampleLosses(
            torch.cat([report["total"] for report in reports]),
            torch.cat([report["tokens"] for report in reports]),
        )
        if self.check_for_nan and not bool(losses.total.isfinite().all()):
            raise FloatingPointError("a training loss is not finite; lower --lr or look at the data of this step")
        return losses

    def _forward_step(self, micros: Iterator[tuple[Batch, torch.Tensor | None]], model: Any) -> tuple[Any, Any]:
        micro, scale = next(micros)
        mask = micro.document_mask(self.document_end) if self.document_end is not None else None
        output = model(micro.tokens, micro.position_ids, mask, labels=micro.labels, loss_mask=micro.loss_mask)
        return output, partial(weighted_loss, micro.loss_mask, scale)

    def broadcast_losses(self, losses: SampleLosses | None, num_samples: int) -> SampleLosses:
        """The last stage's losses on every rank of the replica."""
        if losses is not None:
            packed = torch.stack([losses.total, losses.tokens])
        else:
            packed = torch.empty(2, num_samples, device=torch.cuda.current_device())
        if self.parallel_state.pp_size > 1:
            last = dist.get_global_rank(self.parallel_state.pp_group, self.parallel_state.pp_size - 1)
            dist.broadcast(packed, last, group=self.parallel_state.pp_group)
        return SampleLosses(packed[0], packed[1])

    @contextmanager
    def full_parameters(self) -> Iterator[None]:
        """While open, every rank holds all of the latest parameters, and forward passes gather none.

        Without ``--overlap-param-gather`` that is always so.
        """
        gathering = [chunk for chunk in self.chunks if chunk.use_forward_hook]
        for chunk in gathering:
            chunk.disable_forward_pre_hook()
        try:
            with _attributes(self.config, {"param_sync_func": None}):
                yield
        finally:
            for chunk in gathering:
                chunk.enable_forward_pre_hook()

    @contextmanager
    def unsynchronized(self) -> Iterator[None]:
        """While open, gradients stay on their rank and each microbatch's loss is its mean token loss.

        Fused gradient accumulation is off: it would leave ``param.grad`` without the gradient.
        """
        overrides = {
            "no_sync_func": None,
            "grad_sync_func": None,
            "param_sync_func": None,
            "finalize_model_grads_func": None,
            "calculate_per_token_loss": False,
        }
        fused = ("gradient_accumulation_fusion", "fuse_wgrad_accumulation")
        modules = [module for chunk in self.chunks for module in chunk.modules()]
        with ExitStack() as stack:
            for chunk in self.chunks:
                stack.enter_context(chunk.no_sync())
            stack.enter_context(_attributes(self.config, overrides))
            for module in modules:
                present = {name: False for name in fused if getattr(module, name, False) is True}
                stack.enter_context(_attributes(module, present))
            yield

    @contextmanager
    def deterministic(self) -> Iterator[None]:
        """While open, nothing is dropped out and no random stream moves; training mode stays on, and with it
        activation recomputation."""
        from megatron.core import tensor_parallel

        tracker = tensor_parallel.get_cuda_rng_tracker()
        cpu_state, device_state = torch.get_rng_state(), torch.cuda.get_rng_state()
        tracker_states = tracker.get_states()
        with ExitStack() as stack:
            for chunk in self.chunks:
                for module in chunk.modules():
                    # Layers, and Transformer Engine's attentions, keep probabilities as plain numbers.
                    names = ["p"] if isinstance(module, torch.nn.Dropout) else ["hidden_dropout", "attention_dropout"]
                    present = {name: 0.0 for name in names if isinstance(getattr(module, name, None), float)}
                    stack.enter_context(_attributes(module, present))
            try:
                yield
            finally:
                tracker.set_states(tracker_states)
                torch.set_rng_state(cpu_state)
                torch.cuda.set_rng_state(device_state)


@contextmanager
def _attributes(target: Any, values: dict[str, Any]) -> Iterator[None]:
    """Set attributes of ``target`` for a while."""
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


def weighted_loss(
    loss_mask: torch.Tensor, sample_weights: torch.Tensor | None, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Megatron-LM's loss of one microbatch, with each sample's token losses multiplied by its scale.

    Args:
        loss_mask: [b, s].
        sample_scale: [b], or None for the plain loss. It never enters the mask or the number of tokens.
        output: token losses [b, s].

    Returns:
        Σ scale · mask · loss, the number of unmasked tokens (megatron-core divides the one by the other), and the
        samples' unscaled sums.

    Raises:
        UserError: ``output`` is not a loss for each token, so the samples' losses cannot be told apart.
    """
    if output.shape != loss_mask.shape:
        raise UserError(
            f"the model returns a loss of shape {list(output.shape)} where token losses {list(loss_mask.shape)} are "
            "needed: samples cannot be weighted once their losses are reduced; leave out the loss that does so "
            "(--cross-entropy-loss-fusion, --cross-entropy-fusion-impl)"
        )
    losses = output.float() if output.dtype != torch.float64 else output
    scaled = losses if sample_weights is None else losses * sample_weights[:, None].to(losses.dtype)
    loss = torch.sum(scaled.reshape(-1) * loss_mask.reshape(-1))
    num_tokens = loss_mask.sum().detach().to(torch.int)
    report = {"total": (losses * loss_mask).sum(dim=1).detach(), "tokens": loss_mask.sum(dim=1)}
    return loss, num_tokens, report
