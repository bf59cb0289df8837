"""Whatever became of a file of a checkpoint, it is found, or read without running anything, or refused in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies

from megatron_dwm.config.checkpoint import TRACKER, CheckpointConfig
from megatron_dwm.config.run import RunConfig
from megatron_dwm.errors import UserError
from megatron_dwm.training.checkpoint_checksums import CHECKSUMS, write_checksums
from megatron_dwm.training.checkpoint_folders import latest_checkpoint, saved_arguments
from megatron_dwm.training.resume_checks import check_resume
from megatron_dwm.training.saved_checkpoint import SavedCheckpoint, open_checkpoint
from tests.fixtures.first_format import record
from tests.fuzzing import assert_short_line, damaged, fuzz_settings
from tests.paths import FIXTURES
from tests.small_runs import parse_flags

VALUES: list[Any] = [None, True, -1, 0, 2**70, 1.5, float("nan"), "", "x" * 2000, [], [1], {}, {"a": 1}, (), b"1"]
NAME = f"iter_{record.STOP:07d}"


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with one checkpoint, a weighter's state in it."""
    folder = tmp_path_factory.mktemp("save")
    shutil.unpack_archive(FIXTURES / "first_format" / "save.tar.xz", folder)
    return folder


@pytest.fixture(scope="module")
def config(save: Path) -> RunConfig:
    return parse_flags({**record.MODEL, **record.TRAINING, **record.WEIGHTING, "--load": save})


def read_everything(flags: CheckpointConfig, config: RunConfig) -> SavedCheckpoint:
    """Read all that a run reads of a checkpoint but for what megatron-core and torch do with it afterwards."""
    folder = latest_checkpoint(flags)
    assert folder is not None
    saved_arguments(flags)
    checkpoint = open_checkpoint(folder, should_verify=False)
    check_resume(config, checkpoint)
    checkpoint.read_tensors(key for key in checkpoint.shapes if "rng_state" not in key)
    checkpoint.read_dwm_state()
    for index in checkpoint.metadata.storage_data:
        if index.fqn.startswith("rng_state"):
            checkpoint.read_object(index.fqn)
    return checkpoint


def with_damage(path: Path, data: strategies.DataObject, check: Callable[[bytes], None]) -> None:
    """Call ``check`` with the content of a file before it was damaged, and put it back."""
    whole = path.read_bytes()
    try:
        path.write_bytes(data.draw(damaged(whole)))
        check(whole)
    finally:
        path.write_bytes(whole)


@fuzz_settings(30)
@given(data=strategies.data())
def test_a_damaged_file_is_read_or_refused_in_one_line(
    data: strategies.DataObject, save: Path, config: RunConfig
) -> None:
    names = sorted(path.name for path in (save / NAME).iterdir() if path.name != CHECKSUMS)
    name = data.draw(strategies.sampled_from([*names, "common.pt", ".metadata", TRACKER]))
    before = sorted(save.rglob("*"))

    def check(whole: bytes) -> None:
        try:
            read_everything(config.checkpoint, config)
        except UserError as error:
            assert str(save) in assert_short_line(error)

    with_damage(save / name if name == TRACKER else save / NAME / name, data, check)
    assert sorted(save.rglob("*")) == before and read_everything(config.checkpoint, config)


@fuzz_settings(30)
@given(data=strategies.data())
def test_other_values_in_what_it_says_of_its_run_are_refused_in_one_line(
    data: strategies.DataObject, save: Path, config: RunConfig
) -> None:
    path = save / NAME / "common.pt"
    whole = path.read_bytes()
    common = torch.load(path, weights_only=False)
    part = data.draw(strategies.sampled_from([common, vars(common["args"]), common["opt_param_scheduler"]]))
    name = data.draw(strategies.sampled_from(sorted(part)))
    if data.draw(strategies.booleans()):
        del part[name]
    else:
        part[name] = data.draw(strategies.sampled_from(VALUES))
    torch.save(common, path)
    try:
        read_everything(config.checkpoint, config)
    except UserError as error:
        assert "--load" in assert_short_line(error) or str(save) in str(error)
    finally:
        path.write_bytes(whole)


@fuzz_settings(25)
@given(data=strategies.data())
def test_checksums_find_every_change(data: strategies.DataObject, save: Path) -> None:
    folder = save / NAME
    if not (folder / CHECKSUMS).exists():
        write_checksums(folder)
    path = folder / data.draw(strategies.sampled_from(sorted(path.name for path in folder.iterdir())))

    def check(whole: bytes) -> None:
        is_same = path.read_bytes() == whole
        try:
            open_checkpoint(folder)
        except UserError as error:
            assert f"{save}: {NAME} is damaged: " in assert_short_line(error) and not is_same
        else:
            # Spaces of JSON say nothing, and a letter may be in a name that is not looked up.
            assert is_same or path.name == CHECKSUMS

    with_damage(path, data, check)
    assert torch.is_tensor(
        next(iter(open_checkpoint(folder).read_tensors(["decoder.final_layernorm.weight"]).values()))
    )
