"""Flags that choose the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dwm.config.flags import (
    MAX_PROCESSES,
    flag,
    flag_name,
    require_at_least,
    require_at_most,
    require_paths,
)
from megatron_dwm.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """Data and data loading."""

    data_path: list[str] | None = flag(
        None, "One dataset prefix, several prefixes, or pairs of weight and prefix; divided by --split.", nargs="*"
    )
    split: str | None = flag(None, "Train, validation and test parts of --data-path, e.g. 969,30,1.")
    train_data_path: list[str] | None = flag(None, "Dataset prefix or blend for training.", nargs="*")
    valid_data_path: list[str] | None = flag(None, "Dataset prefix or blend for evaluation.", nargs="*")
    test_data_path: list[str] | None = flag(None, "Dataset prefix or blend for the final test.", nargs="*")
    data_args_path: str | None = flag(None, "File with the words of --data-path.")
    per_split_data_args_path: str | None = flag(
        None, 'JSON file {"train": [...], "valid": [...], "test": [...]} with one blend each.'
    )
    data_cache_path: str | None = flag(None, "Folder for the datasets' index caches.")
    mock_data: bool = flag(False, "Train on generated data.")
    mmap_bin_files: bool = flag(True, "Do not memory-map .bin files.", "--no-mmap-bin-files")
    num_workers: int = flag(2, "Data loader processes.")
    dataloader_type: Literal["single", "cyclic"] | None = flag(
        None, "Read the data once in the dataset's order (single), or repeatedly and shuffled (cyclic)."
    )
    data_sharding: bool = flag(True, "Do not shard the data of a cyclic loader.", "--no-data-sharding")
    reset_position_ids: bool = flag(False, "Restart learned positions after an end-of-document token.")
    reset_attention_mask: bool = flag(False, "Do not attend across end-of-document tokens.")
    eod_mask_loss: bool = flag(False, "Mask the loss of end-of-document tokens.")
    create_attention_mask_in_dataloader: bool = flag(
        True,
        "Accepted for Megatron-LM scripts: masks are always made on the device.",
        "--no-create-attention-mask-in-dataloader",
    )
    num_dataset_builder_threads: int = flag(1, "Threads that build a blend's datasets.")
    mid_level_dataset_surplus: float = flag(0.005, "Fraction of extra samples that each dataset of a blend provides.")
    allow_ambiguous_pad_tokens: bool = flag(False, "Allow pad tokens to occur in the data.")
    eval_iters: int = flag(100, "Batches in one evaluation; 0 or -1 for none.")
    eval_interval: int | None = flag(None, "Iterations between evaluations.")
    start_eval_at_iter: int | None = flag(None, "Iteration before which there is no evaluation; 0 for none.")
    eval_micro_batch_size: int | None = flag(
        None, "Samples in one microbatch of an evaluation. Default: --micro-batch-size."
    )
    eval_global_batch_size: int | None = flag(
        None, "Samples in one batch of an evaluation. Default: --global-batch-size."
    )
    full_validation: bool = flag(
        False, "Evaluate on every sample of the validation data each time, regardless of --eval-iters."
    )
    multiple_validation_sets: bool = flag(
        False,
        "Evaluate separately on each dataset of --valid-data-path (or on the validation part of each dataset of "
        "--data-path), and report one loss for each.",
    )
    validation_set_names: list[str] | None = flag(
        None, "Names of the sets of --multiple-validation-sets, instead of the names of their files."
    )

    def __post_init__(self) -> None:
        require_paths(self, "data_cache_path data_args_path per_split_data_args_path")
        shared = [name for name in ("data_path", "data_args_path") if getattr(self, name)]
        split = [
            name
            for name in ("train_data_path", "valid_data_path", "test_data_path", "per_split_data_args_path")
            if getattr(self, name)
        ]
        if len(shared) > 1 or (shared and split) or (self.per_split_data_args_path and len(split) > 1):
            flags = " and ".join(flag_name(name) for name in shared + split)
            raise UserError(f"{flags} exclude each other; name the data in one way")
        if self.mock_data and (shared or split):
            raise UserError("--mock-data excludes real data paths; leave one out")
        if not (self.mock_data or shared or split):
            raise UserError("no data: give --data-path, --train-data-path or --mock-data")
        require_at_least(self, -1, "eval_iters")
        require_at_least(self, 0, "num_workers mid_level_dataset_surplus start_eval_at_iter")
        require_at_least(
            self, 1, "eval_interval eval_micro_batch_size eval_global_batch_size num_dataset_builder_threads"
        )
        require_at_most(self, MAX_PROCESSES, "num_workers num_dataset_builder_threads")
        names = self.validation_set_names
        if names is not None and not self.multiple_validation_sets:
            raise UserError("--validation-set-names has no effect without --multiple-validation-sets; add that")
        if names is not None and len(set(names)) < len(names):
            raise UserError(f"--validation-set-names {' '.join(names)}: a name repeats; change one")
        if self.full_validation and self.mock_data:
            raise UserError("--full-validation: generated data (--mock-data) has no end; leave it out")

    def evaluations(self, first: int, last: int) -> int:
        """Return the number of evaluations during training that follow iteration ``first``, up to ``last``."""
        if not self.eval_interval:
            return 0
        first = max(first, (self.start_eval_at_iter or 1) - 1)
        return max(0, last // self.eval_interval - first // self.eval_interval)

    @property
    def has_validation(self) -> bool:
        """Whether the run evaluates on the validation data."""
        return self.eval_iters > 0 or self.full_validation

    @property
    def has_separate_validation_sets(self) -> bool:
        """Whether each dataset of the validation data is evaluated separately."""
        return self.full_validation or self.multiple_validation_sets
