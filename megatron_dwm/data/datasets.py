"""Datasets of a run: training, evaluation and target, and the loaders that read them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_dwm.config.data import DataConfig
from megatron_dwm.config.run import RunConfig
from megatron_dwm.data.batch import Batch, broadcast_batch
from megatron_dwm.data.sampler import BatchPartition, CyclicSampler, SequentialSampler, ShuffledSampler
from megatron_dwm.errors import UserError
from megatron_dwm.runtime.process_groups import ParallelState

Blend = tuple[list[str], list[float] | None]

LEGACY_SPLIT = "969, 30, 1"  # Megatron-LM's, when --data-path comes without --split
PART_NAMES = ("training", "validation", "test")
_SPLIT = re.compile(r"\s*(\d+\.?\d*|\.\d+)(\s*[,/ ]\s*(\d+\.?\d*|\.\d+)){0,2}\s*")  # what megatron-core reads


@dataclass(frozen=True)
class DataPaths:
    """Where the data of a run lies: one blend divided by ``split``, or one blend for each split."""

    shared: Blend | None
    per_split: tuple[Blend | None, Blend | None, Blend | None]
    target: Blend | None
    split: str | None

    def blends(self) -> dict[str, Blend]:
        """The blends that are there, by the flag that names them."""
        named = {
            "--data-path": self.shared,
            "--train-data-path": self.per_split[0],
            "--valid-data-path": self.per_split[1],
            "--test-data-path": self.per_split[2],
            "--dwm-target-data-path": self.target,
        }
        return {name: blend for name, blend in named.items() if blend is not None}

    @property
    def train(self) -> Blend | None:
        return self.shared or self.per_split[0]

    @property
    def train_sources(self) -> list[str]:
        """A short name for each dataset of the training blend, in the order of ``Batch.source``."""
        if self.train is None:
            return ["mock"]
        return short_names(self.train[0])


def short_names(prefixes: Sequence[str]) -> list[str]:
    """File names of dataset prefixes, without the suffix that preprocessing adds; whole prefixes if not unique."""
    names = [Path(prefix).name.removesuffix("_document").removesuffix("_text") for prefix in prefixes]
    return names if len(set(names)) == len(names) else list(prefixes)


def data_paths(data: DataConfig, target: list[str] | None) -> DataPaths:
    """Read the flags that name data.

    Raises:
        UserError: a blend that is not ``prefix``, ``prefix prefix …`` or ``weight prefix weight prefix …``, a split
            that is not up to three numbers, or an unreadable file of paths.
    """
    words, split_words = data.data_path, [data.train_data_path, data.valid_data_path, data.test_data_path]
    if data.data_args_path is not None:
        words = _read("--data-args-path", data.data_args_path).split()
    if data.per_split_data_args_path is not None:
        split_words = _read_per_split(data.per_split_data_args_path)
    if data.split is not None and not (_SPLIT.fullmatch(data.split) and re.search("[1-9]", data.split)):
        raise UserError(f"--split {data.split}: not up to three numbers that are not all 0; give e.g. {LEGACY_SPLIT}")
    shared = parse_blend("--data-path", words)
    flags = ("--train-data-path", "--valid-data-path", "--test-data-path")
    train, valid, test = (parse_blend(flag, part) for flag, part in zip(flags, split_words, strict=True))
    if shared is None and not data.mock_data and train is None:
        raise UserError("--train-data-path is missing; evaluation data alone trains nothing")
    return DataPaths(
        shared=shared,
        per_split=(train, valid, test),
        target=parse_blend("--dwm-target-data-path", target),
        split=(data.split or LEGACY_SPLIT) if shared else None,
    )


def parse_blend(flag: str, words: list[str] | None) -> Blend | None:
    """``prefix …`` or ``weight prefix weight prefix …`` as (prefixes, weights)."""
    if not words:
        return None
    if len(words) == 1:
        return [words[0]], None
    weights = [weight for word in words[::2] if (weight := _number(word)) is not None]
    if len(words) == 2 * len(weights):
        for word, weight in zip(words[::2], weights, strict=True):
            if not 0 < weight < math.inf:
                raise UserError(f"{flag}: the weight {word} is no positive number; give one, or leave its prefix out")
        return [word.strip() for word in words[1::2]], weights
    if any(_number(word) is not None for word in words):
        raise UserError(f"{flag} {' '.join(words)}: weights and prefixes must alternate; give one weight a prefix")
    return [word.strip() for word in words], None


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _read(flag: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: cannot be read ({error}); check the path") from None


def _read_per_split(path: str) -> list[list[str] | None]:
    name = "--per-split-data-args-path"
    text = _read(name, path)
    try:
        listed = json.loads(text)
        blends = [listed.get(key) for key in ("train", "valid", "test")]
        if not all(blend is None or isinstance(blend, list) for blend in blends):
            raise TypeError("a blend is no list")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(
            f'{name} {path}: not a JSON object of lists "train", "valid" and "test" ({error}); mend the file'
        ) from None
    return [None if blend is None else [str(word) for word in blend] for blend in blends]


def split_parts(split: str, sequences: int) -> list[slice]:
    """Which of a dataset's sequences are its training, validation and test part."""
    from megatron.core.datasets import blended_megatron_dataset_config as core

    matrix = core.convert_split_vector_to_split_matrix(core.parse_and_normalize_split(split))
    return [slice(*(round(end * sequences) for end in ends)) if ends is not None else slice(0, 0) for ends in matrix]


