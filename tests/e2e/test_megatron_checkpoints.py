"""Checkpoints are Megatron-LM's: either program goes on from the other's, and its flags mean the same.

What Megatron-LM wrote and how it went on was recorded by tests/fixtures/megatron/record_checkpoints.py.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from tests.e2e.launch import pretrain, succeed
from tests.e2e.test_megatron_curves import assert_curves
from tests.e2e.test_uniform_weights import saved_tensors
from tests.fixtures.megatron.record import by_iteration, make_learnable_dataset, scalars
from tests.fixtures.megatron.record_checkpoints import LOGGED, STOP, make_release
from tests.paths import FIXTURES

MEGATRON = FIXTURES / "megatron"
RECORDED: dict[str, Any] = json.loads((MEGATRON / "checkpoints.json").read_text())
PLAIN = {"--dwm-mode": "off"}
ALONE = RECORDED["tp2_pp2"]["loading"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"--data-path": make_learnable_dataset(tmp_path_factory.mktemp("data"))} | PLAIN


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Megatron-LM's checkpoint of each layout, and one of them as a release."""
    folder = tmp_path_factory.mktemp("megatron")
    for name in RECORDED:
        shutil.unpack_archive(MEGATRON / f"{name}.tar.xz", folder / name)
    make_release(folder / "tp2_pp2" / f"iter_{STOP:07d}", folder / "release")
    return folder


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of the model and its optimizer in a checkpoint, by key."""
    saved = saved_tensors(checkpoint)
    return {name: value for name, value in saved.items() if isinstance(value, torch.Tensor) and "rng" not in name}


def after_the_stop(curves: dict[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    return {name: [point for point in curve if point[0] > STOP] for name, curve in curves.items()}


@pytest.mark.parametrize("layout", RECORDED)
def test_goes_on_from_megatron_lms_checkpoint(layout: str, data: dict[str, Any], theirs: Path, tmp_path: Path):
    recorded = RECORDED[layout]
    flags = recorded["flags"] | data | {"--load": theirs / layout, "--tensorboard-dir": tmp_path / "board"}
    succeed(tmp_path, recorded["processes"], flags)
    assert_curves(by_iteration(scalars(tmp_path / "board")), after_the_stop(recorded["whole"]), tolerance=1e-5)


@pytest.mark.parametrize("case", ALONE)
def test_flags_of_loading_mean_the_same(case: str, data: dict[str, Any], theirs: Path, tmp_path: Path):
    """One process goes on from TP2xPP2's checkpoint."""
    load = theirs / ("release" if "release" in case else "tp2_pp2")
    flags = ALONE[case]["flags"] | data | {"--load": load, "--tensorboard-dir": tmp_path / "board"}
    if case == "schedule of the flags":
        # Megatron-LM keeps the checkpoint's highest learning rate in the parameter groups, whatever --lr says.
        assert flags["--lr"] != RECORDED["tp2_pp2"]["flags"]["--lr"]
        flags["--lr"] = RECORDED["tp2_pp2"]["flags"]["--lr"]
    succeed(tmp_path, 1, flags)
    assert_curves(by_iteration(scalars(tmp_path / "board")), ALONE[case]["curves"], tolerance=1e-5)


def test_skipped_samples_of_a_checkpoint_are_told(data: dict[str, Any], theirs: Path, tmp_path: Path):
    """A run of Megatron-LM's can have skipped some; a run here cannot."""
    load, board = tmp_path / "load", tmp_path / "board"
    shutil.copytree(theirs / "tp2_pp2", load)
    common = load / f"iter_{STOP:07d}" / "common.pt"
    state = torch.load(common, weights_only=False)
    state["args"].skipped_train_samples = 16
    torch.save(state, common)
    flags = ALONE["one process"]["flags"] | data | {"--load": load, "--tensorboard-dir": board, "--log-interval": 1}
    finished = succeed(tmp_path, 1, flags | {"--exit-interval": STOP + 1})
    assert scalars(board)["skipped-train-samples"] == [[STOP + 1, 16.0]]
    assert "| skipped samples:           16 |" in finished.output[0]


