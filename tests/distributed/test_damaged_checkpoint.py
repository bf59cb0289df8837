"""A damaged checkpoint is named, and so is the last one that is whole; nothing that is planted in one runs."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dwm.config.checkpoint import CheckpointConfig
from megatron_dwm.errors import UserError
from megatron_dwm.training.checkpoint_checksums import CHECKSUMS
from megatron_dwm.training.checkpoint_folders import latest_checkpoint
from megatron_dwm.training.saved_checkpoint import open_checkpoint, reported_damage
from tests.distributed.checkpointed import Leg, train_legs
from tests.small_runs import LLAMA

FLAGS = {**LLAMA, "--lr": 0.01}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of iterations 2 and 4."""
    folder = tmp_path_factory.mktemp("written")
    train_legs(1, [Leg(FLAGS, save=(folder, 2), last=2), Leg(FLAGS, load=(folder, 2), save=(folder, 4), last=4)])
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(written, tmp_path / "save")
    return tmp_path / "save"


def test_bits_flipped_anywhere_are_found_and_the_last_whole_checkpoint_is_offered(folder: Path):
    """26 at random, in every file that is loaded."""
    checkpoint, generator = folder / "iter_0000004", random.Random(3)
    names = sorted(path.name for path in checkpoint.iterdir() if path.name != CHECKSUMS)
    assert {"__0_0.distcp", "common.pt", ".metadata", "metadata.json"} <= set(names)
    for number in range(26):
        path = checkpoint / names[number % len(names)]
        whole = path.read_bytes()
        content = bytearray(whole)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        with pytest.raises(UserError, match="give --ckpt-step 2, the last one before it that is whole") as error:
            open_checkpoint(checkpoint)
        assert f"--load {folder}: iter_0000004 is damaged: {path.name} " in str(error.value)
        path.write_bytes(whole)
    open_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["common.pt", ".metadata", "metadata.json"])
@pytest.mark.parametrize("damage", ["gone", "empty", "half", "garbage", "a folder"])
def test_files_that_say_what_is_there_are_named_even_without_checksums(name: str, damage: str, folder: Path):
    path = folder / "iter_0000004" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "garbage": b"\x80garbage"}[damage])
    with pytest.raises(UserError) as error:
        open_checkpoint(folder / "iter_0000004", should_verify=False)
    text = str(error.value)
    assert text.startswith(f"--load {folder}: iter_0000004 is damaged: {name} cannot be read (")
    assert text.endswith("give --ckpt-step 2, the last one before it that is whole") and len(text) < 500


def test_damaged_checksums_are_not_passed_over(folder: Path):
    (folder / "iter_0000004" / CHECKSUMS).write_text("{")
    with pytest.raises(UserError, match=f"{CHECKSUMS} cannot be read"):
        open_checkpoint(folder / "iter_0000004")


def test_where_no_checkpoint_is_whole_none_is_offered(folder: Path):
    for name in ("iter_0000002", "iter_0000004"):
        (folder / name / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"__0_0\.distcp is missing; no older checkpoint there is whole"):
        open_checkpoint(folder / "iter_0000004")


@pytest.mark.parametrize("damage", ["half", "gone"])
def test_shards_that_cannot_be_read_are_one_line_without_checksums(damage: str, folder: Path):
    path = folder / "iter_0000004" / "__0_1.distcp"
    content = path.read_bytes()
    path.unlink()
    if damage == "half":
        path.write_bytes(content[: len(content) // 2])
    (folder / "iter_0000004" / CHECKSUMS).unlink()
    with pytest.raises(UserError, match=r"iter_0000004 is damaged: .*give --ckpt-step 2"):
        train_legs(1, [Leg(FLAGS, load=(folder, 4))])


@pytest.mark.parametrize("text", ["", "latest", "-3", "1" * 30, "4\n5", "\ufffd", "٤"])
def test_a_damaged_tracker_is_one_line(text: str, folder: Path):
    tracker = folder / "latest_checkpointed_iteration.txt"
    tracker.write_text(text)
    with pytest.raises(UserError) as error:
        latest_checkpoint(CheckpointConfig(load=str(folder)))
    assert str(tracker) in str(error.value) and "give --ckpt-step of one that is there (2, 4)" in str(error.value)


class Planted:
    """An object whose unpickling makes the folder ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def plant_in_metadata(checkpoint: Path, planted: Planted) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = planted
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_in_common(checkpoint: Path, planted: Planted) -> None:
    common = torch.load(checkpoint / "common.pt", weights_only=False)
    torch.save({**common, "args": planted}, checkpoint / "common.pt")


def plant_in_an_object(checkpoint: Path, planted: Planted) -> None:
    """In place of the random state, which is an object among the tensors of the ``.distcp`` files."""
    buffer = BytesIO()
    torch.save([planted], buffer)
    (checkpoint / "__9_0.distcp").write_bytes(buffer.getvalue())
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    (index,) = (index for index in metadata.storage_data if index.fqn.startswith("rng_state"))
    place = metadata.storage_data[index]
    place.relative_path, place.offset, place.length = "__9_0.distcp", 0, len(buffer.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_in_dwm_state(checkpoint: Path, planted: Planted) -> None:
    torch.save({"weighter": planted}, checkpoint / "dwm_state.pt")


@pytest.mark.parametrize("plant", [plant_in_metadata, plant_in_common, plant_in_an_object, plant_in_dwm_state])
def test_code_in_a_checkpoint_does_not_run(plant: Callable[[Path, Planted], None], folder: Path, tmp_path: Path):
    checkpoint, proof = folder / "iter_0000004", tmp_path / "ran"
    plant(checkpoint, Planted(proof))
    (checkpoint / CHECKSUMS).unlink()  # whoever plants code can write checksums that fit
    with pytest.raises(UserError, match=r"iter_0000004 is damaged: .*mkdir") as error:
        train_legs(1, [Leg(FLAGS, load=(folder, 4))])
    assert not proof.exists() and "\n" not in str(error.value)


def test_a_rank_that_is_killed_while_all_load_is_no_damage(tmp_path: Path):
    def work(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
        dist.barrier()
        if rank == 1:
            os._exit(0)
        with pytest.raises(RuntimeError, match="gloo"), reported_damage(tmp_path / "iter_0000004"):
            dist.all_reduce(torch.zeros(1))
        os._exit(0)

    ranks = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