def sequence_lengths(prefix: str) -> np.ndarray:
    """Tokens of each sequence of a dataset."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    # A copy: the index unmaps its memory when the dataset goes, whatever arrays still look into it.
    dataset = IndexedDataset(prefix, mmap=True)
    return dataset.sequence_lengths.copy()


@dataclass(frozen=True)
class Datasets:
    """On the first rank of each model replica; elsewhere all are None."""

    train: Any | None
    valid: Any | None
    test: Any | None
    target: Any | None


def build_datasets(config: RunConfig, paths: DataPaths, tokenizer: Any, parallel_state: ParallelState) -> Datasets:
    """Build the datasets of a run, of data that was checked. Every rank must call it; sizes follow Megatron-LM.

    A part that nothing is asked of, or that no document falls into, is None.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import MockGPTDataset

    from megatron_dwm.data.gpt_dataset import StampedGPTDataset

    def loads() -> bool:
        return parallel_state.mp_rank == 0

    data, batch = config.data, config.global_batch_size
    kind = MockGPTDataset if data.mock_data else StampedGPTDataset
    eval_runs = config.train_iters // data.eval_interval + 1 if data.eval_interval else 1
    train_samples = config.training.train_samples or config.train_iters * batch
    sizes = [train_samples, eval_runs * data.eval_iters * batch, data.eval_iters * batch]
    if any(paths.per_split):
        per_split = [blend if size else None for blend, size in zip(paths.per_split, sizes, strict=True)]
        core_config = _core_dataset_config(config, paths, tokenizer, blend_per_split=per_split)
    else:
        split = data.split or "1,1,1" if data.mock_data else paths.split
        core_config = _core_dataset_config(config, paths, tokenizer, blend=paths.shared, split=split)
        wanted = [size > 0 and there for size, there in zip(sizes, _parts_with_data(paths), strict=True)]
        core_config.split_matrix = [
            ends if is_wanted else None for ends, is_wanted in zip(core_config.split_matrix, wanted, strict=True)
        ]
    train, valid, test = BlendedMegatronDatasetBuilder(kind, sizes, loads, core_config).build()

    target = None
    if config.weighting.needs_target:
        target_blend = None if data.mock_data else [paths.target, None, None]
        target_config = _core_dataset_config(
            config, paths, tokenizer, blend_per_split=target_blend, split="1,0,0" if data.mock_data else None
        )
        target_sizes = [_target_size(config, paths.target), None, None]
        target = BlendedMegatronDatasetBuilder(kind, target_sizes, loads, target_config).build()[0]
    return Datasets(train, valid, test, target)


def _parts_with_data(paths: DataPaths) -> list[bool]:
    """Whether a document of the shared blend falls into the training, validation and test part."""
    if paths.shared is None or paths.split is None:
        return [True] * len(PART_NAMES)
    parts = [split_parts(paths.split, len(sequence_lengths(prefix))) for prefix in paths.shared[0]]
    return [any(part.stop > part.start for part in same) for same in zip(*parts, strict=True)]


