"""Likelihoods of texts' continuations under the model in training, in any layout.

Shape legend: n continuations, m those of this replica, b samples of a microbatch, s sequence length, C size of context
parallelism, v this rank's rows of the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.utils import VocabUtility
from megatron.core.utils import unwrap_model

from megatron_dwm.data.batch import Batch
from megatron_dwm.model.engine import PipelineEngine
from megatron_dwm.model.loss import plain_loss
from megatron_dwm.model.vocabulary import mask_vocabulary_padding
from megatron_dwm.runtime.context_parallel import slice_sequence
from megatron_dwm.runtime.device import current_device


class Continuation(NamedTuple):
    """The tokens of a text, the last of which are the continuation of the others."""

    tokens: Sequence[int]
    length: int
    """How many of the last tokens are the continuation."""


class Likelihood(NamedTuple):
    """The likelihood of a continuation under the model."""

    log_likelihood: float
    is_greedy: bool
    """Whether each of its tokens is the most likely one after the tokens before it."""


def continuation_likelihoods(
    engine: PipelineEngine, continuations: Sequence[Continuation], micro_batch_size: int, vocab_size: int
) -> list[Likelihood]:
    """Return the likelihoods of continuations on every rank; every rank calls it with the same ones.

    Tokens before the last s + 1 are not read. The work is divided over the replicas. There is no dropout.

    Args:
        vocab_size: the vocabulary without padding, which is excluded, as in the model's export.
    """
    state = engine.parallel_state
    found = torch.zeros(len(continuations), 2, dtype=torch.float64, device=current_device())
    local = continuations[state.dp_rank :: state.dp_size]
    max_local = -(-len(continuations) // state.dp_size)  # all replicas run the same number of microbatches
    multiple = micro_batch_size * (engine.config.microbatch_group_size_per_vp_stage or 1)
    batch = _batch(local, -(-max_local // multiple) * multiple, engine.seq_length)
    with engine.evaluating(), _Misses(engine, batch, vocab_size) as misses:
        losses = engine.run(batch, micro_batch_size, loss_function=misses.count, forward_only=True, check_for_nan=False)
    if losses is not None:
        if state.cp_size > 1:
            dist.all_reduce(misses.counts, group=state.cp_group)
        if state.tp_rank == state.cp_rank == 0:
            figures = torch.stack([-losses.total, misses.counts], dim=1)  # [m, 2]
            found[state.dp_rank :: state.dp_size] = figures[: len(local)].double()
    dist.all_reduce(found)
    return [Likelihood(log_likelihood, num_misses == 0) for log_likelihood, num_misses in found.tolist()]


def _batch(continuations: Sequence[Continuation], size: int, seq: int) -> Batch:
    """Return a batch of ``size`` samples; the loss mask covers the continuations, and is 0 in surplus samples."""
    sequences = torch.zeros(size, seq + 1, dtype=torch.int64)
    mask = torch.zeros(size, seq)
    for row, (tokens, length) in enumerate(continuations):
        kept = tokens[-(seq + 1) :]
        sequences[row, : len(kept)] = torch.tensor(kept)
        mask[row, max(len(kept) - 1 - length, 0) : len(kept) - 1] = 1
    device = current_device()
    return dataclasses.replace(Batch.of_sequences(sequences.to(device)), loss_mask=mask.to(device))


class _Misses:
    """Inside the context, counts the tokens of each sample's continuation that are not the most likely ones."""

    def __init__(self, engine: PipelineEngine, batch: Batch, vocab_size: int) -> None:
        self._state, self._labels, self._vocab_size = engine.parallel_state, batch.labels, vocab_size
        self._heads = [chunk.output_layer for chunk in unwrap_model(engine.chunks) if chunk.post_process]
        self.counts = torch.zeros(len(batch), device=batch.labels.device)
        """On the last pipeline stage, over this context-parallel rank's part of the sequences [m]."""

    def __enter__(self) -> _Misses:
        state = self._state
        masks = [mask_vocabulary_padding(head, self._vocab_size, state.tp_rank, state.tp_size) for head in self._heads]
        # Registered after the masks, because hooks are called in order.
        finders = [head.register_forward_hook(self._find_likeliest) for head in self._heads]
        self._handles = [handle for handle in (*masks, *finders) if handle is not None]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _find_likeliest(self, head: Any, _inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
        partition, state = head.output_size_per_partition, self._state
        first, _ = VocabUtility.vocab_range_from_per_partition_vocab_size(partition, state.tp_rank, state.tp_size)
        highest, token = output[0].max(dim=-1)  # of logits [s / C, b, v]
        token = token + first
        if state.tp_size > 1:
            over_ranks = highest.clone()
            dist.all_reduce(over_ranks, dist.ReduceOp.MAX, group=state.tp_group)
            # Ranks without the highest logit give an index beyond all tokens, which the minimum excludes.
            token = token.where(highest == over_ranks, first + partition * state.tp_size)
            dist.all_reduce(token, dist.ReduceOp.MIN, group=state.tp_group)
        self._likeliest = token.T  # [b, s / C]

    def count(self, token_losses: torch.Tensor, loss_mask: torch.Tensor, samples: slice) -> torch.Tensor:
        """Count the misses of one microbatch; called after its forward pass, as a :class:`LossFunction`."""
        labels = slice_sequence(self._labels[samples], self._state.cp_rank, self._state.cp_size)
        self.counts[samples] = ((self._likeliest != labels) * loss_mask).sum(dim=1)
        return plain_loss(token_losses, loss_mask, samples)
