"""The benchmark of scoring, at a small size, compared with the speed of the model alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dwm.benchmarks import scoring


def test_the_ratio_is_of_speeds_in_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    corpus = tmp_path / "runs" / "corpus"
    corpus.mkdir(parents=True)
    rows = [json.dumps({"text": f"document {n} has words " * (n % 5 + 1)}) for n in range(12)]
    (corpus / "prose.train.jsonl").write_text("\n".join(rows) + "\n")
    sizes = ["--num-layers", "1", "--hidden-size", "16", "--window", "8", "--documents", "10", "--repeats", "1"]
    scoring.main(["--output", str(tmp_path / "runs"), "--json", str(tmp_path / "out.json"), *sizes])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["documents"] == 10 and found["tokens"] > 100
    best = found["forward_tokens_per_second"][str(found["best_batch_size"])]
    assert best == max(found["forward_tokens_per_second"].values())
    assert 0 < found["ratio"] == found["ratios"][0]
    assert f"{found['ratio']:.2f} of the best of them" in capsys.readouterr().out
