"""Process groups and random seeds of a run."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.runtime.collectives import world_rank, world_size


@dataclass(frozen=True)
class ParallelState:
    """Sizes of the groups that this process belongs to, and its rank in each."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    """Ranks that hold the same part of the model, and the same part of the sequence of other samples."""
    dp_cp_group: dist.ProcessGroup
    """Ranks that hold the same part of the model: gradients are reduced, and optimizers sharded, over them."""
    optimizer_group: dist.ProcessGroup
    """Ranks that the distributed optimizer's state is sharded over: those of :attr:`dp_cp_group`, or a part of them."""
    mp_group: dist.ProcessGroup
    """Model-parallel group: ranks that together hold the model's parameters once."""

    @property
    def mp_size(self) -> int:
        """Number of ranks that together hold the model's parameters once."""
        return self.tp_size * self.pp_size

    @property
    def mp_rank(self) -> int:
        """Rank in the model-parallel group."""
        return dist.get_rank(self.mp_group) if self.mp_size > 1 else 0

    @property
    def replica_size(self) -> int:
        """Number of ranks of a replica, which read the same samples (context-parallel ranks hold parts of them)."""
        return self.cp_size * self.mp_size

    @property
    def replica_rank(self) -> int:
        """Rank in the replica; rank 0 reads its data."""
        return self.cp_rank * self.mp_size + self.mp_rank

    @property
    def is_first_rank(self) -> bool:
        """Whether this is the process that writes files and prints messages."""
        return self.rank == 0

    @property
    def is_last_rank(self) -> bool:
        """Whether this is the process that prints the log line, as in Megatron-LM."""
        return self.rank == self.world_size - 1

    @property
    def tp_pp_label(self) -> str:
        """Tensor and pipeline rank, as in Megatron-LM's log lines about checkpoints."""
        return f"[ t {self.tp_rank + 1}/{self.tp_size}, p {self.pp_rank + 1}/{self.pp_size} ]"

    @property
    def is_last_pipeline_stage(self) -> bool:
        """Whether this rank is on the last pipeline stage, which computes the losses."""
        return self.pp_rank == self.pp_size - 1

    # A replica is a model-parallel group on each context-parallel rank. It has no process group: its collectives run
    # over the model-parallel and the context-parallel group, one after the other.

    def broadcast_over_replica(self, tensor: torch.Tensor) -> None:
        """Overwrite ``tensor`` with that of the replica's first rank; a collective call of the replica."""
        if self.cp_size > 1 and self.mp_rank == 0:
            dist.broadcast(tensor, dist.get_global_rank(self.cp_group, 0), group=self.cp_group)
        if self.mp_size > 1:
            dist.broadcast(tensor, dist.get_global_rank(self.mp_group, 0), group=self.mp_group)

    def sum_over_replica(self, tensor: torch.Tensor) -> None:
        """Sum ``tensor`` in place over the replica's ranks; a collective call of the replica."""
        dist.all_reduce(tensor, group=self.mp_group)
        if self.cp_size > 1:
            dist.all_reduce(tensor, group=self.cp_group)

    def gather_over_replica(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the ranks' tensors [m, ..] concatenated [replica size · m, ..]; a collective call of the replica."""
        gathered = _all_gather(tensor, self.mp_group, self.mp_size) if self.mp_size > 1 else tensor
        return _all_gather(gathered, self.cp_group, self.cp_size) if self.cp_size > 1 else gathered


def initialize_process_groups(
    parallel: ParallelConfig,
    virtual_stages: int | None,
    device: torch.device,
    store: dist.Store,
    rank: int,
    world_size: int,
) -> ParallelState:
    """Join the other processes through ``store`` and build megatron-core's groups."""
    dist.init_process_group(
        backend=parallel.distributed_backend if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=parallel.distributed_timeout_minutes),
    )
    build_model_groups(parallel, virtual_stages)
    return current_parallel_state()


def build_model_groups(parallel: ParallelConfig, virtual_stages: int | None) -> None:
    """Build megatron-core's groups of the processes that have joined; every process calls it."""
    from megatron.core import parallel_state as mpu

    # megatron-core accepts this order only if experts (there are none) have the same data-parallel size as the rest.
    expert_size = parallel.tp * parallel.cp if parallel.use_tp_pp_dp_mapping else None
    mpu.initialize_model_parallel(
        parallel.tp,
        parallel.pp,
        virtual_stages,
        context_parallel_size=parallel.cp,
        hierarchical_context_parallel_sizes=parallel.hierarchical_context_parallel_sizes,
        expert_tensor_parallel_size=expert_size,
        num_distributed_optimizer_instances=parallel.num_distributed_optimizer_instances,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        order="tp-cp-ep-pp-dp" if parallel.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
        create_gloo_process_groups=parallel.enable_gloo_process_groups,
    )


def current_parallel_state() -> ParallelState:
    """Return the state of the groups that megatron-core holds."""
    from megatron.core import parallel_state as mpu

    return ParallelState(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        tp_size=mpu.get_tensor_model_parallel_world_size(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        pp_size=mpu.get_pipeline_model_parallel_world_size(),
        cp_rank=mpu.get_context_parallel_rank(),
        cp_size=mpu.get_context_parallel_world_size(),
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
        tp_group=mpu.get_tensor_model_parallel_group(),
        pp_group=mpu.get_pipeline_model_parallel_group(),
        cp_group=mpu.get_context_parallel_group(),
        dp_group=mpu.get_data_parallel_group(),
        dp_cp_group=mpu.get_data_parallel_group(with_context_parallel=True),
        optimizer_group=mpu.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True),
        mp_group=mpu.get_model_parallel_group(),
    )


def data_parallel_state() -> ParallelState:
    """Return the state of pure data parallelism, without megatron-core's groups.

    There are no groups of a single rank, and no groups at all without torch.distributed.
    """
    rank, size = world_rank(), world_size()
    world: Any = dist.group.WORLD if dist.is_initialized() else None
    none: Any = None
    return ParallelState(
        rank=rank,
        world_size=size,
        tp_rank=0,
        tp_size=1,
        pp_rank=0,
        pp_size=1,
        cp_rank=0,
        cp_size=1,
        dp_rank=rank,
        dp_size=size,
        tp_group=none,
        pp_group=none,
        cp_group=none,
        dp_group=world,
        dp_cp_group=world,
        optimizer_group=world,
        mp_group=none,
    )


def _all_gather(tensor: torch.Tensor, group: dist.ProcessGroup, size: int) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts)


def set_seeds(seed: int, parallel_state: ParallelState) -> None:
    """Seed every generator as Megatron-LM does: pipeline stages differ by 100, TP ranks by the tracker's offsets."""
    from megatron.core import tensor_parallel

    stage_seed = seed + 100 * parallel_state.pp_rank
    random.seed(stage_seed)
    np.random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)
