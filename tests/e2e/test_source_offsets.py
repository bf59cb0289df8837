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


def learned_anew(updates: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the offsets after each update, from the recorded scores, alignments and sources alone."""
    again, found = SourceOffsets(WeightingConfig(), SOURCES), []
    for update in updates:
        samples = update["samples"]
        source = torch.tensor([SOURCES.index(name) for name in samples["source"]])
        columns = (torch.tensor(samples[name], dtype=torch.float64) for name in ("score", "alignment"))
        again.learn(source, *columns)
        found.append(again.by_source())
    return found


def test_offsets_are_learned_and_added_in_every_layout(run: dict[str, Any], tmp_path: Path):
    """Recorded scores that did not contain the last update's offsets would not give the next ones."""
    # Replicas draw their own dropout, and the default number of target samples depends on theirs.
    same = {"--hidden-dropout": 0, "--attention-dropout": 0, "--dwm-target-batch-size": 8}
    layouts = {"single": {}, "dp2": {}, "tp2": {"--tensor-model-parallel-size": 2, "--sequence-parallel": True}}
    for name, layout in layouts.items():
        flags = {**run, **OFFSETS, **same, **layout, "--save": tmp_path / name}
        finished = succeed(tmp_path / "log", 1 if name == "single" else 2, flags)
        anew = learned_anew(records(tmp_path / name / "metrics.jsonl", "outer_update"))
        for recorded, again in zip(offsets(tmp_path / name), anew, strict=True):
            assert recorded == pytest.approx(again, abs=NO_ERROR)
        assert len(anew) == 6 and anew[-1]["good"] > 0 > anew[-1]["bad"]
        assert f"| offset good: {anew[-1]['good']:.4g} | " in finished.text
    for one, two in zip(offsets(tmp_path / "single"), offsets(tmp_path / "dp2"), strict=True):
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
    card = (tmp_path / "parts" / "weighter" / "iter_0000012" / "README.md").read_text()
    assert "* Offsets by source: added to the scores in its run, but not part of this weighter\n" in card


def test_offsets_that_begin_or_end_with_a_resumed_run_are_said(run: dict[str, Any], tmp_path: Path):
    save = {"--save": tmp_path, "--load": tmp_path}
    succeed(tmp_path / "log", 1, {**run, "--save": tmp_path, "--exit-interval": 3})
    begun = succeed(tmp_path / "log", 1, {**run, **save, **OFFSETS, "--exit-interval": 6})
    assert " > the checkpoint holds no offsets of sources: they start at 0\n" in begun.output[0]
    ended = succeed(tmp_path / "log", 1, {**run, **save, "--exit-interval": 9})
    assert "the checkpoint's offsets of sources are not used, and not saved again" in ended.text
    assert "offsets of sources" not in succeed(tmp_path / "log", 1, {**run, **save}).text
    assert "Offsets by source" not in (tmp_path / "weighter" / "iter_0000012" / "README.md").read_text()


def test_one_source_is_refused_before_the_start(run: dict[str, Any], tmp_path: Path):
    flags = {**run, **OFFSETS, "--train-data-path": run["--train-data-path"][1]}
    finished = pretrain(tmp_path / "log", 2, flags | {"--dwm-warmup-iters": 4})
    assert_one_line(finished, "--dwm-source-offsets: the training data has one source, good", "several datasets")
    assert "iteration        1/" not in finished.text