def test_the_log_is_megatron_lms(data: dict[str, Any], theirs: Path, tmp_path: Path):
    """Line for line and character for character, but for times, the last digits of numbers, and what is ours.

    That is what follows Megatron-LM's part of an iteration's line. Its estimate of a GPU's memory is left out: on a CPU
    there is none.
    """
    place = {"--load": theirs / "tp2_pp2", "--save": tmp_path / "save", "--save-interval": 10, "--dwm-peak-tflops": 1}
    finished = succeed(tmp_path, 1, ALONE["one process"]["flags"] | data | place)
    lines = (MEGATRON / "log.txt").read_text().splitlines()
    estimate = r"(Total n|N)umber of parameters|compute_activation|Activation memory|Theoretical memory"
    # Its list of arguments is left out too.
    expected = [line for line in lines if not re.match(rf"  \w+ \.{{5,}} |{estimate}", line)]
    logged = [line for line in finished.output[0].splitlines() if any(text in line for text in LOGGED)]
    found = [re.sub(r"(number of nan iterations: +\d+ \|).*", r"\1", line) for line in logged]
    speed = r"\| TFLOP/s/GPU: [\d.e-]+ \| MFU: [\d.]+% \| time left: 00:00:\d\d \|$"
    assert sum(re.search(speed, line) is not None for line in logged) == 2  # the first line is of starting up too
    assert [_shape(line) for line in found] == [_shape(line) for line in expected]
    for ours, reference in zip(found, expected, strict=True):
        assert _numbers(ours) == pytest.approx(_numbers(reference), rel=2e-5, abs=1.1e-3), ours


def _timeless(line: str) -> str:
    line = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}", "NOW", line)
    line = re.sub(r"(iteration \(ms\)|TFLOP/s/GPU\)): \d+\.\d ", r"\1: X.X ", line)
    return re.sub(r"(to|from) (?:/|FOLDER)\S*", r"\1 FOLDER", line)


def _shape(line: str) -> str:
    return re.sub(r"\d", "0", _timeless(line))


def _numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.?\d*(?:E[+-]\d+)?", _timeless(line))]


@pytest.mark.parametrize("layout", RECORDED)
@pytest.mark.parametrize("saving", [{}, {"--async-save": True}], ids=["at once", "in the background"])
def test_writes_what_megatron_lm_writes(
    layout: str, saving: dict[str, Any], data: dict[str, Any], theirs: Path, tmp_path: Path
):
    recorded = RECORDED[layout]
    save = tmp_path / "save"
    extra = {"--save": save, "--save-interval": STOP, "--exit-interval": STOP + 1}
    succeed(tmp_path, recorded["processes"], recorded["flags"] | data | saving | extra)
    name = f"iter_{STOP:07d}"
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(STOP + 1)
    ours, expected = tensors(save / name), tensors(theirs / layout / name)
    assert ours.keys() == expected.keys() and len(ours) > 10
    parameters = sum(tensor.numel() for key, tensor in expected.items() if not key.startswith("optimizer"))
    for key, tensor in expected.items():
        assert ours[key].dtype == tensor.dtype and ours[key].shape == tensor.shape
        # Between the parameters in a bucket of the distributed optimizer is padding: whatever lay in memory.
        padding = tensor.numel() - parameters if "bucket_idx" in key else 0
        different = ~torch.isclose(ours[key], tensor, rtol=1e-4, atol=1e-6)
        assert int(different.sum()) <= padding < 0.05 * parameters, key
    mine, common = (dist_checkpointing.load_common_state_dict(str(root / name)) for root in (save, theirs / layout))
    assert mine.keys() == common.keys() - {"rerun_state_machine"}
    for key in ("opt_param_scheduler", "iteration", "checkpoint_version", "num_floating_point_operations_so_far"):
        assert mine[key] == pytest.approx(common[key])


