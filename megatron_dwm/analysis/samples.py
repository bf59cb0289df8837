"""The texts of a run's samples: its training and target sets, rebuilt from the arguments in its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_dwm.analysis.start_folder import find_start_folder, working_in
from megatron_dwm.analysis.text_statistics import distinct, tfidf_similarity
from megatron_dwm.config.checkpoint import CheckpointConfig
from megatron_dwm.config.run import RunConfig
from megatron_dwm.config.saved_config import saved_config
from megatron_dwm.data.sample_text import sample_text
from megatron_dwm.errors import UserError
from megatron_dwm.weighting.inputs import sample_tokens
from megatron_dwm.weighting.weighter_folder import SampleTokens

MAX_TARGET_SAMPLES = 2000
"""Samples of the target set that others are compared with."""
END_MARK = " ▪ "
"""Text between two documents of a sample."""


@dataclass(frozen=True)
class Sample:
    """One sample of a dataset."""

    tokens: np.ndarray
    """All of its tokens, ends of documents among them."""
    text_tokens: list[int]
    """The tokens that the model predicts and that are text: neither padding nor an end of document."""
    documents: int
    """Documents, or parts of documents, in it."""
    source: int
    """Number of its dataset in the blend."""


class RunSamples:
    """Samples of a run's training set by their index, and of its target set."""

    def __init__(
        self, train: Any, target: Any | None, tokenizer: Any, sources: Sequence[str], sample_format: SampleTokens
    ) -> None:
        """Create a reader of the run's datasets.

        Args:
            train: the training set.
            target: the target set, if the run had one.
            tokenizer: megatron-core's tokenizer.
            sources: names of the training data's sources, by :attr:`Sample.source`.
            sample_format: the format of the samples, for the run's weighters.
        """
        self.train, self.target, self.tokenizer, self.sources = train, target, tokenizer, list(sources)
        self.sample_format = sample_format

    def sample(self, index: int) -> Sample:
        """Return a training sample.

        Raises:
            UserError: there is no sample of that index.
        """
        if not 0 <= index < len(self.train):
            raise UserError(f"the training data has {len(self.train)} samples now, and no sample {index} of the run")
        return self._read(self.train, index)

    def target_samples(self, max_samples: int) -> list[Sample]:
        """Return samples of the target set, evenly spaced if there are more than ``max_samples``."""
        if self.target is None:
            return []
        number = min(max_samples, len(self.target))
        places = np.linspace(0, len(self.target) - 1, number).round().astype(int)
        return [self._read(self.target, int(place)) for place in places]

    def text(self, sample: Sample) -> str:
        """Return a sample's text, with ``END_MARK`` where a document ends."""
        return sample_text(sample.tokens, self.tokenizer, END_MARK)

    def characters(self, sample: Sample) -> int:
        """Return the number of characters of a sample's text tokens."""
        return len(self.tokenizer.detokenize(sample.text_tokens)) if sample.text_tokens else 0

    def _read(self, dataset: Any, index: int) -> Sample:
        item = dataset[index]
        tokens, labels = np.asarray(item["tokens"]), np.asarray(item["labels"])
        is_predicted = np.asarray(item["loss_mask"]) > 0
        end = self.tokenizer.eod
        whole = np.concatenate([tokens[:1], labels])
        starts = np.flatnonzero((whole != end) & (np.concatenate([[end], whole[:-1]]) == end))
        return Sample(
            tokens=whole,
            text_tokens=labels[is_predicted & (labels != end)].tolist(),
            documents=len(starts),
            source=int(item.get("dataset_id", 0)),
        )


@contextmanager
def open_samples(folder: Path) -> Iterator[RunSamples]:
    """Open the datasets of the run that saved to ``folder``, and work in the folder that it was started from.

    Raises:
        UserError: there is no checkpoint, or its data or tokenizer cannot be read.
    """
    folder = folder.resolve()
    saved = run_arguments(folder)
    start = find_start_folder(folder, saved.get("save"), argument_paths(saved))
    with working_in(start), _opened(*_resumed_config(saved), start) as run_samples:
        yield run_samples


