"""Measurement of all pipeline stages of a run, each on the first of its ranks."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dwm.config.run import RunConfig
from megatron_dwm.model.transformer_config import transformer_config
from megatron_dwm.model.vocabulary import Vocabulary
from megatron_dwm.plan.simulated_rank import gpu_kernels, simulated_rank
from megatron_dwm.plan.stage import Stage, measure_stage
from megatron_dwm.training.setup import assemble_language_model


def measure_stages(config: RunConfig, vocabulary: Vocabulary, *, for_gpu: bool) -> list[Stage]:
    """Measure all pipeline stages; those between the first and the last are equal, unless the layout differs."""
    stages: list[Stage] = []
    for number in range(config.parallel.pp):
        if 1 < number < config.parallel.pp - 1 and config.parallel.pipeline_model_parallel_layout is None:
            stages.append(dataclasses.replace(stages[1], number=number))
        else:
            stages.append(_stage(config, vocabulary, number, for_gpu=for_gpu))
    return stages


def layers_config(config: RunConfig, *, for_gpu: bool) -> TransformerConfig:
    """Return megatron-core's configuration of the layers, without extensions for GPUs that change no size.

    Raises:
        UserError: flags that contradict each other.
    """
    parallel, training = config.parallel, config.training
    if for_gpu:
        # They change when bytes are sent, not how many.
        parallel = dataclasses.replace(parallel, tp_comm_overlap=False, defer_embedding_wgrad_compute=False)
        # It asks for variables in the environment of the machines that train, and changes no size.
        training = dataclasses.replace(training, deterministic_mode=False)
    core_config = transformer_config(
        config.model,
        parallel,
        training,
        config.optimizer,
        torch.device("cuda" if for_gpu else "cpu"),
        has_attention_mask=config.data.reset_attention_mask,
    )
    core_config.gradient_accumulation_fusion = False
    return core_config


def _stage(config: RunConfig, vocabulary: Vocabulary, number: int, *, for_gpu: bool) -> Stage:
    """Build and measure one pipeline stage on its first rank."""
    # Fake tensors have no values to check, and there are no Gloo groups with fake process groups.
    training = dataclasses.replace(config.training, check_for_nan_in_loss_and_grad=False)
    parallel = dataclasses.replace(config.parallel, enable_gloo_process_groups=False)
    config = dataclasses.replace(config, training=training, parallel=parallel)
    replica = parallel.tp * parallel.cp
    rank = number * (replica if parallel.use_tp_pp_dp_mapping else config.world_size // parallel.pp)
    core_config = layers_config(config, for_gpu=for_gpu)
    with (
        simulated_rank(parallel, config.sizes.virtual_stages, config.world_size, rank) as layout,
        gpu_kernels() if for_gpu else nullcontext(),
    ):
        model = assemble_language_model(config, core_config, vocabulary, layout, None)
        return measure_stage(model, config.weighting, training.micro_batch_size)
