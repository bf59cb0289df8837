"""The flags that name data, the datasets built of it, and the batches that each rank reads of them."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_dwm.config.data import DataConfig
from megatron_dwm.config.run import RunConfig, parse_run
from megatron_dwm.data.batch import Batch
from megatron_dwm.data.datasets import (
    BatchLoader,
    DataPaths,
    Datasets,
    build_datasets,
    data_paths,
    parse_blend,
    sequence_lengths,
    sequential_or_cyclic,
    short_names,
    shuffled,
    split_parts,
)
from megatron_dwm.data.sampler import BatchPartition, SequentialSampler
from megatron_dwm.data.tokenizers import build_tokenizer
from megatron_dwm.errors import UserError
from megatron_dwm.runtime.device import select_device
from megatron_dwm.runtime.process_groups import ParallelState, current_parallel_state
from tests.distributed import tiny
from tests.distributed.harness import run_distributed
from tests.distributed.tiny import ParallelConfig


@pytest.mark.parametrize(
    ("words", "blend"),
    [
        (None, None),
        ([], None),
        (["a"], (["a"], None)),
        (["a", "b", "c"], (["a", "b", "c"], None)),
        (["0.3", "a", "0.7", "b"], (["a", "b"], [0.3, 0.7])),
        (["2", "a"], (["a"], [2.0])),
    ],
)
def test_a_blend_is_prefixes_or_weights_and_prefixes(words: Any, blend: Any) -> None:
    assert parse_blend("--data-path", words) == blend


@pytest.mark.parametrize("words", [["0.3", "a", "0.7"], ["0.3", "a", "b"], ["a", "0.5", "b", "0.5"]])
def test_a_blend_that_does_not_alternate_is_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"--data-path .* must alternate"):
        parse_blend("--data-path", words)


@pytest.mark.parametrize("weight", ["0", "-0.5", "nan", "inf"])
def test_a_weight_that_is_no_positive_number_is_refused(weight: str) -> None:
    with pytest.raises(UserError, match=rf"--data-path: the weight {weight} is no positive number"):
        parse_blend("--data-path", ["1", "a", weight, "b"])


def test_sources_are_named_by_their_files_unless_these_are_the_same() -> None:
    assert short_names(["/x/prose_text_document", "/x/code_text_document"]) == ["prose", "code"]
    assert short_names(["/x/a_text_document", "/y/a_text_document"]) == ["/x/a_text_document", "/y/a_text_document"]


def test_paths_are_read_from_files(tmp_path: Path) -> None:
    shared = tmp_path / "blend.txt"
    shared.write_text("0.5 a\n0.5 b\n")
    assert data_paths(DataConfig(data_args_path=str(shared)), ["t"]) == DataPaths(
        shared=(["a", "b"], [0.5, 0.5]), per_split=(None, None, None), target=(["t"], None), split="969, 30, 1"
    )
    per_split = tmp_path / "blend.json"
    per_split.write_text(json.dumps({"train": ["a"], "valid": ["1", "b", 2, "c"]}))
    paths = data_paths(DataConfig(per_split_data_args_path=str(per_split)), None)
    assert paths.per_split == ((["a"], None), (["b", "c"], [1.0, 2.0]), None)


@pytest.mark.parametrize("content", [b"not json", b"[1, 2]", b'{"train": "abc"}', b"\xff\xfe"])
def test_a_damaged_file_of_paths_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "blend.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"--per-split-data-args-path .*blend\.json"):
        data_paths(DataConfig(per_split_data_args_path=str(path)), None)


@pytest.mark.parametrize("name", ["nothing", "folder", "binary"])
def test_an_unreadable_file_of_paths_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=rf"--data-args-path {tmp_path / name}: cannot be read"):
        data_paths(DataConfig(data_args_path=str(tmp_path / name)), None)


def test_evaluation_data_alone_is_refused() -> None:
    with pytest.raises(UserError, match="--train-data-path is missing"):
        data_paths(DataConfig(valid_data_path=["a"]), None)


@pytest.mark.parametrize("split", ["969, 30, 1", "100,0,0", "0.9,0.1", "1", ".5/.5", "98 1 1"])
def test_a_split_is_up_to_three_numbers(split: str) -> None:
    assert data_paths(DataConfig(data_path=["a"], split=split), None).split == split


@pytest.mark.parametrize("split", ["", "abc", "1,1,1,1", "0,0,0", "-1,2", "1,,2", "90%,10%"])
def test_a_split_that_is_none_is_refused(split: str) -> None:
    with pytest.raises(UserError, match=r"--split .*: not up to three numbers"):
        data_paths(DataConfig(data_path=["a"], split=split), None)


def test_parts_of_a_dataset_follow_each_other() -> None:
    assert split_parts("969, 30, 1", 1000) == [slice(0, 969), slice(969, 999), slice(999, 1000)]
    assert split_parts("1,0,1", 10) == [slice(0, 5), slice(0, 0), slice(5, 10)]


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"data_path": ["a"], "train_data_path": ["b"]},
        {"data_path": ["a"], "mock_data": True},
        {"per_split_data_args_path": "x", "valid_data_path": ["b"]},
    ],
)
def test_data_named_in_no_way_or_in_two_ways_is_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        DataConfig(**flags)


SEQUENCE = 8
VOCAB = 100


def write(folder: Path, name: str, token: int, documents: int, length: int = 9) -> str:
    """Documents of one token, so that a sample tells which dataset it is from."""
    prefix = str(folder / name)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(documents):
        builder.add_document(np.full(length, token), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


def run_config(world_size: int, flags: list[str]) -> RunConfig:
    """Batches of 4 samples, 8 steps, an evaluation of 2 batches every 4."""
    return parse_run(
        [
            *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4"),
            *("--seq-length", str(SEQUENCE), "--max-position-embeddings", str(SEQUENCE), "--lr", "1e-3"),
            *("--micro-batch-size", "1", "--global-batch-size", "4", "--train-iters", "8", "--num-workers", "0"),
            *("--eval-interval", "4", "--eval-iters", "2"),
            *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB)),
            *flags,
        ],
        world_size,
    )


def with_datasets(
    work: Callable[[RunConfig, Datasets, ParallelState], Any],
    flags: list[str],
    world_size: int = 1,
    parallel: ParallelConfig | None = None,
) -> list[Any]:
    """What ``work`` returns on each rank, given the datasets of a run with ``flags``."""
    parallel = parallel or ParallelConfig()

    def on_rank() -> Any:
        tiny.initialize(parallel)
        config = run_config(world_size, flags)
        paths = data_paths(
            config.data, config.weighting.dwm_target_data_path if config.weighting.needs_target else None
        )
        layout = current_parallel_state()
        return work(config, build_datasets(config, paths, build_tokenizer(config.tokenizer), layout), layout)

    return run_distributed(on_rank, world_size)


def lengths(config: RunConfig, datasets: Datasets, layout: ParallelState) -> list[int | None]:
    parts = (datasets.train, datasets.valid, datasets.test, datasets.target)
    return [None if part is None else len(part) for part in parts]


def sources(config: RunConfig, datasets: Datasets, layout: ParallelState) -> tuple[list[int], list[int], list[int]]:
    """Number, token and index of every sample that 8 steps read."""
    share = BatchPartition(1, 4 // layout.dp_size, layout.dp_rank, layout.dp_size)
    sampler = sequential_or_cyclic(config, datasets.train, 0, share)
    reader = BatchLoader(datasets.train, sampler, share, SEQUENCE, layout, VOCAB + 1, config.data.num_workers)
    batches = [reader.next_batch() for _ in range(8)]
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


def test_lengths_outlive_the_index_they_were_read_from(tmp_path: Path) -> None:
    own = sequence_lengths(write(tmp_path, "a", 10, 40))
    assert own.flags.owndata and own.tolist() == [9] * 40


class Counting(torch.utils.data.Dataset):
    """Samples of one token, their own index, except one that is beyond any vocabulary."""

    def __init__(self, total: int, outlier: int | None = None) -> None:
        self.total, self.outlier = total, outlier

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.full((SEQUENCE,), 10**6 if index == self.outlier else index)
        return {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(SEQUENCE), "position_ids": tokens * 0}


def alone(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in a process of its own, which unlike those of ``run_distributed`` may have children."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def on_rank() -> None:
        select_device(0)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        tiny.initialize(ParallelConfig())
        sender.send(work())

    process = context.Process(target=on_rank)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def counting_reader(dataset: Counting, layout: ParallelState, consumed: int = 0, workers: int = 0) -> BatchLoader:
    """Of steps of 8 samples in order."""
    share = BatchPartition(2, 4 // layout.dp_size, layout.dp_rank, layout.dp_size)
    own = dataset if layout.mp_rank == 0 else None
    sampler = SequentialSampler(len(dataset) if own is not None else 0, consumed, share)
    return BatchLoader(own, sampler, share, SEQUENCE, layout, 100, workers)


def samples_of(batch: Batch) -> list[int]:
    assert torch.equal(batch.tokens[:, 0], batch.index)
    return batch.index.tolist()


LAYOUTS = {
    "one": (1, ParallelConfig()),
    "data": (2, ParallelConfig()),
    "tensor": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "tensor, pipeline, data": (
        8,
        ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_of_a_replica_read_the_same_and_all_ranks_end_together(layout: str) -> None:
    """20 samples are two steps; at the third every rank has the same error, and none waits for another."""
    world_size, parallel = LAYOUTS[layout]

    def read() -> tuple[int, list[list[int]], str]:
        tiny.initialize(parallel)
        reader = counting_reader(Counting(20), current_parallel_state())
        steps = [samples_of(reader.next_batch()) for _ in range(2)]
        with pytest.raises(UserError) as raised:
            reader.next_batch()
        return current_parallel_state().dp_rank, steps, str(raised.value)

    results = run_distributed(read, world_size)
    dp_size = world_size // (parallel.tp * parallel.pp)
    expected = {
        1: [[list(range(8)), list(range(8, 16))]],
        2: [[[0, 1, 4, 5], [8, 9, 12, 13]], [[2, 3, 6, 7], [10, 11, 14, 15]]],
    }[dp_size]
    assert sorted({dp_rank for dp_rank, _, _ in results}) == list(range(dp_size))
    for dp_rank, steps, message in results:
        assert steps == expected[dp_rank]
        assert message == "the data ran out; lower --train-iters or --eval-iters, or give more data"


def test_a_token_outside_the_vocabulary_is_an_error_on_every_rank_of_the_replica() -> None:
    def read() -> str:
        tiny.initialize(ParallelConfig(tensor_model_parallel_size=2))
        reader = counting_reader(Counting(20, outlier=11), current_parallel_state())
        reader.next_batch()
        with pytest.raises(UserError) as raised:
            reader.next_batch()
        return str(raised.value)

    for message in run_distributed(read, 2):
        assert message.startswith("token 1000000 in the data is outside the tokenizer's vocabulary of 100;")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_reader_resumes_where_one_stopped(workers: int) -> None:
    def read() -> tuple[list[list[int]], list[list[int]]]:
        layout, dataset = current_parallel_state(), Counting(40)
        whole, resumed = (counting_reader(dataset, layout, consumed, workers) for consumed in (0, 16))
        return [samples_of(whole.next_batch()) for _ in range(5)], [samples_of(resumed.next_batch()) for _ in range(3)]

    whole, resumed = alone(read)
    assert resumed == whole[2:]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reader_leaves_the_random_numbers_of_the_run_alone(workers: int) -> None:
    def read() -> bool:
        before = torch.get_rng_state()
        reader = counting_reader(Counting(40), current_parallel_state(), workers=workers)
        reader.next_batch()
        return torch.equal(before, torch.get_rng_state())

    assert alone(read) is True


def test_a_target_set_smaller_than_a_step_is_read_over_and_over(tmp_path: Path) -> None:
    """3 samples, 4 a step."""

    def read(config: RunConfig, datasets: Datasets, layout: ParallelState) -> list[list[int]]:
        share = BatchPartition(1, 4, 0, 1)
        sampler = shuffled(config, datasets.target, 0, share)
        reader = BatchLoader(datasets.target, sampler, share, SEQUENCE, layout, VOCAB + 1, 0)
        return [reader.next_batch().index.tolist() for _ in range(3)]

    train, target = write(tmp_path, "train", 1, 40), write(tmp_path, "target", 10, 3)
    (steps,) = with_datasets(read, ["--train-data-path", train, "--dwm-target-data-path", target])
    assert sorted(chain.from_iterable(steps)) == sorted([0, 1, 2] * 4)
