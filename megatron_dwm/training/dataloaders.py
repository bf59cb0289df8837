"""The batch loaders of a run's splits."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from megatron_dwm.config.data import DataConfig
from megatron_dwm.config.run import RunConfig
from megatron_dwm.data.batch import Batch
from megatron_dwm.data.blend import DataPaths
from megatron_dwm.data.datasets import START, Consumed, SplitSizes, build_datasets, samples_read, split_sizes
from megatron_dwm.data.loader import BatchLoader
from megatron_dwm.data.sample_order import order_change
from megatron_dwm.data.sampler import BatchPartition, ShuffledSampler, build_sampler
from megatron_dwm.data.validation import check_files, check_masks
from megatron_dwm.data.validation_sets import SetsSampler, ValidationSets
from megatron_dwm.errors import UserError
from megatron_dwm.runtime.process_groups import ParallelState
from megatron_dwm.runtime.startup_sync import StartupSync
from megatron_dwm.training.checkpoint_folders import saved_arguments
from megatron_dwm.training.evaluation import EvaluationData
from megatron_dwm.training.train_state import TrainState

logger = logging.getLogger(__name__)


class Dataloaders:
    """Batches of the training, evaluation and target sets; a split without data has no reader."""

    def __init__(
        self,
        config: RunConfig,
        paths: DataPaths,
        tokenizer: Any,
        parallel_state: ParallelState,
        startup_sync: StartupSync,
        train_state: TrainState,
    ) -> None:
        """Build the datasets; every rank calls it.

        Raises:
            UserError: on every rank, if a dataset cannot fill the run's batches.
        """
        self.data, self.seed, self.seq_length = config.data, config.training.seed, config.model.seq_length
        self.parallel_state, self.vocab_size = parallel_state, int(tokenizer.vocab_size)
        self._loaders: list[BatchLoader] = []
        sizes, dp = config.sizes, parallel_state.dp_size
        self.partition = BatchPartition(sizes.micro_batch_size, sizes.num_microbatches, parallel_state.dp_rank, dp)
        self.eval_partition = replace(
            self.partition,
            micro_batch_size=sizes.eval_micro_batch,
            num_microbatches=sizes.eval_batch_size // (sizes.eval_micro_batch * dp),
        )
        has_rampup = sizes.batch_sizes.rampup is not None
        self.train_partition = replace(self.partition, sizes=sizes.batch_sizes if has_rampup else None)
        self.target_partition = replace(
            self.partition,
            micro_batch_size=sizes.target_micro_batch,
            num_microbatches=sizes.target_batch_size // (sizes.target_micro_batch * dp),
        )
        consumed = _consumed(train_state, config.data, sizes.eval_batch_size)
        with startup_sync.phase("data files"):
            if parallel_state.replica_rank == 0 and not parallel_state.is_first_rank:
                check_files(paths, parallel_state.rank)
        self.datasets = build_datasets(
            config.data,
            paths,
            split_sizes(
                config.data,
                config.train_iters,
                config.training.train_samples,
                sizes.global_batch_size,
                consumed,
                has_rampup=has_rampup,
            ),
            tokenizer,
            parallel_state,
            sequence=self.seq_length,
            seed=self.seed,
            target_batch_size=sizes.target_batch_size if config.weighting.needs_target else None,
        )
        with startup_sync.phase("datasets"):
            read = samples_read(config.data, config.train_iters, sizes.global_batch_size, consumed)
            if has_rampup:
                read = read._replace(train=config.training.train_samples or 0)
            self._check_samples(read)
        should_compare = parallel_state.is_first_rank and train_state.iteration > 0
        if should_compare and (
            change := order_change(saved_arguments(config.checkpoint), config.arguments(), consumed)
        ):
            logger.warning(change)
        self.train = self._sequential(self.datasets.train, train_state.consumed_train_samples, self.train_partition)
        has_valid, has_test = self._evaluated_splits()
        self.valid = self._validation(train_state.consumed_valid_samples, paths.valid_sources) if has_valid else None
        self.test = self._evaluated(self.datasets.test, 0) if has_test else None

    def target(self, consumed: int) -> BatchLoader:
        """Return a loader of the target set, after ``consumed`` samples."""
        dataset, partition = self.datasets.target, self.target_partition
        total = len(dataset) if dataset is not None else 1
        sampler = ShuffledSampler(total, consumed, partition, self.seed)
        return self._loader(dataset, sampler, partition)

    def peek(self, consumed_train: int, consumed_target: int) -> tuple[Batch, Batch]:
        """Return the next training and target samples without consuming them."""
        train = self._sequential(self.datasets.train, consumed_train, self.train_partition)
        return train.next_batch(), self.target(consumed_target).next_batch()

    def _check_samples(self, read: SplitSizes) -> None:
        """Refuse datasets that are too small for the run's batches, or in which no token's loss counts.

        Args:
            read: the samples of each split that the run has read at its end.
        """
        if self.parallel_state.replica_rank != 0:
            return
        if self.datasets.train is None:
            raise UserError("the training part of the data holds no document; change --split or give more data")
        training = "--train-iters or --global-batch-size", self.partition
        evaluation = "--eval-iters, --eval-global-batch-size or --global-batch-size", self.eval_partition
        datasets = {
            "training": (self.datasets.train, read.train, *training),
            "validation": (self.datasets.valid, read.valid, *evaluation),
            "test": (self.datasets.test, read.test, *evaluation),
        }
        for name, (dataset, needed, flags, partition) in datasets.items():
            if self.data.dataloader_type == "cyclic":
                needed = partition.micro_batch_size * partition.dp_size
            found = min(dataset.lengths) if isinstance(dataset, ValidationSets) else len(dataset or ())
            if name == "validation" and self.data.full_validation:
                needed = 1
            if dataset is not None and found < needed:
                raise UserError(
                    f"the {name} data has {found} samples, fewer than the {needed} that are read; "
                    f"lower {flags}, or give more data"
                )
            for part in dataset.datasets if isinstance(dataset, ValidationSets) else [dataset]:
                check_masks(name, part)
        check_masks("target", self.datasets.target)

    def close(self) -> None:
        """Stop all loaders' worker processes."""
        for loader in self._loaders:
            loader.close()

    def _evaluated_splits(self) -> tuple[bool, bool]:
        """Return whether there is validation and test data; rank 0, which reads the data, broadcasts it."""
        present = [self.datasets.valid is not None, self.datasets.test is not None]
        dist.broadcast_object_list(present, src=0)
        asked = (self.data.has_validation, self.data.eval_iters > 0)
        for name, there, is_asked in zip(("validation", "test"), present, asked, strict=True):
            if is_asked and not there:
                logger.info(f" > no {name} data, so there is no {name} loss")
        return present[0], present[1]

    def _evaluated(self, dataset: Any, consumed: int) -> EvaluationData:
        loader = self._sequential(dataset, consumed, self.eval_partition)
        return EvaluationData(loader, {"": self.data.eval_iters})

    def _validation(self, consumed: int, names: list[str]) -> EvaluationData:
        """Return the data of an evaluation on the validation set; a collective call of all ranks."""
        data, sets = self.data, self.datasets.valid
        if not data.has_separate_validation_sets:
            return self._evaluated(sets, consumed)
        lengths = [sets.lengths if sets is not None else None]
        dist.broadcast_object_list(lengths, src=0)
        of_sets = lengths[0] or []
        batches = [data.eval_iters] * len(of_sets)
        if data.full_validation:
            batches = [-(-length // self.eval_partition.global_samples) for length in of_sets]
        sampler = SetsSampler(of_sets, batches, None if data.full_validation else consumed, self.eval_partition)
        return EvaluationData(
            self._loader(sets, sampler, self.eval_partition, consumed), dict(zip(names, batches, strict=True))
        )

    def _sequential(self, dataset: Any, consumed: int, partition: BatchPartition) -> BatchLoader:
        data, total = self.data, len(dataset) if dataset is not None else 0
        sampler = build_sampler(data.dataloader_type, total, consumed, partition, is_sharded=data.data_sharding)
        return self._loader(dataset, sampler, partition, consumed)

    def _loader(self, dataset: Any, sampler: Any, partition: BatchPartition, consumed: int = 0) -> BatchLoader:
        sequence, workers, state = self.seq_length, self.data.num_workers, self.parallel_state
        loader = BatchLoader(dataset, sampler, partition, sequence, state, self.vocab_size, workers, consumed)
        self._loaders.append(loader)
        return loader


def _consumed(train_state: TrainState, data: DataConfig, eval_batch_size: int) -> Consumed:
    """Return how much of the data a run has read, which determines the sizes of its datasets.

    A release starts at iteration 0 with a nonzero count of samples. As in Megatron-LM, its datasets have the size of a
    new run's.
    """
    if train_state.iteration == 0:
        return START
    valid = train_state.consumed_valid_samples
    if "validation" in train_state.evaluations_due:  # a signal has interrupted it
        valid += max(0, data.eval_iters) * eval_batch_size
    return Consumed(train_state.iteration, train_state.consumed_train_samples, valid)
