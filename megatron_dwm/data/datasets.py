"""Datasets of a run: training, evaluation and target, and the loaders that read them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_dwm.config.data import DataConfig
from megatron_dwm.config.run import RunConfig
from megatron_dwm.data.batch import Batch, share_batch
from megatron_dwm.data.sampler import CyclicSampler, SequentialSampler, Share, ShuffledSampler
from megatron_dwm.errors import UserError
from megatron_dwm.runtime.distributed import Layout

Blend = tuple[list[str], list[float] | None]

LEGACY_SPLIT = "969, 30, 1"  # Megatron-LM's, when --data-path comes without --split


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
            "--dwm-valid-data-path": self.target,
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
        UserError: a blend that is not ``prefix``, ``prefix prefix …`` or ``weight prefix weight prefix …``, or an
            unreadable file of paths.
    """
    words, split_words = data.data_path, [data.train_data_path, data.valid_data_path, data.test_data_path]
    if data.data_args_path is not None:
        words = _read("--data-args-path", data.data_args_path).split()
    if data.per_split_data_args_path is not None:
        name = "--per-split-data-args-path"
        try:
            listed = json.loads(_read(name, data.per_split_data_args_path))
            split_words = [listed.get(key) for key in ("train", "valid", "test")]
        except (json.JSONDecodeError, AttributeError) as error:
            raise UserError(
                f'{name} {data.per_split_data_args_path}: not a JSON object of "train", "valid" and "test" ({error})'
            ) from None
    shared = parse_blend("--data-path", words)
    flags = ("--train-data-path", "--valid-data-path", "--test-data-path")
    train, valid, test = (parse_blend(flag, part) for flag, part in zip(flags, split_words, strict=True))
    if shared is None and not data.mock_data and train is None:
        raise UserError("--train-data-path is missing; evaluation data alone trains nothing")
    return DataPaths(
        shared=shared,
        per_split=(train, valid, test),
        target=parse_blend("--dwm-valid-data-path", target),
        split=(data.split or LEGACY_SPLIT) if shared else None,
    )


def parse_blend(flag: str, words: list[str] | None) -> Blend | None:
    """``prefix …`` or ``weight prefix weight prefix …`` as (prefixes, weights)."""
    if not words:
        return None
    if len(words) == 1:
        return [words[0]], None
    weights = [_number(word) for word in words[::2]]
    if len(words) % 2 == 0 and None not in weights:
        return [word.strip() for word in words[1::2]], [weight for weight in weights if weight is not None]
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
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror}); check the path") from None


@dataclass(frozen=True)
class Datasets:
    """On the first rank of each model replica; elsewhere all are None."""

    train: Any | None
    valid: Any | None
    test: Any | None
    target: Any | None


def build_datasets(config: RunConfig, paths: DataPaths, tokenizer: Any, layout: Layout) -> Datasets:
    """Build the datasets of a run. Every rank must call it; sizes follow Megatron-LM.

    Raises:
        UserError: the target set has fewer tokens than one sample.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import MockGPTDataset

    from megatron_dwm.data.gpt_dataset import StampedGPTDataset

    def loads() -> bool:
        return layout.mp_rank == 0

    data, batch = config.data, config.global_batch_size
    kind = MockGPTDataset if data.mock_data else StampedGPTDataset
    eval_runs = config.train_iters // data.eval_interval + 1 if data.eval_interval else 1
    train_samples = config.training.train_samples or config.train_iters * batch
    sizes = [train_samples, eval_runs * data.eval_iters * batch, data.eval_iters * batch]
    per_split = list(paths.per_split) if any(paths.per_split) else None
    blends = {"blend": paths.shared, "blend_per_split": per_split, "split": paths.split}
    if data.mock_data:
        blends["split"] = data.split or "1,1,1"
    core_config = _core_dataset_config(config, paths, tokenizer, **blends)
    train, valid, test = BlendedMegatronDatasetBuilder(kind, sizes, loads, core_config).build()

    target = None
    if config.weighting.learns:
        target_blend = None if data.mock_data else [paths.target, None, None]
        target_config = _core_dataset_config(
            config, paths, tokenizer, blend_per_split=target_blend, split="1,0,0" if data.mock_data else None
        )
        # One epoch of the target set, which the loader then reads over and over (a mock set has no end of its own).
        weighted = paths.target is not None and paths.target[1] is not None
        size = config.target_batch_size * 8 if data.mock_data or weighted else None
        target = BlendedMegatronDatasetBuilder(kind, [size, None, None], loads, target_config).build()[0]
    return Datasets(train, valid, test, target)


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


class BatchReader:
    """Yields one :class:`Batch` a step on every rank of a replica; only its first rank reads files."""

    def __init__(
        self,
        dataset: Any,
        sampler: Any,
        share: Share,
        seq: int,
        layout: Layout,
        vocab_size: int,
        num_workers: int,
    ) -> None:
        self.share, self.seq, self.layout, self.vocab_size = share, seq, layout, vocab_size
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

    def next(self) -> Batch:
        """The next step's samples.

        Raises:
            UserError: a token outside the vocabulary, or no data left.
        """
        loaded = None
        if self.layout.mp_rank == 0:
            loaded = next(self.steps, None) if self.steps is not None else None
            if loaded is None:
                raise UserError("the data ran out; lower --train-iters or give more data")
        batch = share_batch(loaded, self.share.own_samples, self.seq, self.layout)
        largest = int(batch.tokens.max())
        if largest >= self.vocab_size:
            raise UserError(
                f"token {largest} in the data is outside the tokenizer's vocabulary of {self.vocab_size}; use the "
                "tokenizer that the data was preprocessed with (--tokenizer-model, --vocab-size)"
            )
        return batch


def sequential_or_cyclic(config: RunConfig, dataset: Any, consumed: int, share: Share) -> Any:
    """The sampler that ``--dataloader-type`` names."""
    total = len(dataset) if dataset is not None else 0
    if config.data.dataloader_type == "cyclic":
        return CyclicSampler(total, consumed, share, config.data.data_sharding)
    return SequentialSampler(total, consumed, share)


def shuffled(config: RunConfig, dataset: Any, consumed: int, share: Share) -> ShuffledSampler:
    """The target set's sampler."""
    return ShuffledSampler(len(dataset) if dataset is not None else 1, consumed, share, config.training.seed)
