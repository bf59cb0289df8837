"""Index caches of megatron-core's datasets that are tied to the data's content and verified before use.

megatron-core keys a cache only by the data's path, and loads it without a check. Data that was preprocessed again under
the same prefix would be read through the old shuffle index; a cache that a killed run left unfinished, or that has lost
bytes, would be used; and ``numpy.load`` would run the code of a pickle in place of an array.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from megatron_dwm.atomic_write import atomic_files

logger = logging.getLogger(__name__)

Built = TypeVar("Built")

_PROBE = 65536  # bytes read at each end of a dataset's index for its stamp
_READ = 2**22  # bytes of a cache file that are read at a time
_CHECKSUMS = "checksums.json"


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


class VerifiedCache:
    """Base class of datasets: the first rank verifies the index cache, and rebuilds it atomically if it is damaged."""

    config: Any
    unique_description_hash: str
    array_names: tuple[str, ...]

    def with_verified_cache(self, folder: Path | None, split: str, build: Callable[[], Built]) -> Built:
        """Return what ``build`` returns: arrays that it loads from the cache in ``folder`` or writes to it.

        The other ranks, which wait for the first one in megatron-core, find an intact cache.

        Args:
            folder: None for no cache.
            split: name of the dataset's split, as in the cache's file names.
        """
        if folder is None or (dist.is_initialized() and dist.get_rank() != 0):
            return build()
        name = f"{self.unique_description_hash}-{type(self).__name__}-{split}"
        names = [f"{name}-{array}.npy" for array in self.array_names]
        fault = _cache_fault(folder, f"{name}-{_CHECKSUMS}", names)
        if fault is None:
            return build()
        if any((folder / array).exists() for array in names):
            logger.warning(f"index cache {folder / name}-*: {fault}; it is built again")
        config = self.config
        # A shared cache may hold many thousand files: it is cleared once, when the run starts.
        with atomic_files(folder, should_clear=config.path_to_cache is None) as scratch:
            self.config = copy.copy(config)
            self.config.path_to_cache = str(scratch)
            try:
                built = build()
            finally:
                self.config = config
            checksums = {array: _checksum(scratch / array) for array in names}
            (scratch / f"{name}-{_CHECKSUMS}").write_text(json.dumps(checksums), encoding="utf-8")
        return built


def _cache_fault(folder: Path, checksums: str, names: list[str]) -> str | None:
    """Return why a cache cannot be used, or None if it is intact."""
    for name in (checksums, *names):
        if not (folder / name).is_file():  # reading a named pipe would wait for a writer
            return f"{name} is missing"
    try:
        expected = json.loads((folder / checksums).read_text(encoding="utf-8"))
        for name in names:
            # An array and no pickle, and as long as its header says.
            is_array = isinstance(np.load(folder / name, mmap_mode="r", allow_pickle=False), np.ndarray)
            if not is_array or expected[name] != _checksum(folder / name):
                return f"{name} is damaged"
    except (OSError, EOFError, ValueError, LookupError, TypeError, RecursionError) as error:
        return f"it is damaged ({error})"
    return None


def _checksum(path: Path) -> list[int]:
    """Return the size and the CRC-32 of a file."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_READ):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]
