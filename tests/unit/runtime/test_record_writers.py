"""Records that a run writes and a resumed run takes up."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import shutil
import threading
from pathlib import Path

import pytest

from megatron_dwm.errors import UserError, run_cli
from megatron_dwm.runtime.record_writers import JsonLinesWriter, TensorBoardWriter
from tests.programs import Fork
from tests.unit.obstacles import OBSTACLES


def test_a_resumed_run_drops_the_records_that_it_writes_again(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLinesWriter(path, resumed_at=0)
    for iteration in range(1, 6):
        first.write({"kind": "train", "iteration": iteration})
    first.close()
    with path.open("a") as file:
        file.write('{"kind": "tra')  # an interrupted write
    JsonLinesWriter(path, 4, lambda record: record["iteration"] in (1, 4)).close()  # asked of iteration 4 alone
    again = JsonLinesWriter(path, resumed_at=3)
    assert path.read_text().count("\n") == 3
    again.write({"kind": "train", "iteration": 4})
    again.close()
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_records_of_a_file_that_was_removed_go_to_a_new_one(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "save" / "metrics.jsonl"
    writer = JsonLinesWriter(path, resumed_at=0)
    writer.write({"iteration": 1})
    shutil.rmtree(path.parent)
    with caplog.at_level(logging.WARNING):
        writer.write({"iteration": 2})
        writer.write({"iteration": 3})
    writer.close()
    assert caplog.messages == [f"{path} was removed; earlier records are lost"]
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [2, 3]


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--metrics-jsonl .*file/metrics\.jsonl"):
        JsonLinesWriter(tmp_path / "file" / "metrics.jsonl", resumed_at=0)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"--metrics-jsonl .*pipe is a named pipe"):
        JsonLinesWriter(tmp_path / "pipe", resumed_at=0)


@pytest.mark.parametrize("kind", [kind for kind in OBSTACLES if kind != "file"])
def test_what_is_in_the_place_of_damaged_lines_is_named(kind: str, tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("damaged\n")
    aside = tmp_path / "metrics.jsonl.damaged"
    OBSTACLES[kind](aside)
    with pytest.raises(UserError, match=rf"jsonl: cannot be written \({aside}: "):
        JsonLinesWriter(tmp_path / "metrics.jsonl", resumed_at=1)
    assert (tmp_path / "metrics.jsonl").read_text() == "damaged\n"


@pytest.mark.parametrize("resumed_at", [0, 1])
def test_records_of_a_run_that_goes_on_are_not_replaced(resumed_at: int, tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLinesWriter(path, resumed_at=0)
    first.write({"iteration": 1})
    other = Fork(lambda: run_cli(lambda: JsonLinesWriter(path, resumed_at).close())).finish()
    said = f"--metrics-jsonl {path}: another run is writing there; end it, or give another path"
    assert (other.returncode, other.stderr) == (2, f"error: {said}\n")
    first.write({"iteration": 2})
    first.close()
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 2}\n'
    assert Fork(lambda: JsonLinesWriter(path, resumed_at).close()).finish().returncode == 0


def test_curves_that_cannot_be_written_are_lost_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    tracebacks: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--tensorboard-dir .*file: cannot be written \(.+\); give another folder"):
        TensorBoardWriter(str(tmp_path / "file"), queue_size=1)
    board = TensorBoardWriter(str(tmp_path / "board"), queue_size=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as on a full disk
    try:
        with caplog.at_level(logging.WARNING):
            for iteration in range(20):
                board.scalar("loss", 1.0, iteration, samples=8 * iteration)
            board.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (message,) = caplog.messages
    assert message.startswith(f"--tensorboard-dir {tmp_path / 'board'}: cannot be written ([Errno 27] File too large")
    assert not tracebacks
    assert threading.excepthook == tracebacks.append  # as it was before
    other = TensorBoardWriter(str(tmp_path / "other"), queue_size=1)
    failing = threading.Thread(target=int, args=("x",))
    failing.start()
    failing.join()
    assert [arguments.exc_type for arguments in tracebacks] == [ValueError]  # of other threads they are printed
    other.close()


def test_tensorboard_keeps_as_many_records_as_the_flag_says_before_it_writes(tmp_path: Path):
    board = TensorBoardWriter(str(tmp_path), queue_size=7)
    assert board._writer.file_writer.event_writer._async_writer._byte_queue.maxsize == 7
    board.close()


def test_a_new_run_leaves_the_records_of_another_beside(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    JsonLinesWriter(path, 0).close()  # a run that was ended before its first record leaves nothing to keep
    for resumed_at, iteration in ((0, 1), (0, 2), (2, 3), (2, 4)):
        records = JsonLinesWriter(path, resumed_at)
        records.write({"iteration": iteration})
        records.close()
    assert path.read_text() == '{"iteration": 2}\n{"iteration": 4}\n'
    (kept,) = tmp_path.glob("metrics.until-*.jsonl")
    assert kept.read_text() == '{"iteration": 1}\n'


def test_lines_that_are_no_records_are_set_aside_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "metrics.jsonl"
    damaged = [b"not json\n", b"[1, 2]\n", b'{"iteration": "x"}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n"]
    path.write_bytes(b'{"iteration": 1}\n' + b"".join(damaged) + b'{"iteration": 2}\n{"kind": "health"}\n')
    with caplog.at_level(logging.WARNING):
        JsonLinesWriter(path, resumed_at=1).close()
    assert path.read_bytes() == b'{"iteration": 1}\n{"kind": "health"}\n'
    assert path.with_name("metrics.jsonl.damaged").read_bytes() == b"".join(damaged)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.jsonl.damaged"]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path):
    records = JsonLinesWriter(tmp_path / "metrics.jsonl", resumed_at=0)
    records.write({"lm_loss": math.nan, "samples": {"weight": [1.0, math.inf], "loss": (-math.inf,)}, "iteration": 3})
    records.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found == {"lm_loss": None, "samples": {"weight": [1.0, None], "loss": [None]}, "iteration": 3}


def test_a_full_disk_loses_records_and_not_the_run(caplog: pytest.LogCaptureFixture):
    records = JsonLinesWriter(Path("/dev/full"), resumed_at=0)  # every write to it fails as on a full disk
    with caplog.at_level(logging.WARNING):
        for iteration in range(3):
            records.write({"iteration": iteration})
        records.close()
    (message,) = caplog.messages
    assert message == "/dev/full: cannot be written (No space left on device); records are lost"
