"""megatron-core's GPT datasets and their builder, with verified index caches and errors that every rank raises.

megatron-core has no type information, so that its classes are Any to the type checker: hence ``type: ignore[misc]``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset

from megatron_dwm.data.index_cache import Built, VerifiedCache
from megatron_dwm.errors import UserError, shortened, write_failure_reason


@dataclass
class StampedGPTDatasetConfig(GPTDatasetConfig):  # type: ignore[misc]
    """A GPTDatasetConfig with the data's :func:`~megatron_dwm.data.index_cache.data_stamp`."""

    stamp: str = ""


class _CachedGPTDataset(VerifiedCache):
    """The part of a GPT dataset that this module adds; stands before GPTDataset among the base classes."""

    dataset: Any
    index_split: Any
    masks_and_position_ids_are_cacheable: bool
    array_names = ("document_index", "sample_index", "shuffle_index")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.masks_and_position_ids_are_cacheable:
            # megatron-core would keep the first sample's mask, with that sample's pad tokens in it, for all samples.
            sequence = self.config.sequence_length
            self.cached_loss_mask = torch.ones(sequence)
            self.cached_position_ids = torch.arange(sequence)
            self.masks_and_position_ids_are_cached = True

    def _build_document_sample_shuffle_indices(self) -> Any:
        folder = self.config.path_to_cache
        if folder is None and not self.config.mock:  # megatron-core's default
            folder = os.path.join(self.dataset.path_prefix, "cache", f"{type(self).__name__}_indices")
        build = super()._build_document_sample_shuffle_indices  # type: ignore[misc]
        return self.with_verified_cache(Path(folder) if folder else None, self.index_split.name, build)


class StampedGPTDataset(_CachedGPTDataset, GPTDataset):  # type: ignore[misc]
    """A GPTDataset whose cache belongs to one state of its files."""

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "stamp"]


class CachedMockGPTDataset(_CachedGPTDataset, MockGPTDataset):  # type: ignore[misc]
    """A MockGPTDataset with a verified cache."""


class CachedBlendedDataset(VerifiedCache, BlendedDataset):  # type: ignore[misc]
    """A BlendedDataset with a verified cache."""

    array_names = ("dataset_index", "dataset_sample_index")

    def _build_indices(self) -> Any:
        folder = self.config.path_to_cache
        return self.with_verified_cache(Path(folder) if folder else None, self.split.name, super()._build_indices)


class DatasetBuilder(BlendedMegatronDatasetBuilder):  # type: ignore[misc]
    """megatron-core's builder, with the datasets above and with errors of the first rank raised on every rank.

    The first rank builds the caches while the others wait; if it failed alone, they would wait forever.
    """

    @staticmethod
    def build_generic_dataset(
        cls: Any, is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *args: Any
    ) -> Any | None:
        """Build one dataset where ``is_built_on_rank``; with ``synchronize_ranks`` a collective call of all ranks.

        Raises:
            UserError: a cache cannot be written or read, or a blend needs more samples of a dataset than were built.
        """
        cls = CachedBlendedDataset if cls is BlendedDataset else cls
        if not dist.is_initialized():
            return _build(cls, args)
        is_first, built, error = dist.get_rank() == 0, None, None
        if is_built_on_rank() and (is_first or not synchronize_ranks):
            built, error = _attempt(lambda: _build(cls, args))
        if synchronize_ranks:
            _raise_error_of_first_rank(error)
            if is_built_on_rank() and not is_first:
                built, error = _attempt(lambda: _build(cls, args))
        if error is not None:
            raise error
        return built

    def _build_megatron_dataset_splits(
        self, dataset_path: str | None, split: list[Any], sizes: list[int], synchronize_ranks: bool = True
    ) -> list[Any | None]:
        """Build the parts of one dataset; a collective call of all ranks with ``synchronize_ranks``."""
        if dist.is_initialized() and not self.is_built_on_rank():
            # megatron-core's ranks without data wait at a barrier for each part; here they learn of its error.
            for part in split:
                if part is not None and synchronize_ranks:
                    _raise_error_of_first_rank(None)
            return [None] * len(split)
        return list(super()._build_megatron_dataset_splits(dataset_path, split, sizes, synchronize_ranks))

    def _build_megatron_datasets_parallel(self, *args: Any) -> Any:
        if not dist.is_initialized():
            return super()._build_megatron_datasets_parallel(*args)
        built, error = _attempt(lambda: super(DatasetBuilder, self)._build_megatron_datasets_parallel(*args))
        if error is not None and dist.get_rank() == 0:
            dist.barrier()  # the one at which the other ranks wait until the first has built
        _raise_error_of_first_rank(error)
        if error is not None:
            raise error
        return built


def _build(cls: Any, args: tuple[Any, ...]) -> Any:
    config = args[-1]
    try:
        return cls(*args)
    except OSError as error:
        place = f" {config.path_to_cache}" if config.path_to_cache else ""
        reason = write_failure_reason(error) or error
        raise UserError(
            f"--data-cache-path{place}: the index cache cannot be written or read ({reason}); give a folder that can "
            "be written and that all nodes see"
        ) from error
    except MemoryError as error:
        raise UserError(
            f"the index of so many samples needs more memory than there is ({shortened(error)}); lower --train-iters, "
            "--train-samples or --eval-iters"
        ) from error
    except IndexError as error:
        if cls is not CachedBlendedDataset:
            raise
        raise UserError(
            f"--mid-level-dataset-surplus {config.mid_level_dataset_surplus}: the blend needs more samples of a "
            "dataset than were built; give a larger surplus"
        ) from error


def _attempt(build: Callable[[], Built]) -> tuple[Built | None, UserError | None]:
    """Return what ``build`` returns, or the error that it raises."""
    try:
        return build(), None
    except UserError as error:
        return None, error


def _raise_error_of_first_rank(error: UserError | None) -> None:
    """Raise the first rank's error, if it has one, on every rank; a collective call of all ranks."""
    message = [None if error is None else str(error)]
    dist.broadcast_object_list(message, src=0)
    if message[0] is not None:
        raise UserError(message[0]) from error
