"""A hash of tensors' bits: which changes it sees."""

from __future__ import annotations

import torch

from megatron_dwm.weighting import bit_hash as module
from megatron_dwm.weighting.bit_hash import bit_hash


def test_every_bit_and_its_place_count(monkeypatch):
    values = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1))
    original = bit_hash([values]).tolist()
    assert bit_hash([values[:1], values[1:]]).tolist() == original  # the elements in their order, however they are cut
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 64)
    assert bit_hash([values]).tolist() == original

    seen = {tuple(original)}
    for bit in range(32):
        changed = values.clone()
        changed.view(torch.int32)[1, 7] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)
        seen.add(tuple(bit_hash([changed]).tolist()))
    swapped = values.clone()
    swapped[0, 0], swapped[2, 5] = values[2, 5], values[0, 0]
    seen.add(tuple(bit_hash([swapped]).tolist()))
    seen.add(tuple(bit_hash([values.roll(1)]).tolist()))
    negative_zero = torch.zeros(3, 1000)
    seen.add(tuple(bit_hash([negative_zero]).tolist()))
    negative_zero[0, 0] = -0.0
    seen.add(tuple(bit_hash([negative_zero]).tolist()))
    assert len(seen) == 1 + 32 + 2 + 2
    assert all(len({found[lane] for found in seen}) == len(seen) for lane in range(2))
