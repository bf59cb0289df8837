"""Tiny language models in any layout, for use inside the workers of ``run_distributed``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.optimizer import OptimizerConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.training import TrainingConfig
from megatron_dwm.model.full_state import gather_full_state
from megatron_dwm.model.gpt import bind_schedule_hooks, build_model_chunks, wrap_with_ddp
from megatron_dwm.model.transformer_config import transformer_config
from megatron_dwm.model.vocabulary import Vocabulary

VOCAB_SIZE = 64
SEQ_LENGTH = 16
NUM_SAMPLES = 4

TRAINING = TrainingConfig(micro_batch_size=1, train_iters=1, use_cpu_initialization=True)
OPTIMIZER = OptimizerConfig(lr=1e-3)


def gpt(**changes: Any) -> ModelConfig:
    """A GPT-2-like model without dropout."""
    sizes = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": SEQ_LENGTH,
        "max_position_embeddings": SEQ_LENGTH,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.2,
    }
    return ModelConfig(**(sizes | changes))


def llama(**changes: Any) -> ModelConfig:
    """A Llama-like model with grouped queries."""
    style = {
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "group_query_attention": True,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "untie_embeddings_and_output_weights": True,
    }
    return gpt(**(style | changes))


def initialize(parallel: ParallelConfig, virtual_stages: int | None = None) -> None:
    """Build the process groups."""
    parallel_state.initialize_model_parallel(parallel.tp, parallel.pp, virtual_stages)


def build(
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig = TRAINING,
    optimizer: OptimizerConfig = OPTIMIZER,
    seed: int = 1234,
    softmax_size: int = VOCAB_SIZE,
) -> tuple[list[Any], Any]:
    """This rank's chunks and their TransformerConfig; norms and biases are random, so that each counts."""
    config = transformer_config(model, parallel, training, optimizer, torch.device("cpu"))
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    chunks = build_model_chunks(config, model, vocabulary=Vocabulary(VOCAB_SIZE, softmax_size))
    noise = torch.Generator().manual_seed(seed)
    tp = parallel_state.get_tensor_model_parallel_world_size()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    for chunk in chunks:
        for param in chunk.parameters():
            if param.dim() == 1:
                copies = tp if param.tensor_model_parallel else 1
                values = torch.randn(copies, *param.shape, generator=noise)
                param.data += 0.1 * values[tp_rank % copies].to(param.dtype)
    return chunks, config


def samples(seed: int = 7) -> torch.Tensor:
    """Tokens [samples, sequence + 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (NUM_SAMPLES, SEQ_LENGTH + 1), generator=generator)


def _run(chunks: list[Any], mask: torch.Tensor | None, with_labels: bool, **schedule: Any) -> list[Any]:
    """One pass over :func:`samples` through megatron-core's schedule, one sample a microbatch."""
    positions = torch.arange(SEQ_LENGTH)[None]

    def forward_step(microbatches: Iterator[torch.Tensor], chunk: Any) -> tuple[torch.Tensor, Any]:
        tokens = next(microbatches)[None]
        labels = tokens[:, 1:] if with_labels else None
        return chunk(tokens[:, :-1], positions, mask, labels=labels), report

    def report(output: torch.Tensor, non_loss_data: bool = False) -> Any:
        if non_loss_data:
            return output.detach().clone()
        return output.mean(), {"losses": output.detach().clone()}

    iterators = [iter(samples()) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=NUM_SAMPLES,
        seq_length=SEQ_LENGTH,
        micro_batch_size=1,
        **schedule,
    )


def logits(chunks: list[Any], mask: torch.Tensor | None = None) -> torch.Tensor | None:
    """Logits [samples, sequence, vocabulary] on the last pipeline stage, None on the others."""
    outputs = _run(chunks, mask, with_labels=False, forward_only=True, collect_non_loss_data=True)
    if not parallel_state.is_pipeline_last_stage():
        return None
    own = torch.cat(outputs).contiguous()
    parts = [torch.empty_like(own) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    dist.all_gather(parts, own, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)


class _NoLossScale:
    """The part of megatron-core's optimizer that the schedules call."""

    @staticmethod
    def scale_loss(loss: torch.Tensor) -> torch.Tensor:
        return loss


def losses_and_gradients(
    chunks: list[Any],
    config: Any,
    parallel: ParallelConfig,
    mask: torch.Tensor | None = None,
    optimizer: OptimizerConfig = OPTIMIZER,
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """Token losses [samples, sequence] on the last pipeline stage, and the gradients by checkpoint key.

    Gradients are unsharded. The chunks' parameters are lost.
    """
    wrapped = wrap_with_ddp(chunks, config, parallel, optimizer, TRAINING)
    bind_schedule_hooks(config, wrapped, _NoLossScale(), parallel)
    reports = _run(wrapped, mask, with_labels=True, forward_only=False)
    for chunk in wrapped:
        for param in chunk.parameters():
            param.data.copy_(param.main_grad)
    gradients = gather_full_state(wrapped, lambda key: True)
    if not parallel_state.is_pipeline_last_stage():
        return None, gradients
    return torch.cat([report["losses"] for report in reports]), gradients
