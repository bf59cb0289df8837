"""What is added to megatron-core's GPT dataset."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from megatron.core import parallel_state as mpu

from megatron_dwm.config.data import DataConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.data.blend import data_paths
from megatron_dwm.data.datasets import SplitSizes, build_datasets
from megatron_dwm.data.tokenizers import build_tokenizer
from megatron_dwm.runtime.process_groups import current_parallel_state
from tests.distributed.harness import run_distributed
from tests.unit.data.made_data import write_dataset

SEQUENCE = 8


def test_pad_tokens_of_the_first_sample_are_masked_in_no_other_sample(
    configs: dict[str, TokenizerConfig], tmp_path: Path
) -> None:
    """The dataset alternates between samples of pad tokens and others; in megatron-core all would be masked."""
    tokenizer = build_tokenizer(configs["bpe"])
    assert tokenizer.pad == 3
    documents = [[7] + [3] * SEQUENCE, [7] * SEQUENCE] * 6
    data = DataConfig(train_data_path=[write_dataset(tmp_path, "a", documents)])

    def on_rank() -> list[tuple[list[int], list[float]]]:
        mpu.initialize_model_parallel()
        state = current_parallel_state()
        sizes = SplitSizes(train=10, valid=0, test=0)
        first, second = (
            build_datasets(
                data, data_paths(data, None), sizes, tokenizer, state, sequence=SEQUENCE, seed=1, target_batch_size=None
            ).train
            for _ in range(2)
        )
        assert first is not None and second is not None
        by_pads = sorted(range(len(first)), key=lambda index: -int((first[index]["labels"] == 0).sum()))
        items = [second[index] for index in by_pads]
        return [(item["labels"].tolist(), item["loss_mask"].tolist()) for item in items]

    (items,) = run_distributed(on_rank, 1)
    masked = set()
    for labels, mask in items:
        assert mask == [float(label != 0) for label in labels]  # pad tokens become 0
        masked.add(sum(mask))
    assert len(masked) > 1


@pytest.mark.parametrize("is_allowed", [False, True])
def test_a_pad_token_that_also_ends_documents_is_masked_only_if_the_flag_allows_it(
    is_allowed: bool, configs: dict[str, TokenizerConfig], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "tokenizer"
    padded = AutoTokenizer.from_pretrained(configs["hugging-face"].tokenizer_model)
    padded.pad_token = padded.eos_token
    padded.save_pretrained(folder)
    tokenizer = build_tokenizer(replace(configs["hugging-face"], tokenizer_model=str(folder)))
    assert tokenizer.pad == tokenizer.eod
    prefix = write_dataset(tmp_path, "a", [[7, 8, 9, tokenizer.eod]] * 12)
    data = DataConfig(train_data_path=[prefix], allow_ambiguous_pad_tokens=is_allowed)

    def on_rank() -> list[tuple[list[int], list[float]]]:
        mpu.initialize_model_parallel()
        sizes = SplitSizes(train=4, valid=0, test=0)
        found = build_datasets(
            data,
            data_paths(data, None),
            sizes,
            tokenizer,
            current_parallel_state(),
            sequence=SEQUENCE,
            seed=1,
            target_batch_size=None,
        ).train
        assert found is not None
        return [(found[index]["labels"].tolist(), found[index]["loss_mask"].tolist()) for index in range(4)]

    (items,) = run_distributed(on_rank, 1)
    for labels, mask in items:
        assert labels.count(7) == 2  # every fourth token ends a document
        assert mask.count(0.0) == (2 if is_allowed else 0)
