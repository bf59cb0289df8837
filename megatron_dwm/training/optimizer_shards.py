"""The distributed optimizer's state in checkpoints of the format ``torch``: one file per model-parallel rank.

Megatron-LM's ``distrib_optim.pt`` is next to ``model_optim_rng.pt``. For each gradient buffer it holds three flat
tensors (fp32 parameters and both moments): the buffer's buckets, concatenated without the padding that depends on the
number of replicas. Therefore a run with another data-parallel size can load it too.

Shape legend: B elements of a buffer, without padding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_dwm.errors import UserError
from megatron_dwm.model.protocols import Optimizer
from megatron_dwm.safe_unpickling import map_torch_file
from megatron_dwm.training.optimizer_loading import PARAM, keeping_steps, only_part

SHARDS = "distrib_optim.pt"
_KINDS = (PARAM, "exp_avg", "exp_avg_sq")


def gathered_shards(optimizer: Optimizer, *, use_gloo: bool) -> dict[Any, Any] | None:
    """Return the gathered state on the first replica and None on the others; collective among replicas."""
    state: dict[Any, Any] | None = only_part(optimizer).get_parameter_state_dp_zero(use_gloo_comm=use_gloo)
    return state


def load_shards(optimizer: Optimizer, path: Path) -> None:
    """Load this rank's shards from a file without reading the rest of it; no communication.

    Raises:
        UnreadableFileError: the file is missing or damaged.
        UserError: it belongs to other gradient buffers.
    """
    part, state = only_part(optimizer), map_torch_file(path)
    with torch.no_grad(), keeping_steps(part):  # fp32 shards are views of parameters that require gradients
        for number, (buffer, by_dtype) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
            ((dtype, buckets),) = by_dtype.items()
            saved = _of_buffer(state, number, dtype, buffer.numel_unpadded, path)
            start = 0
            for bucket, ranges in zip(buffer.buckets, buckets, strict=True):
                for param, places in ranges["param_map"].items():
                    place = places["gbuf_world_in_bucket"]
                    shard = slice(start + place.start, start + place.end)
                    part._set_main_param_and_optimizer_states(param, {kind: saved[kind][shard] for kind in _KINDS})
                start += bucket.numel_unpadded


def _of_buffer(state: Any, number: int, dtype: Any, size: int, path: Path) -> dict[str, torch.Tensor]:
    """Return the flat tensors [B] of one buffer.

    Raises:
        UserError: there is no such buffer, or it has another size.
    """
    by_dtype = state.get(number) if isinstance(state, dict) else None
    saved: dict[str, torch.Tensor] | None = by_dtype.get(dtype) if isinstance(by_dtype, dict) else None
    if saved is None or any(kind not in saved or saved[kind].shape != (size,) for kind in _KINDS):
        raise UserError(
            f"--load: {path.parent.parent.name}/{path.parent.name}/{path.name} does not hold buffer {number} of this "
            f"run's optimizer ({size} elements of {dtype}); give the flags it was saved with, or --no-load-optim"
        )
    return saved
