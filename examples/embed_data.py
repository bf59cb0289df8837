"""Samples of two kinds for the examples of embedding: half of them count upwards, the others are noise."""

from collections.abc import Iterator

import torch

VOCABULARY, LENGTH = 32, 16


def counting(generator: torch.Generator, samples: int) -> torch.Tensor:
    """Return samples [n, s] that count upwards from a random number."""
    starts = torch.randint(0, VOCABULARY, (samples, 1), generator=generator)
    return (starts + torch.arange(LENGTH)) % VOCABULARY


def mixed_batches(samples: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches [n, s] in which even samples count upwards, and odd samples are noise."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        batch = torch.randint(0, VOCABULARY, (samples, LENGTH), generator=generator)
        batch[::2] = counting(generator, samples)[::2]
        yield batch


def target_batches(samples: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches [n, s] of counting samples."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield counting(generator, samples)


def describe(weights: torch.Tensor) -> str:
    """Return the mean weights [n] of the two kinds as a line."""
    return f"mean weight of counting samples {weights[::2].mean():.2f}, of noise {weights[1::2].mean():.2f}"
