"""A hash of tensors' bits, computed on their device, for comparing copies; it is not cryptographic."""

from __future__ import annotations

from collections.abc import Iterable

import torch

CHUNK_ELEMENTS = 1 << 22
"""Elements that are hashed at once, in several temporary tensors of 8 bytes per element."""
_LANES = ((0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9), (0xC2B2AE3D27D4EB4F, 0x94D049BB133111EB))
"""Odd factors for positions, and for positions mixed with bits: one pair for each number of the hash.

They are the constants of SplitMix64, and a prime of xxHash.
"""


def bit_hash(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return two integers [2], int64, that depend on every bit of float32 tensors and on its position.

    Each element is mixed with its position, and the results are added, all modulo 2^64. Sums of integers do not depend
    on their order, so that all devices get the same result.
    """
    sums: list[torch.Tensor] = []
    start = 0
    for tensor in tensors:
        for bits in tensor.detach().reshape(-1).view(torch.int32).split(CHUNK_ELEMENTS):
            positions = torch.arange(start, start + len(bits), device=bits.device)
            start += len(bits)
            sums.append(torch.stack([_mixed(bits, positions, *_signed(*lane)).sum() for lane in _LANES]))
    return torch.stack(sums).sum(0)


def _mixed(bits: torch.Tensor, positions: torch.Tensor, position_factor: int, mix_factor: int) -> torch.Tensor:
    mixed = (bits.long() ^ (positions * position_factor)).mul_(mix_factor)
    return (mixed ^ (mixed >> 29)).mul_(mix_factor)


def _signed(*numbers: int) -> tuple[int, ...]:
    """Return the integers whose 64 bits are those of numbers below 2^64."""
    return tuple(number - (1 << 64) if number >> 63 else number for number in numbers)
