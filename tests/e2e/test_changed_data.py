"""Data, batch size or length that change between two starts of a run: nothing is lost or repeated without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.e2e.datasets import TOKENIZER, VOCAB_SIZE, counting, make_dataset
from tests.e2e.launch import pretrain, records, succeed
from tests.small_runs import LANGUAGE_MODEL, TRAINING

ANOTHER_ORDER = "warning: the training samples come in another order than before the checkpoint"


def flags_of(train: str, **changes: Any) -> dict[str, Any]:
    flags = {**LANGUAGE_MODEL, **TRAINING, **TOKENIZER, "--train-iters": 6, "--dwm-mode": "off", "--eval-iters": 0}
    # A schedule counted in other samples is refused otherwise.
    flags["--override-opt_param-scheduler"] = True
    changed = {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return {**flags, "--train-data-path": train.split(" "), **changed}


def test_data_that_changed_under_its_prefix_is_read_anew(tmp_path: Path) -> None:
    def losses(data: Path, run: str) -> list[float]:
        flags = flags_of(f"{data}/train_text_document", metrics_jsonl=tmp_path / run / "m.jsonl")
        succeed(tmp_path / run, 1, flags)
        return [record["lm_loss"] for record in records(tmp_path / run / "m.jsonl", "train")]

    for name in ("changed", "fresh"):
        (tmp_path / name).mkdir()
    make_dataset(tmp_path / "changed", "train", counting(0, documents=60))
    before = losses(tmp_path / "changed", "before")
    for folder in ("changed", "fresh"):
        make_dataset(tmp_path / folder, "train", counting(1, documents=20))
    after = losses(tmp_path / "changed", "after")
    assert after == losses(tmp_path / "fresh", "fresh")
    assert after != before


def test_a_run_resumed_with_other_flags_reads_to_its_end_and_says_what_changed(tmp_path: Path) -> None:
    train = make_dataset(tmp_path, "train", counting(0, documents=40, length=30))  # 61 samples an epoch
    more = make_dataset(tmp_path, "more", counting(1))
    save = tmp_path / "save"
    succeed(tmp_path / "first", 1, flags_of(train, save=save, exit_interval=4))

    # 32 samples were read in batches of 8; with two batches of 4 the run reads 40, where 6 batches of 4 are 24.
    smaller = succeed(tmp_path / "smaller", 1, flags_of(train, load=save, global_batch_size=4))
    assert ANOTHER_ORDER not in smaller.text

    longer = succeed(tmp_path / "longer", 2, flags_of(train, load=save, train_iters=10, global_batch_size=16))
    assert longer.text.count(ANOTHER_ORDER) == 1 and f" of {train}, not 1 epoch)" in longer.text

    blended = succeed(tmp_path / "blended", 1, flags_of(f"1 {train} 1 {more}", load=save))
    assert f"{ANOTHER_ORDER} (training data 1 {train} 1 {more} instead of {train})" in blended.text
    assert ANOTHER_ORDER not in succeed(tmp_path / "same", 1, flags_of(train, load=save)).text


def test_a_run_without_evaluation_takes_a_blend_with_a_dataset_of_one_document(tmp_path: Path) -> None:
    large = make_dataset(tmp_path, "large", counting(0))
    small = make_dataset(tmp_path, "small", counting(1, documents=1))
    flags = {**flags_of(""), "--train-data-path": False, "--data-path": ["3", large, "1", small], "--split": "9,1,0"}
    succeed(tmp_path / "run", 1, flags)
    refused = pretrain(tmp_path / "refused", 1, {**flags, "--eval-iters": 1})
    assert refused.codes == [2] and f"{small}: the validation part of --split 9,1,0 has 0 tokens" in refused.text


def test_data_of_which_no_loss_counts_is_refused_on_every_rank(tmp_path: Path) -> None:
    train = make_dataset(tmp_path, "train", [[VOCAB_SIZE] * 100] * 10, vocab_size=VOCAB_SIZE + 1)
    flags = flags_of(train)
    succeed(tmp_path / "counts", 1, flags)
    refused = pretrain(tmp_path / "masked", 2, {**flags, "--eod-mask-loss": True})
    assert refused.codes == [2, 2]
    (line,) = [line for line in refused.text.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: the training data has no token whose loss counts in ")
