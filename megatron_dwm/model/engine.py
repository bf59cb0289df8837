"""Forward and backward passes over a batch through megatron-core's pipeline schedules.

Shape legend: b samples of a microbatch, s sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dwm.data.batch import Batch
from megatron_dwm.model.attributes import temporary_attributes
from megatron_dwm.model.loss import LossFunction, SampleLosses, as_token_losses, plain_loss
from megatron_dwm.model.protocols import ModelChunk
from megatron_dwm.runtime.context_parallel import slice_sequence
from megatron_dwm.runtime.device import current_device
from megatron_dwm.runtime.process_groups import ParallelState


class PipelineEngine:
    """Runs forward and backward passes of the model over batches, in a pipeline schedule."""

    def __init__(
        self,
        chunks: Sequence[ModelChunk],
        config: TransformerConfig,
        parallel_state: ParallelState,
        seq_length: int,
        *,
        document_end: int | None = None,
        check_for_nan: bool = True,
    ) -> None:
        """
        Args:
            chunks: this rank's model chunks.
            config: the chunks' TransformerConfig.
            document_end: end-of-document token that attention must not cross, if any.
            check_for_nan: raise FloatingPointError at a loss that is not finite.
        """
        self.chunks, self.config = list(chunks), config
        self.parallel_state, self.seq_length = parallel_state, seq_length
        self.document_end, self.check_for_nan = document_end, check_for_nan
        self.around_forward: AbstractContextManager[Any] = nullcontext()
        """The context in which forward passes run."""

    def run(
        self,
        batch: Batch,
        micro_batch_size: int,
        *,
        loss_function: LossFunction = plain_loss,
        forward_only: bool = False,
        check_for_nan: bool | None = None,
    ) -> SampleLosses | None:
        """Pass ``batch`` through the model, leaving gradients in the chunks' buffers.

        Args:
            micro_batch_size: samples of one microbatch; must divide the batch.
            loss_function: reduces each microbatch's token losses to the scalar that is differentiated, which
                megatron-core divides by the number of unmasked tokens.
            forward_only: losses only, no gradients.
            check_for_nan: whether to check for losses that are not finite; None: the engine's setting.

        Returns:
            the samples' losses on the last pipeline stage, for any loss function, summed over context-parallel
            ranks; None on the others.

        Raises:
            FloatingPointError: a loss is not finite, on the last pipeline stage, if the engine checks for it.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        micros = [
            (batch[samples], samples)
            for samples in (slice(start, start + micro_batch_size) for start in range(0, len(batch), micro_batch_size))
        ]
        iterators = [iter(micros) for _ in self.chunks]
        reports = get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, loss_function),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(micros),
            seq_length=self.seq_length,
            micro_batch_size=micro_batch_size,
            decoder_seq_length=self.seq_length,
            forward_only=forward_only,
        )
        if not self.parallel_state.is_last_pipeline_stage:
            return None
        packed = torch.stack([torch.cat([report[name] for report in reports]) for name in ("total", "tokens")])
        if self.parallel_state.cp_size > 1:
            dist.all_reduce(packed, group=self.parallel_state.cp_group)
        losses = SampleLosses(packed[0], packed[1])
        should_check = self.check_for_nan if check_for_nan is None else check_for_nan
        if should_check and not bool(losses.total.isfinite().all()):
            raise FloatingPointError("a training loss is not finite; lower --lr or look at the data of this step")
        return losses

    def _forward_step(
        self, loss_function: LossFunction, micros: Iterator[tuple[Batch, slice]], model: ModelChunk
    ) -> tuple[torch.Tensor, Any]:
        micro, samples = next(micros)
        cp_rank, cp_size = self.parallel_state.cp_rank, self.parallel_state.cp_size
        mask = None
        if self.document_end is not None:
            mask = slice_sequence(micro.document_mask(self.document_end), cp_rank, cp_size, dim=2)
        part = micro.sequence_part(cp_rank, cp_size)
        with self.around_forward:
            output = model(part.tokens, part.position_ids, mask, labels=part.labels, loss_mask=part.loss_mask)
        if self.config.calculate_per_token_loss:  # megatron-core divides by the tokens of all ranks in the end
            divided_by, factor = part.loss_mask.sum(), 1
        else:  # megatron-core divides here, and then takes the mean over context-parallel ranks too
            divided_by, factor = micro.loss_mask.sum(), cp_size
        return output, partial(reduce_output, loss_function, part.loss_mask, samples, divided_by, factor)

    def broadcast_losses(self, losses: SampleLosses | None, num_samples: int) -> SampleLosses:
        """Return the last stage's losses on every rank of the replica; a collective call of the pipeline group."""
        if losses is not None:
            packed = torch.stack([losses.total, losses.tokens])
        else:
            packed = torch.empty(2, num_samples, device=current_device())
        if self.parallel_state.pp_size > 1:
            last = dist.get_global_rank(self.parallel_state.pp_group, self.parallel_state.pp_size - 1)
            dist.broadcast(packed, last, group=self.parallel_state.pp_group)
        return SampleLosses(packed[0], packed[1])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Keep the chunks in evaluation mode, and compute no gradients, inside the context."""
        for chunk in self.chunks:
            chunk.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for chunk in self.chunks:
                chunk.train()

    @contextmanager
    def full_parameters(self) -> Iterator[None]:
        """Keep all of the latest parameters on every rank inside the context, so that forward passes gather none.

        Without ``--overlap-param-gather`` this is always the case.
        """
        gathering = [chunk for chunk in self.chunks if chunk.use_forward_hook]
        for chunk in gathering:
            chunk.disable_forward_pre_hook()
        try:
            with temporary_attributes(self.config, {"param_sync_func": None}):
                yield
        finally:
            for chunk in gathering:
                chunk.enable_forward_pre_hook()

    @contextmanager
    def unsynchronized(self) -> Iterator[None]:
        """Disable the reduction of gradients inside the context; each microbatch's loss is its mean token loss.

        Fused gradient accumulation is disabled, because it does not write the gradient to ``param.grad``.
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
            stack.enter_context(temporary_attributes(self.config, overrides))
            for module in modules:
                present = {name: False for name in fused if getattr(module, name, False) is True}
                stack.enter_context(temporary_attributes(module, present))
            yield

    @contextmanager
    def deterministic(self) -> Iterator[None]:
        """Disable dropout inside the context, so that no random stream advances; training mode stays on, and with it
        activation recomputation.
        """
        from megatron.core import tensor_parallel

        tracker = tensor_parallel.get_cuda_rng_tracker()
        cpu_state, device_state = torch.get_rng_state(), torch.cuda.get_rng_state()
        tracker_states = tracker.get_states()
        with ExitStack() as stack:
            for chunk in self.chunks:
                for module in chunk.modules():
                    # Layers and Transformer Engine's attention keep dropout probabilities as plain numbers.
                    names = ["p"] if isinstance(module, torch.nn.Dropout) else ["hidden_dropout", "attention_dropout"]
                    present = {name: 0.0 for name in names if isinstance(getattr(module, name, None), float)}
                    stack.enter_context(temporary_attributes(module, present))
            try:
                yield
            finally:
                tracker.set_states(tracker_states)
                torch.set_rng_state(cpu_state)
                torch.cuda.set_rng_state(device_state)


def reduce_output(
    loss_function: LossFunction,
    loss_mask: torch.Tensor,
    samples: slice,
    num_tokens: torch.Tensor,
    factor: int,
    output: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Reduce the output of one microbatch, in the form that megatron-core's schedules expect.

    Args:
        loss_mask: loss mask of this rank's part of the sequences [b, s / C] (C: context parallel size).
        samples: position of the microbatch among the batch's samples.
        num_tokens: the number that megatron-core divides the loss by.
        factor: the factor of the loss.
        output: token losses [b, s / C].

    Returns:
        the loss, the number that megatron-core divides it by, and the samples' sums to report.
    """
    token_losses = as_token_losses(output, loss_mask)
    loss = factor * loss_function(token_losses, loss_mask, samples)
    report = SampleLosses.of(token_losses, loss_mask)
    return loss, num_tokens.detach().to(torch.int), {"total": report.total, "tokens": report.tokens}
