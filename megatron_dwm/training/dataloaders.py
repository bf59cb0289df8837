"""The readers of a run's splits."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_dwm.config.run import RunConfig
from megatron_dwm.data.batch import Batch
from megatron_dwm.data.datasets import BatchReader, DataPaths, build_datasets, sequential_or_cyclic, shuffled
from megatron_dwm.data.sampler import Share
from megatron_dwm.errors import UserError
from megatron_dwm.runtime.process_groups import Layout
from megatron_dwm.runtime.record_writers import say
from megatron_dwm.runtime.startup_sync import Agreement
from megatron_dwm.training.train_state import Progress


class Readers:
    """Batches of the training, evaluation and target sets; a split without data has no reader."""

    def __init__(
        self,
        config: RunConfig,
        paths: DataPaths,
        tokenizer: Any,
        layout: Layout,
        agreement: Agreement,
        progress: Progress,
    ) -> None:
        """Build the datasets; every rank calls it.

        Raises:
            UserError: on every rank, if a dataset cannot fill the run's batches.
        """
        self.config, self.layout, self.vocab_size = config, layout, int(tokenizer.vocab_size)
        micro, dp = config.training.micro_batch, layout.dp_size
        self.share = Share(micro, config.num_microbatches, layout.dp_rank, dp)
        self.target_share = Share(micro, config.target_batch_size // (micro * dp), layout.dp_rank, dp)
        self.datasets = build_datasets(config, paths, tokenizer, layout)
        with agreement.phase("datasets"):
            self._check_sizes(progress)
        self.train = self._sequential(self.datasets.train, progress.consumed_train_samples)
        has_valid, has_test = self._evaluated_splits()
        self.valid = self._sequential(self.datasets.valid, progress.consumed_valid_samples) if has_valid else None
        self.test = self._sequential(self.datasets.test, 0) if has_test else None

    def target(self, consumed: int) -> BatchReader:
        """The target set's reader, ``consumed`` samples in."""
        dataset, share = self.datasets.target, self.target_share
        return self._reader(dataset, shuffled(self.config, dataset, consumed, share), share)

    def peek(self, consumed_train: int, consumed_target: int) -> tuple[Batch, Batch]:
        """The next training and target samples, which the run's own readers still have before them."""
        return self._sequential(self.datasets.train, consumed_train).next(), self.target(consumed_target).next()

    def _check_sizes(self, progress: Progress) -> None:
        if self.layout.mp_rank != 0:
            return
        if self.datasets.train is None:
            raise UserError("the training part of the data holds no document; change --split or give more data")
        data, iterations = self.config.data, self.config.train_iters
        evaluations = 1 if data.eval_interval is None else iterations // data.eval_interval + 1
        if data.eval_interval is not None:  # those before this start were paid for by it
            evaluations -= progress.iteration // data.eval_interval
        read = {  # batches up to the end of the run, and where reading goes on
            "training": (self.datasets.train, iterations, 0, "--train-iters"),
            "validation": (
                self.datasets.valid,
                evaluations * data.eval_iters,
                progress.consumed_valid_samples,
                "--eval-iters",
            ),
            "test": (self.datasets.test, data.eval_iters, 0, "--eval-iters"),
        }
        for name, (dataset, batches, consumed, flag) in read.items():
            needed = consumed + batches * self.share.all_samples
            if data.dataloader_type == "cyclic":
                needed = self.share.micro_batch_size * self.share.dp_size
            if dataset is not None and len(dataset) < needed:
                raise UserError(
                    f"the {name} data has {len(dataset)} samples, fewer than the {needed} that are read; "
                    f"lower {flag} or --global-batch-size, or give more data"
                )

    def _evaluated_splits(self) -> tuple[bool, bool]:
        """Whether there is validation and test data, as rank 0, which reads it, knows."""
        present = [self.datasets.valid is not None, self.datasets.test is not None]
        dist.broadcast_object_list(present, src=0)
        if self.layout.is_first and self.config.data.eval_iters > 0:
            for name, there in zip(("validation", "test"), present, strict=True):
                if not there:
                    say(f" > no {name} data, so there is no {name} loss")
        return present[0], present[1]

    def _sequential(self, dataset: Any, consumed: int) -> BatchReader:
        return self._reader(dataset, sequential_or_cyclic(self.config, dataset, consumed, self.share), self.share)

    def _reader(self, dataset: Any, sampler: Any, share: Share) -> BatchReader:
        sequence, workers = self.config.model.sequence, self.config.data.num_workers
        return BatchReader(dataset, sampler, share, sequence, self.layout, self.vocab_size, workers)
