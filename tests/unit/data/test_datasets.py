"""The datasets of a run: what each is made of, how large it is, and which one a sample is from."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state as mpu

from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.run import RunConfig, parse_run
from megatron_dwm.data.blend import data_paths
from megatron_dwm.data.datasets import Datasets, build_datasets, split_sizes
from megatron_dwm.data.loader import BatchLoader
from megatron_dwm.data.sampler import BatchPartition, SequentialSampler, ShuffledSampler
from megatron_dwm.data.tokenizers import build_tokenizer
from megatron_dwm.runtime.process_groups import ParallelState, current_parallel_state
from tests.distributed.harness import run_distributed
from tests.small_runs import GPT, IN_PROCESS, as_argv
from tests.unit.data.made_data import write_dataset

SEQUENCE = 8
VOCAB = 100


def write(folder: Path, name: str, token: int, documents: int, length: int = 9) -> str:
    """Documents of one token, so that a sample shows which dataset it is from."""
    return write_dataset(folder, name, [[token] * length] * documents)


def run_config(world_size: int, flags: list[str]) -> RunConfig:
    """Batches of 4 samples, 8 steps, an evaluation of 2 batches every 4."""
    small = {**IN_PROCESS, "--mock-data": False, "--micro-batch-size": 1, "--global-batch-size": 4, "--train-iters": 8}
    data = {"--vocab-size": VOCAB, "--num-workers": 0, "--eval-interval": 4, "--eval-iters": 2}
    lengths = {"--seq-length": SEQUENCE, "--max-position-embeddings": SEQUENCE}
    return parse_run([*as_argv({**GPT, **small, **lengths, **data}), *flags], world_size)


def with_datasets(
    work: Callable[[RunConfig, Datasets, ParallelState], Any],
    flags: list[str],
    world_size: int = 1,
    parallel: ParallelConfig | None = None,
) -> list[Any]:
    """What ``work`` returns on each rank, given the datasets of a run with ``flags``."""
    parallel = parallel or ParallelConfig()

    def on_rank() -> Any:
        mpu.initialize_model_parallel(parallel.tp, parallel.pp)
        config = run_config(world_size, flags)
        paths = data_paths(
            config.data, config.weighting.dwm_target_data_path if config.weighting.needs_target else None
        )
        parallel_state = current_parallel_state()
        datasets = build_datasets(
            config.data,
            paths,
            split_sizes(config.data, config.train_iters, config.training.train_samples, config.sizes.global_batch_size),
            build_tokenizer(config.tokenizer),
            parallel_state,
            sequence=SEQUENCE,
            seed=config.training.seed,
            target_batch_size=config.sizes.target_batch_size if config.weighting.needs_target else None,
        )
        return work(config, datasets, parallel_state)

    return run_distributed(on_rank, world_size)


def lengths(config: RunConfig, datasets: Datasets, parallel_state: ParallelState) -> list[int | None]:
    parts = (datasets.train, datasets.valid, datasets.test, datasets.target)
    return [None if part is None else len(part) for part in parts]


def sources(
    config: RunConfig, datasets: Datasets, parallel_state: ParallelState
) -> tuple[list[int], list[int], list[int]]:
    """Number, token and index of every sample that 8 steps read."""
    partition = BatchPartition(1, 4 // parallel_state.dp_size, parallel_state.dp_rank, parallel_state.dp_size)
    sampler = SequentialSampler(len(datasets.train), 0, partition)
    loader = BatchLoader(datasets.train, sampler, partition, SEQUENCE, parallel_state, VOCAB + 1, num_workers=0)
    batches = [loader.next_batch() for _ in range(8)]
    for batch in batches:
        assert torch.equal(batch.tokens, batch.tokens[:, :1].expand(-1, SEQUENCE)) and batch.loss_mask.all()
        assert torch.equal(batch.labels, batch.tokens) and batch.position_ids[0].tolist() == list(range(SEQUENCE))
    return (
        torch.cat([batch.source for batch in batches]).tolist(),
        torch.cat([batch.tokens[:, 0] for batch in batches]).tolist(),
        torch.cat([batch.index for batch in batches]).tolist(),
    )


@pytest.mark.parametrize("weights", [None, (3, 1, 4)])
def test_the_source_of_a_sample_is_the_dataset_that_its_tokens_are_from(
    weights: tuple[int, ...] | None, tmp_path: Path
) -> None:
    prefixes = [write(tmp_path, name, token, 16) for name, token in (("a", 10), ("b", 20), ("c", 30))]
    words = (
        prefixes if weights is None else [str(word) for pair in zip(weights, prefixes, strict=True) for word in pair]
    )
    flags = ["--dwm-mode", "off", "--train-data-path", *words]
    parts = with_datasets(sources, flags, world_size=2)
    seen = {source for part in parts for source in part[0]}
    assert seen == {0, 1, 2}
    for source, token, _ in parts:
        assert [10 * (number + 1) for number in source] == token
    assert sorted(index for part in parts for index in part[2]) == list(range(32))
    if weights is not None:
        assert [sum(part[0].count(number) for part in parts) for number in range(3)] == [12, 4, 16]


def test_a_single_dataset_is_source_0(tmp_path: Path) -> None:
    flags = ["--dwm-mode", "off", "--train-data-path", write(tmp_path, "a", 10, 40)]
    ((source, token, _),) = with_datasets(sources, flags)
    assert source == [0] * 32 and token == [10] * 32


@pytest.mark.parametrize(
    ("flags", "there"),
    [
        (["--data-path", "{a}", "--split", "8,1,1"], [True, True, True]),
        (["--data-path", "{a}"], [True, True, False]),  # 969, 30, 1 of 40 documents
        (["--data-path", "{a}", "--split", "1,0,0"], [True, False, False]),
        (["--data-path", "{a}", "--split", "1,1,1", "--eval-iters", "0"], [True, False, False]),
        (["--data-path", "{a}", "--split", "0,1,1"], [False, True, True]),
        (["--data-path", "{a}", "{b}", "--split", "8,1,1"], [True, True, True]),
        (["--data-path", "{a}", "{b}"], [True, True, False]),
        (["--data-path", "0.5", "{a}", "0.5", "{b}"], [True, True, False]),
        (["--data-path", "0.5", "{a}", "0.5", "{b}", "--eval-iters", "0"], [True, False, False]),
        (["--train-data-path", "{a}", "--valid-data-path", "{b}"], [True, True, False]),
        (["--train-data-path", "{a}", "--valid-data-path", "{b}", "--eval-iters", "0"], [True, False, False]),
        (["--mock-data"], [True, True, True]),
        (["--mock-data", "--eval-iters", "0"], [True, False, False]),
    ],
)
def test_a_part_that_is_empty_or_not_asked_for_is_none(flags: list[str], there: list[bool], tmp_path: Path) -> None:
    a, b = write(tmp_path, "a", 10, 40), write(tmp_path, "b", 20, 40)
    ((*parts, target),) = with_datasets(lengths, ["--dwm-mode", "off", *(flag.format(a=a, b=b) for flag in flags)])
    assert [part is not None for part in parts] == there
    assert target is None


@pytest.mark.parametrize(
    ("target", "size"),
    [
        (["{a}"], 44),  # 40 documents of 9 tokens, of which a sample takes 8 and looks at one more: (360 - 1) // 8
        (["{a}", "{b}"], 44 + 11),
        (["2", "{a}"], 44),
        (["3", "{a}", "1", "{b}"], 45 + 15),  # 44 are 3 of 4 of 59; megatron-core rounds each up
        (["1", "{a}", "1", "{b}"], 88),  # as many of b, read four times
    ],
)
def test_a_target_set_holds_each_of_its_datasets(target: list[str], size: int, tmp_path: Path) -> None:
    train, a, b = write(tmp_path, "train", 1, 40), write(tmp_path, "a", 10, 40), write(tmp_path, "b", 20, 10)
    words = [word.format(a=a, b=b) for word in target]
    ((*_, length),) = with_datasets(lengths, ["--train-data-path", train, "--dwm-target-data-path", *words])
    assert length == size


def test_a_target_set_smaller_than_a_step_is_read_over_and_over(tmp_path: Path) -> None:
    """3 samples, 4 a step."""

    def read(config: RunConfig, datasets: Datasets, parallel_state: ParallelState) -> list[list[int]]:
        partition = BatchPartition(1, 4, 0, 1)
        sampler = ShuffledSampler(len(datasets.target), 0, partition, config.training.seed)
        loader = BatchLoader(datasets.target, sampler, partition, SEQUENCE, parallel_state, VOCAB + 1, num_workers=0)
        return [loader.next_batch().index.tolist() for _ in range(3)]

    train, target = write(tmp_path, "train", 1, 40), write(tmp_path, "target", 10, 3)
    (steps,) = with_datasets(read, ["--train-data-path", train, "--dwm-target-data-path", target])
    assert sorted(chain.from_iterable(steps)) == sorted([0, 1, 2] * 4)
