"""Stages of a run that goes on with another length or other batches: laid out anew, without a second warm-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.e2e.launch import records, succeed
from tests.small_runs import DATA, LANGUAGE_MODEL, TRAINING, WEIGHTING

STOP = 12
"""Of 24 iterations of 4 samples: 8 of warm-up, which is as long as a stage, and two stages."""
RUN: dict[str, Any] = {
    **LANGUAGE_MODEL,
    **TRAINING,
    **DATA,
    **WEIGHTING,
    "--num-layers": 1,
    "--dwm-warmup-iters": False,
    "--train-iters": False,
    "--train-samples": 96,
    "--lr-decay-style": "constant",
    "--lr-warmup-iters": False,
    "--global-batch-size": 4,
    "--eval-iters": 0,
}


def stages(save: Path, since: int) -> dict[int, int]:
    """The stage of each iteration after one."""
    found = records(save / "metrics.jsonl", "train")
    return {record["iteration"]: record["stage"] for record in found if record["iteration"] > since}


def updates(save: Path) -> list[int]:
    return [record["iteration"] for record in records(save / "metrics.jsonl", "outer_update")]


def test_other_batches_and_more_samples_lay_the_stages_out_anew(tmp_path: Path):
    save, place = tmp_path / "save", {"--save": tmp_path / "save", "--load": tmp_path / "save"}
    succeed(tmp_path / "log", 1, RUN | place | {"--exit-interval": STOP})
    assert stages(save, 0) == {n: 0 if n <= 8 else 1 for n in range(1, STOP + 1)} and updates(save) == [10, 12]

    # 48 samples in batches of 8 are 6 more iterations: 18 in all, with stages of 6 after a warm-up of 6.
    larger = {"--global-batch-size": 8}
    succeed(tmp_path / "log", 1, RUN | larger | place | {"--save": tmp_path / "larger"})
    assert stages(tmp_path / "larger", STOP) == dict.fromkeys(range(13, 19), 2)
    assert updates(tmp_path / "larger") == [14, 16, 18]
    assert (tmp_path / "larger" / "weighter" / "iter_0000018").is_dir()

    # A warm-up of 40 iterations of 120 is not made up for: the weighter has begun, and stage 1 follows where it is.
    longer = {"--train-samples": 480, "--exit-interval": 16}
    succeed(tmp_path / "log", 1, RUN | longer | place)
    assert stages(save, STOP) == dict.fromkeys(range(13, 17), 1) and updates(save) == [10, 12, 14, 16]