@contextmanager
def _opened(config: RunConfig, consumed_valid: int, start: Path) -> Iterator[RunSamples]:
    """Open the datasets of a run from the current folder.

    Raises:
        UserError: its data or tokenizer cannot be read.
    """
    from megatron.core import parallel_state as mpu

    from megatron_dwm.config.parallel import ParallelConfig
    from megatron_dwm.data.blend import data_paths
    from megatron_dwm.data.datasets import Consumed, build_datasets, split_sizes
    from megatron_dwm.data.tokenizers import build_tokenizer
    from megatron_dwm.runtime.process_groups import initialize_process_groups

    has_target = config.weighting.needs_target
    paths = data_paths(config.data, config.weighting.dwm_target_data_path if has_target else None)
    for blend in paths.blends().values():
        for prefix in blend[0]:
            for file in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")):
                if not file.is_file():
                    raise UserError(
                        f"the run's dataset {file} does not exist here or in {start}; run the command in the folder "
                        "that the path is relative to, or restore the data"
                    )
    tokenizer = build_tokenizer(config.tokenizer)
    # megatron-core asks a process group which rank writes index caches.
    parallel_state = initialize_process_groups(ParallelConfig(), None, torch.device("cpu"), dist.HashStore(), 0, 1)
    try:
        datasets = build_datasets(
            config.data,
            paths,
            split_sizes(
                config.data,
                config.train_iters,
                config.training.train_samples,
                config.sizes.global_batch_size,
                Consumed(*config.resumed_at, consumed_valid),
                has_rampup=config.training.rampup_batch_size is not None,
            ),
            tokenizer,
            parallel_state,
            sequence=config.model.seq_length,
            seed=config.training.seed,
            target_batch_size=config.sizes.target_batch_size if has_target else None,
        )
        samples = sample_tokens(config.model.seq_length, tokenizer, config.tokenizer)
        yield RunSamples(datasets.train, datasets.target, tokenizer, paths.train_sources, samples)
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


def run_arguments(folder: Path) -> dict[str, Any]:
    """Return the arguments of the run whose checkpoints are in ``folder``, with its last iteration.

    Raises:
        UserError: there is no checkpoint, or none of this program's.
    """
    from megatron_dwm.config.checkpoint_args import read_arguments
    from megatron_dwm.training.checkpoint_folders import iteration_of, latest_checkpoint

    checkpoint = latest_checkpoint(CheckpointConfig(load=str(folder)))
    if checkpoint is None:
        raise UserError(f"{folder} holds no checkpoint, so the run's data is not known; give its --save folder")
    saved = read_arguments(checkpoint)
    if "dwm_mode" not in saved:
        raise UserError(f"{checkpoint} was not saved by pretrain_dwm.py; give the --save folder of one of its runs")
    return {**saved, "iteration": iteration_of(checkpoint)}


def argument_paths(saved: Mapping[str, Any]) -> list[str]:
    """Return the paths in a run's arguments that lead to its data and its tokenizer."""
    data = ("data_path", "train_data_path", "valid_data_path", "test_data_path", "dwm_target_data_path")
    prefixes = [word for name in data for word in saved.get(name) or ()]
    files = ("data_args_path", "per_split_data_args_path", "tokenizer_model", "vocab_file", "merge_file")
    return [f"{prefix}.idx" for prefix in prefixes] + [str(saved[name]) for name in files if saved.get(name)]


def _resumed_config(saved: Mapping[str, Any]) -> tuple[RunConfig, int]:
    """Return the configuration of a run from its arguments, and its consumed validation samples.

    As if the run were resumed from its last checkpoint, because earlier batches may have had other sizes.

    Raises:
        UserError: its data or tokenizer are not there.
    """
    iteration = saved["iteration"]
    train, valid = (saved["consumed_train_samples"], saved["consumed_valid_samples"]) if iteration > 0 else (0, 0)
    return saved_config(saved, resumed_at=(iteration, train)), valid


def text_properties(indices: np.ndarray, sources: np.ndarray, run_samples: RunSamples) -> dict[str, np.ndarray]:
    """Describe the texts of training samples: length, diversity, similarity to the target set, each [n].

    Args:
        indices: places in the training set [n].
        sources: names of the sources that the run had at these places [n].
        run_samples: the run's datasets.

    Raises:
        UserError: the training set is not what the run read.
    """
    samples = [run_samples.sample(int(index)) for index in indices]
    for index, sample, source in zip(indices, samples, sources, strict=True):
        if (present := run_samples.sources[sample.source]) != source:
            raise UserError(
                f"sample {index} comes from {present} now and came from {source} in the run; its data or its "
                "--train-iters have changed since"
            )
    texts = [sample.text_tokens for sample in samples]
    found = {
        "length": np.array([len(text) for text in texts], dtype=float),
        "documents": np.array([sample.documents for sample in samples], dtype=float),
        "characters": np.array([run_samples.characters(s) / max(1, len(s.text_tokens)) for s in samples]),
        "distinct-1": np.array([distinct(text, 1) for text in texts]),
        "distinct-2": np.array([distinct(text, 2) for text in texts]),
    }
    target = [sample.text_tokens for sample in run_samples.target_samples(MAX_TARGET_SAMPLES)]
    if target:
        found |= {f"similarity-{n}": tfidf_similarity(texts, target, n) for n in (1, 2)}
    return found
