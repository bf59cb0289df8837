"""Offsets of scores by source (``--dwm-source-offsets``) in runs: learned, added, saved, and named if they change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.weighting.bilevel.source_offsets import SourceOffsets
from tests.e2e.datasets import TOKENIZER, counting, make_dataset, noise
from tests.e2e.launch import assert_one_line, pretrain, records, succeed
from tests.small_runs import LANGUAGE_MODEL, TRAINING

OFFSETS = {"--dwm-source-offsets": True}
NO_ERROR = 1e-12
"""Offsets are computed anew from recorded scores, which are those of the run."""
ROUNDING = 1e-4
"""Alignments in fp32 are sums in another order."""
SOURCES = ["good", "bad"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The flags of a run on two sources, one of them like the target."""
    folder = tmp_path_factory.mktemp("data")
    good, bad = make_dataset(folder, "good", counting(1)), make_dataset(folder, "bad", noise(2))
    return {
        **LANGUAGE_MODEL,
        **TRAINING,
        **TOKENIZER,
        "--train-data-path": ["0.5", good, "0.5", bad],
        "--dwm-target-data-path": make_dataset(folder, "target", counting(3)),
        "--train-iters": 12,
        "--dwm-update-interval": 2,
        "--dwm-num-stages": 1,
    }


def offsets(folder: Path) -> list[dict[str, float]]:
    return [update["offset_by_source"] for update in records(folder / "metrics.jsonl", "outer_update")]


@pytest.mark.parametrize(
    ("processes", "layout"),
    [(1, {}), (2, {}), (2, {"--tensor-model-parallel-size": 2, "--sequence-parallel": True})],
    ids=["single", "dp2", "tp2"],
)
def test_offsets_are_learned_from_the_recorded_scores_and_added(
    processes: int, layout: dict[str, Any], run: dict[str, Any], tmp_path: Path
):
    """Scores that did not contain the last update's offsets would not give the next ones."""
    flags = {**run, **OFFSETS, **layout, "--metrics-jsonl": tmp_path / "metrics.jsonl"}
    finished = succeed(tmp_path / "log", processes, flags)
    updates, again = records(tmp_path / "metrics.jsonl", "outer_update"), SourceOffsets(WeightingConfig(), SOURCES)
    for update in updates:
        samples = update["samples"]
        source = torch.tensor([SOURCES.index(name) for name in samples["source"]])
        columns = (torch.tensor(samples[name], dtype=torch.float64) for name in ("score", "alignment"))
        again.learn(source, *columns)
        assert update["offset_by_source"] == pytest.approx(again.by_source(), abs=NO_ERROR)
    assert len(updates) == 6 and again.by_source()["good"] > 0 > again.by_source()["bad"]
    assert f"| offset good: {again.by_source()['good']:.4g} | " in finished.text


def test_replicas_learn_the_offsets_of_one_process(run: dict[str, Any], tmp_path: Path):
    # Replicas draw their own dropout, and the default number of target samples depends on theirs.
    same = {"--hidden-dropout": 0, "--attention-dropout": 0, "--dwm-target-batch-size": 8}
    for processes in (1, 2):
        succeed(tmp_path / "log", processes, {**run, **OFFSETS, **same, "--save": tmp_path / str(processes)})
    for one, two in zip(offsets(tmp_path / "1"), offsets(tmp_path / "2"), strict=True):
        assert one == pytest.approx(two, abs=ROUNDING)


def test_a_resumed_run_continues_with_them(run: dict[str, Any], tmp_path: Path):
    parts = {**run, **OFFSETS, "--save": tmp_path / "parts"}
    succeed(tmp_path / "log", 1, {**run, **OFFSETS, "--save": tmp_path / "whole"})
    succeed(tmp_path / "log", 1, {**parts, "--exit-interval": 5})
    succeed(tmp_path / "log", 1, {**parts, "--load": tmp_path / "parts"})
    assert offsets(tmp_path / "parts") == offsets(tmp_path / "whole") and len(offsets(tmp_path / "whole")) == 6
    losses = [
        [step["lm_loss"] for step in records(tmp_path / name / "metrics.jsonl", "train")] for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def test_offsets_that_begin_or_end_with_a_resumed_run_are_said(run: dict[str, Any], tmp_path: Path):
    save = {"--save": tmp_path, "--load": tmp_path}
    succeed(tmp_path / "log", 1, {**run, "--save": tmp_path, "--exit-interval": 3})
    begun = succeed(tmp_path / "log", 1, {**run, **save, **OFFSETS, "--exit-interval": 6})
    assert " > the checkpoint holds no offsets of sources: they start at 0\n" in begun.output[0]
    ended = succeed(tmp_path / "log", 1, {**run, **save, "--exit-interval": 9})
    assert "the checkpoint's offsets of sources are not used, and not saved again" in ended.text
    assert "offsets of sources" not in succeed(tmp_path / "log", 1, {**run, **save}).text


def test_one_source_is_refused_before_the_start(run: dict[str, Any], tmp_path: Path):
    flags = {**run, **OFFSETS, "--train-data-path": run["--train-data-path"][1]}
    finished = pretrain(tmp_path / "log", 2, flags | {"--dwm-warmup-iters": 4})
    assert_one_line(finished, "--dwm-source-offsets: the training data has one source, good", "several datasets")
    assert "iteration        1/" not in finished.text