def _target_size(config: RunConfig, target: Blend | None) -> int | None:
    """Samples of the target set, which its loader reads over and over; None for one epoch of each dataset.

    Of a weighted blend that is what holds each dataset at least once. A mock set has no end of its own.
    """
    if target is None:
        return config.target_batch_size * 8
    prefixes, weights = target
    if weights is None:
        return None
    tokens = [int(sequence_lengths(prefix).sum()) for prefix in prefixes]
    samples = [max(1, (own - 1) // config.model.sequence) for own in tokens]
    return max(math.ceil(own * sum(weights) / weight) for own, weight in zip(samples, weights, strict=True))


def _core_dataset_config(config: RunConfig, paths: DataPaths, tokenizer: Any, **blends: Any) -> Any:
    from megatron_dwm.data.gpt_dataset import StampedGPTDatasetConfig, data_stamp

    data = config.data
    prefixes = [prefix for blend in paths.blends().values() for prefix in blend[0]]
    return StampedGPTDatasetConfig(
        stamp=data_stamp(prefixes),
        random_seed=config.training.seed,
        sequence_length=config.model.sequence,
        num_dataset_builder_threads=data.num_dataset_builder_threads,
        path_to_cache=data.data_cache_path,
        mmap_bin_files=data.mmap_bin_files,
        tokenizer=tokenizer,
        mid_level_dataset_surplus=data.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=data.allow_ambiguous_pad_tokens,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=False,
        **blends,
    )


class _Numbered(Dataset):
    """A dataset whose items also carry their index and the number of the dataset in the blend they come from."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = dict(self.dataset[index])
        source = int(item.pop("dataset_id", 0))
        keys = ("tokens", "labels", "loss_mask", "position_ids")
        return {**{key: item[key] for key in keys}, "index": index, "source": source}


_NO_TOKEN = -1


class BatchLoader:
    """Yields one :class:`Batch` a step on every rank of a replica; only its first rank reads files."""

    def __init__(
        self,
        dataset: Any,
        sampler: Any,
        partition: BatchPartition,
        seq: int,
        parallel_state: ParallelState,
        vocab_size: int,
        num_workers: int,
    ) -> None:
        self.partition, self.seq, self.parallel_state, self.vocab_size = partition, seq, parallel_state, vocab_size
        self.steps: Iterator[dict[str, torch.Tensor]] | None = None
        if dataset is not None:
            loader = DataLoader(
                _Numbered(dataset),
                batch_sampler=sampler,
                num_workers=num_workers,
                pin_memory=torch.cuda.is_available(),
                persistent_workers=num_workers > 0,
                generator=torch.Generator(),  # a loader draws a seed as it starts; the run's own stream stays put
            )
            self.steps = iter(loader)

    def next_batch(self) -> Batch:
        """The next step's samples.

        Raises:
            UserError: a token outside the vocabulary, or no data left.
        """
        loaded = None
        if self.parallel_state.mp_rank == 0:
            loaded = next(self.steps, None) if self.steps is not None else None
            if loaded is None:
                loaded = self._nothing()
        batch = broadcast_batch(loaded, self.partition.replica_samples, self.seq, self.parallel_state)
        least, largest = torch.stack(batch.tokens.aminmax()).tolist()
        if least == _NO_TOKEN:
            raise UserError("the data ran out; lower --train-iters or --eval-iters, or give more data")
        if largest >= self.vocab_size:
            raise UserError(
                f"token {largest} in the data is outside the tokenizer's vocabulary of {self.vocab_size}; use the "
                "tokenizer that the data was preprocessed with (--tokenizer-model, --vocab-size)"
            )
        return batch

    def _nothing(self) -> dict[str, torch.Tensor]:
        """What tells a replica's ranks that there is no further step, in the place of its samples.

        The replicas' samplers end at the same step, so this ends every rank alike.
        """
        n = self.partition.replica_samples
        columns = torch.full((n, self.seq), _NO_TOKEN)
        matrices = dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids"), columns)
        return {**matrices, "index": torch.zeros(n), "source": torch.zeros(n)}


def sequential_or_cyclic(config: RunConfig, dataset: Any, consumed: int, partition: BatchPartition) -> Any:
    """The sampler that ``--dataloader-type`` names."""
    total = len(dataset) if dataset is not None else 0
    if config.data.dataloader_type == "cyclic":
        return CyclicSampler(total, consumed, partition, config.data.data_sharding)
    return SequentialSampler(total, consumed, partition)


def shuffled(config: RunConfig, dataset: Any, consumed: int, partition: BatchPartition) -> ShuffledSampler:
    """The target set's sampler."""
    return ShuffledSampler(len(dataset) if dataset is not None else 1, consumed, partition, config.training.seed)
