"""What the card of an exported weighter says of its run, and checkpoints whose weighter is damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dwm.cli.export_weighter import ExportWeighterConfig, main, measured_effect
from megatron_dwm.errors import UserError
from tests.paths import FIXTURES


def write_run(folder: Path, evaluations: dict[int, float]) -> Path:
    """A run of 4 iterations whose share of the source <a> grows."""
    folder.mkdir()
    lines = []
    for iteration in range(1, 5):
        shares = {"<a>": iteration / 4, "b": 1 - iteration / 4}
        step = {"kind": "train", "iteration": iteration, "lm_loss": 1.0, "stage": 1, "share_by_source": shares}
        step |= {"weight_by_source": {"<a>": 1.0, "b": 1.0}, "effective_sample_size": 1 - iteration / 10}
        step["seconds"] = 1.0
        lines.append(step)
        if iteration in evaluations:
            loss = evaluations[iteration]
            lines.append({"kind": "evaluation", "iteration": iteration, "split": "valid", "lm_loss": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_results_of_an_earlier_checkpoint_are_not_those_of_the_whole_run(tmp_path: Path):
    run, uniform = write_run(tmp_path / "run", {2: 2.0, 4: 1.0}), write_run(tmp_path / "uniform", {2: 2.5, 4: 0.5})
    config = ExportWeighterConfig(load=str(run), output=str(tmp_path / "out"), baseline=str(uniform))
    early, late = measured_effect(config, 2), measured_effect(config, 4)
    assert "loss 2.000 with weighting and 2.500 with uniform weights (-0.500)" in early
    assert "Loss of 2.0000 at iteration 2" in early and "size at iteration 2: 0.80" in early
    assert "over 2 iterations: `<a>` 0.375, `b` 0.625" in early
    assert "loss 1.000 with weighting and 0.500 with uniform weights (+0.500)" in late
    assert "Loss of 1.0000 at iteration 4" in late and "over 4 iterations: `<a>` 0.625" in late


def test_a_baseline_without_an_evaluation_until_then_is_one_line(tmp_path: Path):
    run, uniform = write_run(tmp_path / "run", {2: 2.0}), write_run(tmp_path / "uniform", {4: 2.0})
    config = ExportWeighterConfig(load=str(run), output=str(tmp_path / "out"), baseline=str(uniform))
    with pytest.raises(UserError, match="--baseline: a run without evaluations"):
        measured_effect(config, 2)


@pytest.mark.parametrize(("name", "value"), [("weighter_config", "{"), ("weighter_config", 3), ("weighter", {})])
def test_a_weighter_that_does_not_load_is_one_line(
    name: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.unpack_archive(FIXTURES / "first_format" / "save.tar.xz", tmp_path / "save")
    path = tmp_path / "save" / "iter_0000006" / "dwm_state.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {name: value or {"score.weight": torch.ones(3)}}, path)
    with pytest.raises(SystemExit) as end:
        main(["--load", str(tmp_path / "save"), "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1, error
    assert error.startswith(f"error: --load {tmp_path / 'save'}: iter_0000006 is damaged: ")
