"""When a resumed run reads its training samples in another order, it is said; when it does not, it is not."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core import parallel_state as mpu

from megatron_dwm.config.data import DataConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.data.blend import data_paths
from megatron_dwm.data.datasets import Consumed, SplitSizes, build_datasets, samples_read, split_sizes
from megatron_dwm.data.sample_order import order_change
from megatron_dwm.data.tokenizers import build_tokenizer
from megatron_dwm.runtime.process_groups import current_parallel_state
from tests.distributed.harness import run_distributed
from tests.unit.data.made_data import write_dataset

SEQUENCE = 8
CONSUMED = Consumed(iteration=1, train_samples=4)
TOKENIZER = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=1000))


def arguments(**changes: Any) -> dict[str, Any]:
    """The arguments of a run, by Megatron-LM's names."""
    standard = {
        "train_data_path": ["a"],
        "split": None,
        "seq_length": SEQUENCE,
        "seed": 1234,
        "train_iters": 10,
        "train_samples": None,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "data_parallel_size": 1,
        "mid_level_dataset_surplus": 0.005,
        "dataloader_type": None,
        "data_sharding": True,
    }
    return {**standard, **changes}


@pytest.fixture
def prefixes(tmp_path: Path) -> dict[str, str]:
    """Two datasets of 24 and 12 samples an epoch, no two tokens of which are the same."""
    tokens = itertools.count()
    a = [[next(tokens) for _ in range(20)] for _ in range(10)]
    b = [[next(tokens) for _ in range(10)] for _ in range(10)]
    return {name: write_dataset(tmp_path, name, documents) for name, documents in (("a", a), ("b", b))}


def orders(flags: dict[str, Any], sizes: list[int]) -> list[list[list[int]]]:
    """The training samples of datasets of these sizes, as megatron-core builds them."""

    def on_rank() -> list[list[list[int]]]:
        mpu.initialize_model_parallel()
        data = DataConfig(**flags)
        built = []
        for size in sizes:
            train = build_datasets(
                data,
                data_paths(data, None),
                SplitSizes(size, 0, 0),
                TOKENIZER,
                current_parallel_state(),
                sequence=SEQUENCE,
                seed=1234,
                target_batch_size=None,
            ).train
            assert train is not None
            built.append([train[index]["tokens"].tolist() for index in range(size)])
        return built

    return run_distributed(on_rank, 1)[0]


@pytest.mark.parametrize(
    "words",
    [
        {"train_data_path": ["{a}"]},
        {"train_data_path": ["2", "{a}"]},
        {"train_data_path": ["1", "{a}", "1", "{b}"]},
        {"train_data_path": ["1", "{a}", "3", "{b}"], "mid_level_dataset_surplus": 0.3},
        {"data_path": ["{a}"], "split": "8,1,1"},
        {"data_path": ["2", "{a}"], "split": "1,0,0", "mid_level_dataset_surplus": 0.5},
        {"data_path": ["1", "{a}", "2", "{b}"], "split": "7,2,1"},
    ],
)
def test_a_change_is_said_exactly_when_megatron_core_shuffles_otherwise(
    words: dict[str, Any], prefixes: dict[str, str]
) -> None:
    flags = {
        name: [word.format(**prefixes) for word in value] if isinstance(value, list) else value
        for name, value in words.items()
    }
    sizes = [8, 16, 24, 25, 28, 32, 40, 44, 48, 52, 60, 72, 76]
    # A blend of --data-path has a validation part too, which is not read here.
    built = dict(zip(sizes, orders({"eval_iters": 0, **flags}, sizes), strict=True))
    said = 0
    for old, new in itertools.combinations(sizes, 2):
        saved, present = (
            arguments(**{"train_data_path": None, **flags}, train_samples=size, train_iters=1) for size in (old, new)
        )
        change = order_change(saved, present, Consumed(1, 1, 0))
        assert (change is None) == (built[new][:old] == built[old]), (old, new, change)
        said += change is not None
    assert 0 < said < len(sizes) * (len(sizes) - 1) // 2


