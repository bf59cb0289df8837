"""The index file (``.idx``) of a dataset: where each sequence of tokens lies in the data file (``.bin``)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def sequence_lengths(prefix: str) -> npt.NDArray[np.int32]:
    """Return the number of tokens of each sequence of a dataset."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    # A copy: the index unmaps its memory when the dataset is collected, whatever arrays still refer to it.
    dataset = IndexedDataset(prefix, mmap=True)
    return np.array(dataset.sequence_lengths)