def test_the_distributed_optimizer_moves_to_another_layout(data: dict[str, Any], tmp_path: Path):
    recorded = RECORDED["dp2_distributed_optimiser"]
    flags = recorded["flags"] | data | {"--dist-ckpt-optim-fully-reshardable": True}
    succeed(tmp_path / "log", 2, flags | {"--save": tmp_path, "--exit-interval": STOP})
    # The validation's first curve point came before the stop; each layout rounds its sums in its own order.
    expected = after_the_stop(recorded["whole"])
    moved = {"--tensor-model-parallel-size": 2, "--pipeline-model-parallel-size": 2}
    for processes, parallel in ((4, moved), (1, {})):
        board = tmp_path / f"board {processes}"
        succeed(tmp_path / "log", processes, flags | parallel | {"--load": tmp_path, "--tensorboard-dir": board})
        assert_curves(by_iteration(scalars(board)), expected, tolerance=1e-4)


def test_keeps_the_checkpoints_that_it_is_told_to_keep(data: dict[str, Any], tmp_path: Path):
    flags = ALONE["one process"]["flags"] | data | {"--eval-iters": 0, "--train-iters": 10, "--lr-decay-iters": 10}
    save = {"--save": tmp_path, "--save-interval": 4, "--save-retain-interval": 8}
    scratch = {"--non-persistent-save-interval": 1, "--non-persistent-ckpt-type": "global"}
    succeed(tmp_path / "log", 1, flags | save | scratch)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000008", "iter_0000010"]
    kept = tmp_path / "non_persistent"
    assert sorted(path.name for path in kept.glob("iter_*")) == ["iter_0000007", "iter_0000009"]

    loaded = "successfully loaded checkpoint from {} [ t 1/1, p 1/1 ] at iteration {}"
    for extra, folder, iteration in (({}, tmp_path, 8), ({"--non-persistent-ckpt-type": "global"}, kept, 9)):
        finished = succeed(tmp_path / "log", 1, flags | {"--load": tmp_path, "--ckpt-step": 8} | extra)
        assert loaded.format(folder, iteration) in finished.output[0]

    scratch |= {"--non-persistent-global-ckpt-dir": kept, "--save": tmp_path / "other"}
    finished = pretrain(tmp_path / "log", 1, flags | scratch)
    message = f"error: --non-persistent-global-ckpt-dir {kept}: iter_0000009 belongs to a run with --save {tmp_path},"
    assert finished.codes == [2] and finished.errors[0].startswith(message), finished.text


OTHER_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "of the same tensors": (
        {"--rotary-base": 500},
        "--rotary-base 500 is not what the checkpoint was saved with, 10000",
    ),
    "of other tensors": ({"--swiglu": False}, "--swiglu is not given, but was given when the checkpoint was saved"),
    "of other sizes": ({"--ffn-hidden-size": 24}, "--ffn-hidden-size 24 is not what the checkpoint was saved with, 16"),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_another_model_than_the_checkpoints_is_refused(case: str, data: dict[str, Any], theirs: Path, tmp_path: Path):
    changes, said = OTHER_MODELS[case]
    flags = ALONE["one process"]["flags"] | data | {"--load": theirs / "tp2_pp2"} | changes
    finished = pretrain(tmp_path, 2, flags)
    assert finished.codes == [2, 2] and "".join(finished.errors).count("\n") == 1, finished.text
    assert "".join(finished.errors).startswith(f"error: --load {theirs / 'tp2_pp2'}: {said}; change it")


def test_a_missing_checkpoint_ends_the_run_if_it_must_exist(data: dict[str, Any], tmp_path: Path):
    flags = ALONE["one process"]["flags"] | data
    place = {"--load": tmp_path, "--save": tmp_path}
    finished = pretrain(tmp_path / "log", 1, flags | place | {"--exit-on-missing-checkpoint": True})
    assert finished.codes == [2] and "--exit-on-missing-checkpoint" in finished.errors[0]
