"""The quickstart, as a newcomer runs it, at a smaller size."""

from __future__ import annotations

import math
import os
import subprocess
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megatron_dwm.analysis.records import read_run
from tests.paths import ROOT
from tests.turns import turn

ITERATIONS = 48


def quickstart(folder: Path) -> str:
    environment = {**os.environ, "ITERATIONS": str(ITERATIONS)}
    command = ["bash", str(ROOT / "examples" / "quickstart.sh"), str(folder)]
    with turn(4):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_quickstart_trains_learns_whom_to_trust_and_is_not_redone(tmp_path: Path):
    folder = tmp_path / "quickstart"
    output = quickstart(folder)
    name = f"iter_{ITERATIONS:07d}"
    for made in (f"checkpoints/{name}", f"checkpoints/weighter/{name}", "checkpoints/metrics.jsonl", "run.png"):
        assert (folder / made).exists() and str(folder / made) in output, made
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")

    run = read_run(folder / "checkpoints")
    assert len(run.steps) == ITERATIONS and set(run.sources) == {"prose", "code", "comments", "shuffled"}
    valid = [record["lm_loss"] for record in run.evaluated("valid")]
    assert valid[-1] < math.log(1024) - 1  # the loss of guessing among the vocabulary is its logarithm
    last = [step["weight_by_source"] for step in run.steps[-ITERATIONS // 4 :]]
    mean = {source: sum(weights[source] for weights in last) / len(last) for source in ("prose", "shuffled")}
    assert mean["shuffled"] < mean["prose"], mean

    weighter = folder / "checkpoints" / "weighter" / name
    model = AutoModelForSequenceClassification.from_pretrained(weighter)
    ids = AutoTokenizer.from_pretrained(weighter)("The quick brown fox", return_tensors="pt").input_ids
    assert model(input_ids=ids).logits.shape == torch.Size([1, 1])

    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "run.png"}
    assert quickstart(folder).count("already done") == 5
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
