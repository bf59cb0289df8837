"""A checkpoint that is written gets its name only when it can be tracked too."""

from __future__ import annotations

import errno
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dwm.config.checkpoint import TRACKER
from megatron_dwm.errors import UserError
from megatron_dwm.training.checkpoint import CheckpointWriter


def manager(save: Path, non_persistent: str | None = None) -> Any:
    """What publishing needs of a manager: the first rank's, without background saves."""
    flags = SimpleNamespace(
        save=str(save),
        save_retain_interval=None,
        checkpoint_checksums=False,
        non_persistent_global_ckpt_dir=non_persistent,
    )
    rank = SimpleNamespace(is_first_rank=True, tp_pp_label="")
    return cast(Any, SimpleNamespace(parallel_state=rank, flags=flags, _queue=None))


def written(root: Path) -> Path:
    temporary = root / ".iter_0000004.partial"
    temporary.mkdir()
    (temporary / "common.pt").write_bytes(b"state")
    return temporary


def test_a_disk_without_room_for_the_tracker_leaves_no_checkpoint_that_nothing_names(tmp_path: Path):
    temporary, (soft, hard) = written(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # files can be renamed, but not written
    try:
        with pytest.raises(OSError, match="File too large"):
            CheckpointWriter._publish(manager(tmp_path), tmp_path, temporary, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [temporary]
    CheckpointWriter._publish(manager(tmp_path), tmp_path, temporary, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000004", TRACKER]
    assert (tmp_path / TRACKER).read_text() == "4"


def test_torchs_words_for_a_file_cut_short_are_not_shown(tmp_path: Path):
    """As torch reports what a full disk does to its writer, through the first rank's workers."""
    with (tmp_path / "shard").open("wb") as file, pytest.raises(RuntimeError) as raised:
        file.close()
        torch.save(torch.zeros(9), "/dev/full")
    failure = CheckpointException("plan", {0: (RuntimeError(f"Worker failure: {raised.value}"), cast(Any, None))})
    with (
        pytest.raises(UserError, match=r"iteration 4 cannot be written \(a file could not be written to its end\)"),
        CheckpointWriter._reported_failure(manager(tmp_path), tmp_path, tmp_path / "x", 4),
    ):
        raise failure


@pytest.mark.parametrize(
    ("root", "flag"),
    [("save", "--save"), ("save/non_persistent", "--save"), ("np", "--non-persistent-global-ckpt-dir")],
)
def test_the_folder_that_is_full_is_named_with_its_flag(root: str, flag: str, tmp_path: Path):
    writer = manager(tmp_path / "save", str(tmp_path / "np"))
    with (
        pytest.raises(UserError, match=f"^{flag} {tmp_path / root}: the checkpoint of iteration 4 cannot be written"),
        CheckpointWriter._reported_failure(writer, tmp_path / root, tmp_path / "x", 4),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
