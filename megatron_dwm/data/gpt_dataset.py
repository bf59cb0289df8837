"""megatron-core's GPT dataset, with an index cache that is built again when the data has changed.

megatron-core keys its cache by path alone: data that was preprocessed again under the same prefix would be read through
the old shuffle index, past its end or only in part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

_PROBE = 65536  # bytes read at each end of an index


@dataclass
class StampedGPTDatasetConfig(GPTDatasetConfig):  # type: ignore[misc]  # megatron-core has no type information
    """A GPTDatasetConfig with the data's :func:`data_stamp`."""

    stamp: str = ""


class StampedGPTDataset(GPTDataset):  # type: ignore[misc]
    """A GPTDataset whose cache belongs to one state of its files."""

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "stamp"]


def data_stamp(prefixes: Iterable[str]) -> str:
    """Return a digest of the datasets' sizes and of both ends of their indexes.

    Nothing in it depends on the machine, so that nodes with their own copies of the data agree.
    """
    digest = hashlib.blake2b(digest_size=8)
    for prefix in prefixes:
        index = Path(prefix + ".idx")
        digest.update(f"{Path(prefix + '.bin').stat().st_size} {index.stat().st_size}".encode())
        with index.open("rb") as file:
            digest.update(file.read(_PROBE))
            file.seek(max(0, index.stat().st_size - _PROBE))
            digest.update(file.read(_PROBE))
    return digest.hexdigest()
