"""Process groups and random seeds of a run."""

from __future__ import annotations

import random
import socket
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from megatron_dwm.config.parallel import ParallelConfig


@dataclass(frozen=True)
class ParallelState:
    """Sizes of the groups that this process belongs to, and its rank in each."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    mp_group: dist.ProcessGroup
    """Model-parallel group: all ranks that hold one replica of the model, and see the same samples."""

    @property
    def mp_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tp_size * self.pp_size

    @property
    def mp_rank(self) -> int:
        """Rank in the model-parallel group; rank 0 reads the replica's data."""
        return dist.get_rank(self.mp_group)

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
        """Tensor and pipeline rank, as Megatron-LM writes them beside a checkpoint."""
        return f"[ t {self.tp_rank + 1}/{self.tp_size}, p {self.pp_rank + 1}/{self.pp_size} ]"

    @property
    def is_last_pipeline_stage(self) -> bool:
        """Whether this rank knows the losses."""
        return self.pp_rank == self.pp_size - 1


def initialize_process_groups(
    parallel: ParallelConfig,
    virtual_stages: int | None,
    device: torch.device,
    store: dist.Store,
    rank: int,
    world_size: int,
) -> ParallelState:
    """Join the other processes through ``store`` and build megatron-core's groups."""
    from megatron.core import parallel_state as mpu

    dist.init_process_group(
        backend=parallel.distributed_backend if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=parallel.distributed_timeout_minutes),
    )
    mpu.initialize_model_parallel(
        parallel.tp,
        parallel.pp,
        virtual_stages,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        order="tp-cp-ep-pp-dp" if parallel.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
        create_gloo_process_groups=parallel.enable_gloo_process_groups,
    )
    return current_parallel_state()


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
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
        tp_group=mpu.get_tensor_model_parallel_group(),
        pp_group=mpu.get_pipeline_model_parallel_group(),
        dp_group=mpu.get_data_parallel_group(),
        mp_group=mpu.get_model_parallel_group(),
    )


def set_seeds(seed: int, parallel_state: ParallelState) -> None:
    """Seed every generator as Megatron-LM does: pipeline stages differ by 100, TP ranks by the tracker's offsets."""
    from megatron.core import tensor_parallel

    stage_seed = seed + 100 * parallel_state.pp_rank
    random.seed(stage_seed)
    np.random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)


def free_port() -> int:
    """Return a TCP port of this host that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
