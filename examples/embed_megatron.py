"""Data weighting in a bare loop over megatron-core, under any tensor, pipeline and data parallelism.

torchrun --nproc-per-node 4 examples/embed_megatron.py
"""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from embed_data import LENGTH, VOCABULARY, describe, mixed_batches, target_batches
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.data.batch import Batch
from megatron_dwm.data.sampler import BatchPartition
from megatron_dwm.runtime.device import select_device
from megatron_dwm.weighting.embedded import EmbeddedWeighting, WeighterSize

SETTINGS = WeightingConfig(dwm_num_stages=1, dwm_update_interval=4, dwm_ngram_buckets=4096, dwm_ridge=1.0)
MICRO_BATCH_SIZE, MICROBATCHES = 4, 4


def build(tp: int, pp: int) -> tuple[DistributedDataParallel, Any]:
    """Return this rank's part of a GPT, and its optimizer."""
    parallel_state.initialize_model_parallel(tp, pp)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp, pipeline_dtype=torch.float32, use_cpu_initialization=True,
        hidden_dropout=0.0, attention_dropout=0.0, gradient_accumulation_fusion=False, masked_softmax_fusion=False,
        bias_activation_fusion=False, persist_layer_norm=False,
    )  # fmt: skip
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    gpt = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, LENGTH, first, last)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), gpt)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2), [model])
    config.grad_scale_func, config.finalize_model_grads_func = optimizer.scale_loss, finalize_model_grads
    return model, optimizer


def forward_step(microbatches: Iterator[tuple[Batch, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Any]:
    """Pass a microbatch through the model; return its token losses, and the function that weights them."""
    batch, weights = next(microbatches)
    return model(batch.tokens, batch.position_ids, None, labels=batch.labels), partial(reduce_losses, weights)


def reduce_losses(weights: torch.Tensor, token_losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss to differentiate, and the loss to report."""
    loss = (weights[:, None] * token_losses).mean()
    return loss, {"loss": loss.detach()}


def train(steps: int, tp: int, pp: int, settings: WeightingConfig | None) -> tuple[list[float], torch.Tensor]:
    """Train, with weighting if there are settings; return the last pipeline stage's losses and the last weights."""
    model, optimizer = build(tp, pp)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    partition = BatchPartition(MICRO_BATCH_SIZE, MICROBATCHES, replica, replicas)
    batches = map(Batch.of_sequences, mixed_batches(partition.replica_samples, seed=1 + replica))
    targets = map(Batch.of_sequences, target_batches(partition.replica_samples, seed=100 + replica))
    weighting = None if settings is None else EmbeddedWeighting.for_megatron(
        [model], optimizer, targets, WeighterSize(VOCABULARY), partition=partition, seq_length=LENGTH - 1,
        train_iters=steps, settings=settings,
    )  # fmt: skip
    losses, weights = [], torch.ones(partition.replica_samples)
    for _ in range(steps):
        batch = next(batches)
        if weighting is not None:
            weighting.before_step()
            weights = weighting.weigh(batch)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step, model=model, num_microbatches=MICROBATCHES, seq_length=LENGTH - 1,
            data_iterator=zip(batch.microbatches(MICRO_BATCH_SIZE), weights.split(MICRO_BATCH_SIZE), strict=True),
            micro_batch_size=MICRO_BATCH_SIZE, forward_only=False,
        )  # fmt: skip
        optimizer.step()
        if weighting is not None:
            weighting.after_step(batch)
        losses.append(float(sum(report["loss"] for report in reports)) / MICROBATCHES)
    return losses, weights


if __name__ == "__main__":
    select_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group()
    _, weights = train(40, 2, 2, SETTINGS)
    if torch.distributed.get_rank() == 0:
        print(describe(weights))
