"""Checks whether a resumed run reads its training samples in the same order as before.

A run resumes at the number of samples it has consumed. The sample at that position depends on the
blend, the split, the sequence length and the seed; and, because megatron-core shuffles the documents of all epochs
together, on how many epochs of each dataset the whole run needs. If any of these changes, samples are repeated or
never read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_dwm.config.data import DataConfig
from megatron_dwm.config.flags import flag_name
from megatron_dwm.data.blend import Blend, data_paths, split_slices
from megatron_dwm.data.datasets import Consumed, split_sizes
from megatron_dwm.data.index_file import sequence_lengths
from megatron_dwm.errors import UserError

_LAST_EPOCH = 0.8  # megatron-core shuffles a last epoch separately if the run needs less than this fraction of it


class _Epochs(NamedTuple):
    """Epochs that megatron-core shuffles: their number, and whether the last one is shuffled separately."""

    number: int
    is_last_separate: bool

    def __str__(self) -> str:
        named = f"{self.number} epoch" if self.number == 1 else f"{self.number} epochs"
        return named + (" (the last shuffled separately)" if self.is_last_separate else "")


def order_change(saved: Mapping[str, Any], present: Mapping[str, Any], consumed: Consumed) -> str | None:
    """Return a line that says how the order of the training samples has changed, or None if it has not.

    Args:
        saved: the arguments of the checkpoint that is resumed from, by Megatron-LM's names.
        present: the arguments of this run, by the same names.
        consumed: how much of the data had been read at the checkpoint.
    """
    if consumed.train_samples == 0 or present.get("mock_data"):
        return None
    changes = _changed_flags(saved, present) or _changed_epochs(saved, present, consumed)
    if not changes:
        return None
    return (
        f"the training samples come in another order than before the checkpoint ({'; '.join(changes)}): the first "
        f"{consumed.train_samples} samples of the new order are left out, so that some samples are read again and "
        "others not at all in this epoch"
    )


def _changed_flags(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Return the changed flags that determine the order of the samples, with both values."""
    before, now = _blend(saved), _blend(present)
    changes = []
    if before is not None and before != now:
        changes.append(f"training data {_shown(now)} instead of {_shown(before)}")
    compared = ["seq_length", "seed"]
    if _is_cyclic(saved) != _is_cyclic(present):
        changes.append("another --dataloader-type")
    elif _is_cyclic(present):
        compared += ["data_sharding", "micro_batch_size", "data_parallel_size"]
    for name in compared:
        if name in saved and saved[name] != present.get(name):
            changes.append(f"{flag_name(name)} {present.get(name)} instead of {saved[name]}")
    return changes


def _changed_epochs(saved: Mapping[str, Any], present: Mapping[str, Any], consumed: Consumed) -> list[str]:
    """Return the datasets of which the run now needs another number of epochs than the saved run."""
    blend = _blend(present)
    if blend is None:
        return []
    (prefixes, weights, split), before, now = blend, _train_size(saved, consumed), _train_size(present, consumed)
    if before is None or now is None or before == now:
        return []
    if _is_cyclic(present) and (len(prefixes) > 1 or weights is not None):
        return [f"an epoch of the blend has {now} samples instead of {before}"]
    if len(prefixes) > 1 and weights is None:  # one epoch of each dataset, whatever the size
        return []
    surplus, sequence = float(present.get("mid_level_dataset_surplus", 0)), int(present["seq_length"])
    total = sum(weights) if weights is not None else 1.0
    changes = []
    for prefix, weight in zip(prefixes, weights or (1.0,), strict=True):
        lengths = sequence_lengths(prefix)
        tokens = int(lengths[split_slices(split, len(lengths))[0] if split else slice(None)].sum())
        is_blended = weights is not None and (len(prefixes) > 1 or split is not None)
        sizes = [
            math.ceil(math.ceil(size * weight / total) * (1 + surplus)) if is_blended else size
            for size in (before, now)
        ]
        old, new = (_epochs(size, tokens, sequence) for size in sizes)
        if old != new:
            changes.append(f"{now} samples instead of {before} make {new} of {prefix}, not {old}")
    return changes


def _epochs(num_samples: int, tokens: int, sequence: int) -> _Epochs:
    """Return how megatron-core's GPTDataset shuffles a dataset of ``tokens`` for ``num_samples`` samples."""
    number = max(1, math.ceil((num_samples * sequence + 1) / max(1, tokens)))
    if number == 1:
        return _Epochs(1, False)
    from_last = num_samples - ((number - 1) * tokens - 1) // sequence
    return _Epochs(number, from_last < int(_LAST_EPOCH * ((tokens - 1) // sequence)))


def _blend(arguments: Mapping[str, Any]) -> tuple[list[str], list[float] | None, str | None] | None:
    """Return prefixes, weights and split of the training data; None if the arguments do not name any."""
    names = {field.name for field in dataclasses.fields(DataConfig)}
    try:
        paths = data_paths(DataConfig(**{name: arguments[name] for name in names & arguments.keys()}), None)
    except (UserError, TypeError):  # arguments of another program, or a file of paths that is no longer there
        return None
    train: Blend | None = paths.train
    return None if train is None else (*train, paths.split)


def _shown(blend: tuple[list[str], list[float] | None, str | None] | None) -> str:
    """Return a blend in the spelling of its flag."""
    if blend is None:
        return "of other flags"
    prefixes, weights, split = blend
    words = [f"{weight:g} {prefix}" for weight, prefix in zip(weights, prefixes, strict=True)] if weights else prefixes
    return " ".join(words) + (f" split {split}" if split else "")


def _train_size(arguments: Mapping[str, Any], consumed: Consumed) -> int | None:
    """Return the samples that the training set of a run with these arguments is built for."""
    iterations, batch = arguments.get("train_iters"), arguments.get("global_batch_size")
    if iterations is None or batch is None:
        return None
    data = DataConfig(mock_data=True, eval_iters=0)
    has_rampup = arguments.get("rampup_batch_size") is not None
    return split_sizes(data, iterations, arguments.get("train_samples"), batch, consumed, has_rampup=has_rampup).train


def _is_cyclic(arguments: Mapping[str, Any]) -> bool:
    return arguments.get("dataloader_type") == "cyclic"