def test_the_line_names_what_changed_and_where_reading_goes_on(prefixes: dict[str, str]) -> None:
    a, b = prefixes["a"], prefixes["b"]
    saved = arguments(train_data_path=[a])
    change = order_change(saved, arguments(train_data_path=["1", a, "2", b], seed=7), CONSUMED)
    assert change is not None and "\n" not in change
    assert f"training data 1 {a} 2 {b} instead of {a}" in change and "--seed 7 instead of 1234" in change
    assert "the first 4 samples of the new order are left out" in change
    change = order_change(saved, arguments(train_data_path=[a], train_iters=20), CONSUMED)
    assert (
        change is not None
        and f"80 samples instead of 40 make 4 epochs (the last shuffled separately) of {a}, not 2 epochs" in change
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"seq_length": 16},
        {"seed": 1},
        {"dataloader_type": "cyclic"},
        {"train_data_path": ["{b}"]},
        {"train_data_path": None, "data_path": ["{a}"], "split": "9,1,0"},
    ],
)
def test_whatever_the_order_follows_from_is_compared(changes: dict[str, Any], prefixes: dict[str, str]) -> None:
    changed = {
        name: [word.format(**prefixes) for word in value] if isinstance(value, list) else value
        for name, value in changes.items()
    }
    saved = arguments(train_data_path=[prefixes["a"]], train_iters=2)
    assert order_change(saved, saved, CONSUMED) is None
    assert order_change(saved, {**saved, **changed}, CONSUMED) is not None
    assert order_change(saved, {**saved, **changed}, Consumed()) is None  # nothing was read yet
    same = {"global_batch_size": 2, "micro_batch_size": 1, "data_parallel_size": 2, "dataloader_type": "single"}
    assert order_change(saved, {**saved, **same}, CONSUMED) is None


@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"data_parallel_size": 2}, {"data_sharding": False}])
def test_a_cyclic_order_also_follows_from_the_microbatches(changes: dict[str, Any], prefixes: dict[str, str]) -> None:
    saved = arguments(train_data_path=[prefixes["a"]], dataloader_type="cyclic")
    assert order_change(saved, saved, CONSUMED) is None
    assert order_change(saved, {**saved, **changes}, CONSUMED) is not None


@pytest.mark.parametrize(
    "saved", [{}, {"data_path": 3, "seq_length": SEQUENCE}, {"data_args_path": "/nowhere"}, {"train_iters": None}]
)
def test_arguments_of_another_program_are_no_obstacle(saved: dict[str, Any], prefixes: dict[str, str]) -> None:
    assert order_change(saved, arguments(train_data_path=[prefixes["a"]]), CONSUMED) is None


DATA = DataConfig(mock_data=True, eval_iters=2, eval_interval=4)


def test_a_run_without_interruption_has_megatron_lms_sizes() -> None:
    assert split_sizes(DATA, 10, None, 8) == SplitSizes(80, 3 * 2 * 8, 2 * 8) == samples_read(DATA, 10, 8)
    assert split_sizes(DATA, 10, 83, 8).train == 83


@pytest.mark.parametrize("batches", [[8, 4], [8, 16], [8, 2, 16, 4]])
def test_sizes_reach_to_the_end_of_a_run_and_stay_the_same_until_a_flag_changes(batches: list[int]) -> None:
    """The run's batch size changes every third iteration; it is resumed at each one."""
    iterations, consumed, sizes = 3 * len(batches), Consumed(), []
    for iteration in range(iterations):
        batch = batches[iteration // 3]
        sizes.append(split_sizes(DATA, iterations, None, batch, consumed))
        read = samples_read(DATA, iterations, batch, consumed)
        assert sizes[-1].train >= read.train == consumed.train_samples + (iterations - iteration) * batch
        evaluated = 2 * batch if (iteration + 1) % 4 == 0 else 0
        consumed = Consumed(iteration + 1, consumed.train_samples + batch, consumed.valid_samples + evaluated)
        assert consumed.train_samples <= sizes[-1].train and consumed.valid_samples <= sizes[-1].valid
    for number in range(len(batches)):
        assert len({size.train for size in sizes[3 * number : 3 * number + 3]}) == 1
    assert consumed.train_samples == sum(np.repeat(batches, 3))


def test_a_run_that_has_more_iterations_already_reads_one_more_evaluation() -> None:
    read = samples_read(DATA, 3, 8, Consumed(9, 72, 2 * 2 * 8))
    assert read == SplitSizes(72, 3 * 2 * 8, 2 * 8)


def test_evaluations_have_batches_of_their_own_and_a_first_iteration() -> None:
    data = DataConfig(mock_data=True, eval_iters=2, eval_interval=4, eval_global_batch_size=3, start_eval_at_iter=8)
    assert [n for n in range(1, 18) if data.evaluations(n - 1, n)] == [8, 12, 16]
    assert split_sizes(data, 17, None, 8) == SplitSizes(17 * 8, 4 * 2 * 3, 2 * 3) == samples_read(data, 17, 8)
    read = samples_read(data, 17, 8, Consumed(9, 72, 2 * 3))
    assert read == samples_read(data, 17, 8)


def test_a_run_that_reads_no_evaluation_data_has_none() -> None:
    data = DataConfig(mock_data=True, eval_iters=0)
    assert split_sizes(data, 10, None, 8, Consumed(5, 40, 16)) == SplitSizes(80, 0, 0)
