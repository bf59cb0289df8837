"""Tensors are read and written part by part, with few of them in memory at a time."""

from __future__ import annotations

import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_dwm.safe_unpickling import read_metadata
from megatron_dwm.training.checkpoint_parts import TensorOfParts, TensorPart, read_part, write_parts

LAYERS = 12
MATRICES = torch.randn(LAYERS, 6, 4, generator=torch.Generator().manual_seed(1))
TABLE = torch.arange(10.0)[:, None] * torch.ones(3)


class Counter:
    """Counts the tensors that were made and are still alive."""

    def __init__(self) -> None:
        self.alive = self.most = 0

    def make(self, tensor: torch.Tensor) -> torch.Tensor:
        made = tensor.clone()
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(made, self._died)
        return made

    def _died(self) -> None:
        self.alive -= 1


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Counter, list[int]]:
    counter, sizes = Counter(), []
    rows = tuple(
        TensorPart((layer, 0, 0), (1, 6, 4), partial(counter.make, MATRICES[layer][None])) for layer in range(LAYERS)
    )
    tensors = {
        "matrices": TensorOfParts((LAYERS, 6, 4), torch.float32, rows),
        "table": TensorOfParts((10, 3), torch.float32, (TensorPart((0, 0), (10, 3), partial(counter.make, TABLE)),)),
    }
    write_parts(tmp_path, tensors, {"state": [None]}, sizes.append)
    return tmp_path, counter, sizes


def test_few_parts_are_in_memory_at_a_time(written: tuple[Path, Counter, list[int]]):
    """torch's writer keeps the last one of each tensor until the file is complete."""
    _, counter, sizes = written
    assert counter.most <= 3 and len(sizes) == LAYERS + 1
    assert sum(sizes) == 4 * (MATRICES.numel() + TABLE.numel())


def test_parts_are_read_as_they_were_written(written: tuple[Path, Counter, list[int]]):
    folder = written[0]
    metadata = read_metadata(folder / ".metadata")
    for first, wanted in (
        ((5, 0, 0), MATRICES[5:6]),
        ((3, 1, 2), MATRICES[3:9, 1:5, 2:4]),  # of several stored parts
        ((0, 0, 0), MATRICES),
    ):
        target = torch.full(wanted.shape, torch.nan)
        read_part(folder, metadata, "matrices", first, target)
        assert torch.equal(target, wanted)


def test_the_files_are_a_checkpoint_for_torch(written: tuple[Path, Counter, list[int]]):
    from torch.distributed.checkpoint.state_dict_loader import load

    state = {"matrices": torch.zeros(LAYERS, 6, 4), "table": torch.zeros(10, 3)}
    load(state, checkpoint_id=str(written[0]), no_dist=True)
    assert torch.equal(state["matrices"], MATRICES) and torch.equal(state["table"], TABLE)
