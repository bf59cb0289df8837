"""Files of a checkpoint that name code are refused, and the code does not run."""

from __future__ import annotations

import enum
import os
import pickle
import signal
from argparse import Namespace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItemType

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


class OldPickler(pickle.Pickler):
    """Writes enumerations as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


class OlderPickler(pickle.Pickler):
    """Writes signals as Python 3.10 does."""

    def reducer_override(self, value: Any) -> Any:
        return value.name if isinstance(value, signal.Signals) else NotImplemented


def old_torch_file(content: object, pickler: type[pickle.Pickler] = OldPickler) -> BytesIO:
    file = BytesIO()
    torch.save(content, file, pickle_module=SimpleNamespace(__name__="old", Pickler=pickler))
    file.seek(0)
    return file


def test_enumerations_that_python_3_11_0_to_3_11_3_wrote_are_read(tmp_path: Path):
    file = BytesIO()
    sizes = torch.Size([2])
    tensor = TensorStorageMetadata(TensorProperties(), sizes, [])
    OldPickler(file).dump(Metadata({"key": tensor}))
    assert b"getattr" in file.getvalue()
    (tmp_path / ".metadata").write_bytes(file.getvalue())
    assert read_metadata(tmp_path / ".metadata").state_dict_metadata == {"key": tensor}
    arguments = Namespace(attention_backend=AttnBackend.fused)
    file = old_torch_file(arguments)
    assert b"getattr" in file.getvalue() and load_restricted(file) == arguments


@pytest.mark.parametrize("pickler", [pickle.Pickler, OldPickler, OlderPickler])
def test_the_signal_among_megatron_lms_arguments_is_read(pickler: type[pickle.Pickler]):
    """A run of Megatron-LM under Python 3.10 writes ``GLOBAL signal SIGTERM``."""
    arguments = Namespace(exit_signal=signal.SIGTERM)
    assert load_restricted(old_torch_file(arguments, pickler)) == arguments


@pytest.mark.parametrize("name", ["mro", "__class__", "__subclasses__", "_member_map_"])
def test_getattr_gives_nothing_but_members_of_enumerations(name: str, tmp_path: Path):
    class Asks:
        def __reduce__(self) -> tuple[Any, ...]:
            return getattr, (WriteItemType, name)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"key": Asks()})))  # type: ignore[dict-item]
    with pytest.raises(UnreadableFileError, match="getattr, which no checkpoint needs"):
        read_metadata(tmp_path / ".metadata")
    with pytest.raises(pickle.UnpicklingError, match=r"getattr, which no checkpoint needs|Unsupported global"):
        load_restricted(old_torch_file(Asks()))
