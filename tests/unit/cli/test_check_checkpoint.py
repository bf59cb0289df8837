"""``check_checkpoint`` reads everything and names what is damaged."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from megatron_dwm.cli.check_checkpoint import main
from megatron_dwm.errors import UserError
from megatron_dwm.training.checkpoint_checksums import CHECKSUMS, write_checksums
from megatron_dwm.training.saved_checkpoint import SavedCheckpoint, open_checkpoint
from tests.paths import FIXTURES

NAME = "iter_0000006"


@pytest.fixture
def save(tmp_path: Path) -> Path:
    """A run's folder with a checkpoint, which gets checksums, and an export."""
    shutil.unpack_archive(FIXTURES / "first_format" / "save.tar.xz", tmp_path / "save")
    write_checksums(tmp_path / "save" / NAME)
    return tmp_path / "save"


def check(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = int(error.code or 0)
    return code, *capsys.readouterr()


def test_what_is_whole_is_said_for_each(save: Path, capsys: pytest.CaptureFixture[str]):
    code, output, errors = check(capsys, "--load", save)
    assert (code, errors) == (0, "")
    *lines, last = output.splitlines()
    assert last.startswith(f"{save}: all 2 are whole, ") and last.endswith(" MB")
    assert lines == [
        f"{save / NAME}: whole, checksums verified: 24 tensors, 5 objects, a weighter",
        f"{save / 'weighter' / NAME}: an exported weighter, whole",
    ]
    (save / NAME / CHECKSUMS).unlink()
    assert "whole, without checksums" in check(capsys, "--load", save, "--ckpt-step", 6)[1]


@pytest.mark.parametrize("has_checksums", [True, False])
@pytest.mark.parametrize("name", ["__0_0.distcp", "__0_1.distcp", "common.pt", ".metadata", "dwm_state.pt"])
def test_a_file_cut_short_is_found(name: str, has_checksums: bool, save: Path, capsys: pytest.CaptureFixture[str]):
    path = save / NAME / name
    path.write_bytes(path.read_bytes()[:-200])
    if not has_checksums:
        (save / NAME / CHECKSUMS).unlink()
    code, _, errors = check(capsys, "--load", save)
    assert code == 2 and f"{NAME} is damaged: " in errors, errors
    assert errors.splitlines()[-1] == f"error: --load {save}: 1 of 2 cannot be loaded; remove those that are damaged"


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_not_damaged(
    save: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    saved, read = open_checkpoint(save / NAME), SavedCheckpoint.read_tensors

    def read_late(saved: SavedCheckpoint, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        shutil.rmtree(saved.folder, ignore_errors=True)
        return read(saved, keys)

    monkeypatch.setattr(SavedCheckpoint, "read_tensors", read_late)
    code, output, errors = check(capsys, "--load", save)
    assert (code, errors) == (0, "")
    assert output.splitlines()[0] == f"{save / NAME}: was deleted by its run meanwhile"
    assert f"{save}: all 1 are whole, " in output
    with pytest.raises(UserError, match=f"{NAME} was deleted by its run while it was read; try again"):
        saved.read_tensors(saved.shapes)


def test_a_weighter_of_nan_or_without_a_part_is_found(save: Path, capsys: pytest.CaptureFixture[str]):
    path = save / NAME / "dwm_state.pt"
    state = torch.load(path, weights_only=True)
    next(iter(state["weighter"].values())).view(-1)[0] = float("nan")
    torch.save(state, path)
    write_checksums(save / NAME)
    code, _, errors = check(capsys, "--load", save)
    assert code == 2 and "1 tensors hold values that are not finite" in errors
    torch.save(state | {"replay": None}, path)
    write_checksums(save / NAME)
    code, _, errors = check(capsys, "--load", save)
    assert code == 2 and f"{NAME} is damaged: ValueError: its replay is None; " in errors


def test_nothing_to_verify_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for arguments in (["--load", tmp_path], ["--load", tmp_path, "--ckpt-step", 3], []):
        code, output, errors = check(capsys, *arguments)
        assert (code, output) == (2, "") and errors.startswith("error: --load") and errors.count("\n") == 1


def test_a_checkpoint_of_the_older_format_is_verified_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save = tmp_path / "save"
    for iteration in (3, 6):
        file = save / f"iter_{iteration:07d}" / "mp_rank_00" / "model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        torch.save({"model": {"weight": torch.ones(1000)}, "iteration": iteration}, file)
        shards = {"param": torch.ones(9), "exp_avg": torch.ones(9), "exp_avg_sq": torch.ones(9), "numel_unpadded": 9}
        torch.save({0: {(torch.float32, torch.float32): shards}}, file.with_name("distrib_optim.pt"))
        write_checksums(file.parents[1])
    code, output, errors = check(capsys, "--load", save)
    assert (code, errors) == (0, "") and "whole, in the format torch: 4 tensors of 1 ranks" in output
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    code, _, errors = check(capsys, "--load", save)
    assert code == 2 and "mp_rank_00/model_optim_rng.pt has another sha256" in errors
    assert "give --ckpt-step 3, the last one before it that is whole" in errors
