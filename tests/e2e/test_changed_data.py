"""Data that is preprocessed again under the same prefix is read anew, not through the old index cache."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.datasets import TOKENIZER, counting, make_dataset
from tests.e2e.launch import LANGUAGE_MODEL, TRAINING, records, succeed


def test_data_that_changed_under_its_prefix_is_read_anew(tmp_path: Path):
    def losses(data: Path, run: str) -> list[float]:
        flags = {**LANGUAGE_MODEL, **TRAINING, **TOKENIZER, "--train-iters": 6, "--dwm-mode": "off"}
        flags |= {"--train-data-path": data / "train_text_document", "--metrics-jsonl": tmp_path / run / "m.jsonl"}
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
