"""The datasets of a run: training, validation, test and target set, with the sizes that the run needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_dwm.config.data import DataConfig
from megatron_dwm.data.blend import SPLIT_NAMES, Blend, DataPaths, split_slices
from megatron_dwm.data.index_file import sequence_lengths
from megatron_dwm.data.validation_sets import ValidationSets
from megatron_dwm.runtime.process_groups import ParallelState

if TYPE_CHECKING:
    from megatron_dwm.data.gpt_dataset import StampedGPTDatasetConfig

_MOCK_TARGET_BATCHES = 8  # batches in an epoch of a mock target set, which has no end: more than one


class SplitSizes(NamedTuple):
    """Samples that a run reads of each split; 0 for a split that it does not read."""

    train: int
    valid: int
    test: int


@dataclass(frozen=True)
class Datasets:
    """The datasets on the first rank of each model replica; elsewhere all are None."""

    train: Any | None
    valid: Any | None
    """A :class:`~megatron_dwm.data.validation_sets.ValidationSets` if its datasets are evaluated separately."""
    test: Any | None
    target: Any | None


class Consumed(NamedTuple):
    """Amounts of data that a run has read over all replicas when it starts or resumes."""

    iteration: int = 0
    train_samples: int = 0
    valid_samples: int = 0


START = Consumed()


def samples_read(data: DataConfig, train_iters: int, global_batch_size: int, consumed: Consumed = START) -> SplitSizes:
    """Return the number of samples of each split that a run has read at its end.

    Args:
        data: the data flags, for how often and how long the run evaluates.
        train_iters: the iteration at which the run ends.
        global_batch_size: samples of one step over all replicas, from now on.
        consumed: what was read before, perhaps in batches of another size.
    """
    evaluations = data.evaluations(consumed.iteration, train_iters) + 1  # at the end of the run
    evaluated = max(0, data.eval_iters) * (data.eval_global_batch_size or global_batch_size)
    return SplitSizes(
        train=consumed.train_samples + max(0, train_iters - consumed.iteration) * global_batch_size,
        valid=(consumed.valid_samples + evaluations * evaluated) if evaluated else 0,
        test=evaluated,
    )


def split_sizes(
    data: DataConfig,
    train_iters: int,
    train_samples: int | None,
    global_batch_size: int,
    consumed: Consumed = START,
    *,
    has_rampup: bool = False,
) -> SplitSizes:
    """Return how many samples the datasets of a run are built for.

    As in Megatron-LM, this is what a run with the current batch size from its first iteration on would read, or what
    the run reads if that is more. The order of the samples depends on these numbers, and stays the same as long as the
    flags do.

    Args:
        train_samples: ``--train-samples``, if the run is counted in samples.
        has_rampup: whether the first batches are smaller, so that the number of steps does not determine the number of
            samples.
        (others): as for :func:`samples_read`.
    """
    constant = samples_read(data, train_iters, global_batch_size)
    if train_samples:
        constant = constant._replace(train=train_samples)
    read = samples_read(data, train_iters, global_batch_size, consumed)
    if has_rampup:
        read = read._replace(train=max(train_samples or 0, consumed.train_samples))
    return SplitSizes(*map(max, constant, read))


def build_datasets(
    data: DataConfig,
    paths: DataPaths,
    sizes: SplitSizes,
    tokenizer: Any,
    parallel_state: ParallelState,
    *,
    sequence: int,
    seed: int,
    target_batch_size: int | None,
) -> Datasets:
    """Build the datasets of a run from checked data; a collective call of all ranks.

    A split that is not read, or has no documents, is None.

    Args:
        sequence: tokens of one sample.
        seed: seed for shuffling documents and samples.
        target_batch_size: samples of one target batch; None for a run without a target set.
    """
    builder = _Builder(data, paths, tokenizer, parallel_state, sequence, seed)
    has_sets = data.has_separate_validation_sets and data.has_validation and bool(paths.valid_sources)
    train, valid, test = builder.splits(sizes._replace(valid=0) if has_sets else sizes)
    if has_sets:
        valid = builder.validation_sets(None if data.full_validation else sizes.valid)
    target = None if target_batch_size is None else builder.target(target_batch_size)
    return Datasets(train, valid, test, target)


class _Builder:
    """Builder of megatron-core's datasets; every method is a collective call of all ranks.

    On ranks that do not read, each dataset is None.
    """

    def __init__(
        self,
        data: DataConfig,
        paths: DataPaths,
        tokenizer: Any,
        parallel_state: ParallelState,
        sequence: int,
        seed: int,
    ) -> None:
        self.data, self.paths, self.tokenizer = data, paths, tokenizer
        self.parallel_state, self.sequence, self.seed = parallel_state, sequence, seed

    def splits(self, sizes: SplitSizes) -> list[Any]:
        """Build the training, validation and test data; None for a split that is not read or has no documents."""
        paths = self.paths
        if any(paths.per_split):
            per_split = [blend if size else None for blend, size in zip(paths.per_split, sizes, strict=True)]
            config = self._config(blend_per_split=per_split)
        else:
            split = self.data.split or "1,1,1" if self.data.mock_data else paths.split
            config = self._config(blend=paths.shared, split=split)
            is_read = [size > 0 and has_data for size, has_data in zip(sizes, _splits_with_data(paths), strict=True)]
            config.split_matrix = [
                ends if wanted else None for ends, wanted in zip(config.split_matrix, is_read, strict=True)
            ]
        return self._build(list(sizes), config)

    def validation_sets(self, size: int | None) -> ValidationSets | None:
        """Build each dataset of the validation data separately; None without validation data.

        Args:
            size: samples of each set; None for one epoch.
        """
        paths = self.paths
        if paths.valid is not None and paths.split is not None and not _splits_with_data(paths)[1]:
            return None
        built = []
        prefixes: list[str | None] = [None] if paths.valid is None else [*paths.valid[0]]
        for prefix in prefixes:
            if prefix is None:
                config = self._config(split="0,1,0")
            elif paths.split is None:
                config = self._config(blend_per_split=[None, ([prefix], None), None])
            else:
                config = self._config(blend=([prefix], None), split=paths.split)
                config.split_matrix = [None, config.split_matrix[1], None]
            built.append(self._build([0, size, 0], config)[1])
        return None if None in built else ValidationSets(built)

    def target(self, batch_size: int) -> Any:
        """Build the target set."""
        if self.data.mock_data:
            config, size = self._config(split="1,0,0"), batch_size * _MOCK_TARGET_BATCHES
            return self._build([size, None, None], config)[0]
        config = self._config(blend_per_split=[self.paths.target, None, None])
        return self._build([_target_size(self.paths.target, self.sequence), None, None], config)[0]

    def _config(self, **blends: Any) -> StampedGPTDatasetConfig:
        # Imported here: megatron-core's datasets take a second, and most commands need none.
        from megatron_dwm.data.gpt_dataset import StampedGPTDatasetConfig
        from megatron_dwm.data.index_cache import data_stamp

        data = self.data
        return StampedGPTDatasetConfig(
            stamp=data_stamp(prefix for blend in self.paths.blends().values() for prefix in blend[0]),
            random_seed=self.seed,
            sequence_length=self.sequence,
            num_dataset_builder_threads=data.num_dataset_builder_threads,
            path_to_cache=data.data_cache_path,
            mmap_bin_files=data.mmap_bin_files,
            tokenizer=self.tokenizer,
            mid_level_dataset_surplus=data.mid_level_dataset_surplus,
            allow_ambiguous_pad_tokens=data.allow_ambiguous_pad_tokens,
            reset_position_ids=data.reset_position_ids,
            reset_attention_mask=data.reset_attention_mask,
            eod_mask_loss=data.eod_mask_loss,
            create_attention_mask=False,
            **blends,
        )

    def _build(self, sizes: list[int | None], config: StampedGPTDatasetConfig) -> list[Any]:
        from megatron_dwm.data.gpt_dataset import CachedMockGPTDataset, DatasetBuilder, StampedGPTDataset

        dataset_class = CachedMockGPTDataset if self.data.mock_data else StampedGPTDataset
        return list(DatasetBuilder(dataset_class, sizes, self._is_built_on_rank, config).build())

    def _is_built_on_rank(self) -> bool:
        return self.parallel_state.replica_rank == 0


def _splits_with_data(paths: DataPaths) -> list[bool]:
    """Return whether the training, validation and test parts of the shared blend have any documents."""
    if paths.shared is None or paths.split is None:
        return [True] * len(SPLIT_NAMES)
    parts = [split_slices(paths.split, len(sequence_lengths(prefix))) for prefix in paths.shared[0]]
    return [any(part.stop > part.start for part in same) for same in zip(*parts, strict=True)]


def _target_size(target: Blend | None, sequence: int) -> int | None:
    """Return the size of the target set, which is read repeatedly; None for one epoch of each dataset.

    For a weighted blend it is the smallest size that holds every sample of each dataset at least once.
    """
    if target is None:
        return None
    prefixes, weights = target
    if weights is None:
        return None
    tokens = [int(sequence_lengths(prefix).sum()) for prefix in prefixes]
    samples = [max(1, (count - 1) // sequence) for count in tokens]
    return max(math.ceil(count * sum(weights) / weight) for count, weight in zip(samples, weights, strict=True))
