"""What a killed run left is cleared; what cannot be written is named before anything is."""

from __future__ import annotations

import multiprocessing
import resource
from pathlib import Path

import pytest

from megatron_dwm.config.checkpoint import TRACKER
from megatron_dwm.errors import UserError, as_user_error
from megatron_dwm.training.checkpoint_folders import checkpoints_in
from megatron_dwm.training.folder_lock import HEARTBEAT, LOCK
from megatron_dwm.training.save_folder import SaveFolder, check_writable
from tests.unit.obstacles import OBSTACLES


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path):
    for name in ("iter_0000004", "iter_0000008", ".iter_0000012.partial", "weighter/.iter_0000008.tmp77", "weighter/x"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").touch()
    (tmp_path / "non_persistent").mkdir()
    (tmp_path / "non_persistent" / ".iter_0000009.partial").mkdir()
    (tmp_path / ".iter_0000004.retired").touch()  # killed after the tracker named 8
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("8")
    SaveFolder(tmp_path).close()
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_dir())
    assert found == ["iter_0000008", "non_persistent", "weighter", "weighter/x"]
    assert sorted(path.name for path in tmp_path.glob(".*")) == [LOCK]


def test_a_first_checkpoint_that_a_killed_run_could_not_track_is_tracked(tmp_path: Path):
    """Only what one killed run may have left: one checkpoint, which is whole."""
    whole = ("whole/iter_0000004", "two/iter_0000004", "two/iter_0000008", "two/non_persistent/iter_0000009")
    for name in (*whole, "unfinished/iter_0000004"):
        (tmp_path / name).mkdir(parents=True)
    for name in whole:
        (tmp_path / name / "metadata.json").touch()
    for name in ("whole", "unfinished", "two"):
        SaveFolder(tmp_path / name).close()
    found = {str(path.parent.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob(TRACKER)}
    assert found == {"whole": "4", "two/non_persistent": "9"}


def test_only_folders_that_are_named_by_a_number_hold_checkpoints(tmp_path: Path):
    for name in ("iter_²", "iter_٣", f"iter_{'9' * 30}", "iter_x", "iter_0000003"):
        (tmp_path / name).mkdir()
    assert checkpoints_in(tmp_path) == [tmp_path / "iter_0000003"]


def test_a_checkpoint_that_was_to_be_deleted_stays_while_the_tracker_names_it(tmp_path: Path):
    (tmp_path / "iter_0000004").mkdir()
    (tmp_path / ".iter_0000004.retired").touch()  # killed before the tracker named the next
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    SaveFolder(tmp_path).close()
    assert (tmp_path / "iter_0000004").is_dir() and not (tmp_path / ".iter_0000004.retired").exists()


def test_what_cannot_be_written_is_named_and_nothing_is_left(tmp_path: Path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=rf"--tensorboard-dir {path}: cannot be written.* \(Not a directory\)"):
            check_writable({"--tensorboard-dir": path})
    for path in (Path("/proc"), Path("/proc/below/it")):  # a file system that takes no files
        with pytest.raises(UserError, match=f"--save {path}: cannot be written"):
            check_writable({"--save": path})
    check_writable({"--save": tmp_path / "below" / "it"})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("is_new", [True, False])
def test_a_run_that_starts_on_a_full_disk_names_the_folder(is_new: bool, tmp_path: Path):
    save = tmp_path / "new" if is_new else tmp_path
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # files can be made, but not written
    try:
        with pytest.raises(UserError, match=rf"--save {save}: cannot be written \(File too large\); make room"):
            SaveFolder(save).create()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_folder_in_place_of_the_lock_is_named(tmp_path: Path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(UserError, match=rf"--save {tmp_path / LOCK}: cannot be opened \(Is a directory\)"):
        SaveFolder(tmp_path)


@pytest.mark.parametrize("kind", OBSTACLES)
def test_a_mark_of_any_kind_is_one(kind: str, tmp_path: Path):
    for name in ("iter_0000004", "iter_0000008"):
        (tmp_path / name).mkdir()
    (tmp_path / TRACKER).write_text("8")
    OBSTACLES[kind](tmp_path / ".iter_0000004.retired")
    SaveFolder(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "iter_0000008", TRACKER]


@pytest.mark.parametrize("kind", [kind for kind in OBSTACLES if kind != "file"])
@pytest.mark.parametrize("name", [LOCK, HEARTBEAT])
def test_what_is_no_lock_is_named_or_does(name: str, kind: str, tmp_path: Path):
    OBSTACLES[kind](tmp_path / name)
    try:
        SaveFolder(tmp_path).close()
    except (OSError, UserError) as error:
        assert str(as_user_error(error, ["--save", str(tmp_path)])).startswith(f"--save {tmp_path / name}: ")
    else:
        assert name == HEARTBEAT


@pytest.mark.parametrize("folder", [".", "non_persistent"])
def test_a_folder_in_place_of_the_tracker_is_named_before_the_first_save(folder: str, tmp_path: Path):
    tracker = tmp_path / folder / TRACKER
    tracker.mkdir(parents=True)
    with pytest.raises(UserError, match=f"^{tracker}: is a folder where a file belongs; remove it"):
        SaveFolder(tmp_path)


def test_a_file_in_place_of_the_exports_is_named(tmp_path: Path):
    (tmp_path / "weighter").touch()
    with pytest.raises(UserError, match=rf"--save {tmp_path}/weighter: cannot be written \(Not a directory\)"):
        SaveFolder(tmp_path)


def test_a_folder_of_non_persistent_checkpoints_is_held_and_cleared_too(tmp_path: Path):
    scratch = tmp_path / "scratch"
    (scratch / ".iter_0000009.partial").mkdir(parents=True)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    held = SaveFolder(tmp_path / "one", scratch)
    assert (scratch / LOCK).is_file() and not (scratch / ".iter_0000009.partial").exists()

    def hold_in_another_process() -> None:
        with pytest.raises(UserError, match=f"--non-persistent-global-ckpt-dir {scratch}: "):
            SaveFolder(tmp_path / "two", scratch)

    process = multiprocessing.get_context("fork").Process(target=hold_in_another_process)
    process.start()
    process.join()
    held.close()
    assert process.exitcode == 0


@pytest.mark.parametrize("name", [".", "new", "new/below"])
def test_a_folder_in_a_checkpoint_is_refused(name: str, tmp_path: Path):
    checkpoint = tmp_path / "iter_0000004"
    checkpoint.mkdir()
    (checkpoint / "metadata.json").touch()
    with pytest.raises(UserError, match=f"^--save {checkpoint / name}: is in the checkpoint {checkpoint}, which may"):
        SaveFolder(checkpoint / name)
    SaveFolder(tmp_path / "iter_0000005" / name).close()  # of another program


@pytest.mark.parametrize("path", ["x" * 256, "x/" * 2500])
def test_a_path_that_is_too_long_is_named_with_its_flag(path: str):
    with pytest.raises(UserError, match=r"^--metrics-jsonl x.*: File name too long; give another path"):
        check_writable({"--metrics-jsonl": Path(path)})


@pytest.mark.parametrize("target", ["missing", "link"])
def test_a_link_that_leads_nowhere_is_named(target: str, tmp_path: Path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=f"--save {link / 'run'}: {link} is a link that leads nowhere; remove it"):
        check_writable({"--save": link / "run"})
