"""Files of a checkpoint that name code are refused, and the code does not run."""

from __future__ import annotations

import os
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_dwm.safe_unpickling import (
    ALLOWED,
    UnreadableFileError,
    load_restricted,
    read_metadata,
    read_torch_file,
    restricted_checkpoint_loading,
)


class Planted:
    """An object whose unpickling makes the file ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_metadata_that_names_code_is_refused(protocol: int, tmp_path: Path):
    file, proof = tmp_path / ".metadata", tmp_path / "ran"
    for planted in (Planted(proof), Metadata({"key": Planted(proof)})):  # type: ignore[dict-item]
        file.write_bytes(pickle.dumps(planted, protocol))
        with pytest.raises(UnreadableFileError, match=r"\.metadata .*mkdir, which no checkpoint needs"):
            read_metadata(file)
    assert not proof.exists()
    pickle.loads(file.read_bytes())
    assert proof.exists()  # plain unpickling does run it


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins getattr",
        "os system",
        "posix system",
        "torch load",
        "torch.hub load",
        "copyreg _reconstructor",
    ],
)
def test_what_could_be_abused_is_not_allowed(name: str):
    assert tuple(name.split()) not in ALLOWED


def test_attributes_of_allowed_classes_are_not_allowed(tmp_path: Path):
    """Protocol 4 can name ``Class.method.__globals__``."""
    name = "torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__"
    content = b"\x80\x04\x8c%c%s\x8c%c%s\x93." % (len(name[0]), name[0].encode(), len(name[1]), name[1].encode())
    (tmp_path / ".metadata").write_bytes(content.replace(b"\x8c%c", b"\x8c"))
    with pytest.raises(UnreadableFileError):
        read_metadata(tmp_path / ".metadata")


def test_metadata_of_another_kind_or_half_of_it_is_refused(tmp_path: Path):
    file = tmp_path / ".metadata"
    whole = pickle.dumps(Metadata({}))
    for content in (b"", b"garbage", whole[: len(whole) // 2], pickle.dumps([1, 2])):
        file.write_bytes(content)
        with pytest.raises(UnreadableFileError, match=r"^\.metadata "):
            read_metadata(file)
    with pytest.raises(UnreadableFileError):
        read_metadata(tmp_path / "nothing")
    file.write_bytes(whole)
    assert read_metadata(file) == Metadata({})


def test_a_torch_file_that_names_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, proof = tmp_path / "common.pt", tmp_path / "ran"
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"args": Planted(proof)}, file)
    with pytest.raises(UnreadableFileError, match=r"common\.pt cannot be read .*mkdir"):
        read_torch_file(file)
    assert not proof.exists()


def test_objects_that_checkpoints_hold_are_read():
    random_state = {"np_rng_state": np.random.get_state(), "torch": torch.get_rng_state(), "extra": BytesIO(b"fp8")}
    buffer = BytesIO()
    torch.save([random_state], buffer)
    buffer.seek(0)
    (found,) = load_restricted(buffer)
    assert np.array_equal(found["np_rng_state"][1], random_state["np_rng_state"][1])
    assert found["extra"].getvalue() == b"fp8"


def test_restrictions_end_with_the_block():
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    before = strategies._get_filesystem_reader, strategies.MCoreLoadPlanner.load_bytes
    with pytest.raises(ZeroDivisionError), restricted_checkpoint_loading():
        assert strategies._get_filesystem_reader is not before[0]
        1 / 0  # noqa: B018
    assert (strategies._get_filesystem_reader, strategies.MCoreLoadPlanner.load_bytes) == before
