"""Preprocessing that is killed: nothing half-made is left in place, and finished work is not done again."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.corpora import preprocess as preprocess_module
from megatron_dwm.corpora.preprocess import PreprocessConfig, preprocess
from megatron_dwm.corpora.unfinished import unfinished_work
from megatron_dwm.data.validation import check_dataset
from megatron_dwm.errors import UserError
from tests.e2e.test_preprocess import NUMBERS, hashes, run_tool, write_lines
from tests.programs import start_program


def test_a_worker_that_is_killed_ends_the_command_in_one_line(tmp_path: Path) -> None:
    """The tool reads a named pipe, so that it is at work while its workers are killed."""
    pipe = tmp_path / "texts.jsonl"
    os.mkfifo(pipe)
    flags = ["--input", pipe, *NUMBERS, "--workers", 3, "--output-prefix", tmp_path / "out" / "made"]
    tool = start_program("tools/preprocess_data.py", *flags)
    lines = '{"text": "1"}\n' * 32 * 30
    with pipe.open("w") as file:
        file.write(lines)
        file.flush()
        for child in psutil.Process(tool.process.pid).children():
            child.kill()
        with contextlib.suppress(BrokenPipeError):
            file.write(lines)
            file.close()
    result = tool.finish()
    assert (result.returncode, result.stdout) == (2, "")
    said = "a worker process ended (killed by SIGKILL); give fewer workers or more memory"
    assert result.stderr == f"error: --workers 3: {said}\n"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("at", "found"),
    # Both files get a second name and are synced, the old index goes, the folder is synced; both files are synced,
    # moved, the folder synced.
    enumerate(["old"] * 5 + ["none"] * 5 + ["new"]),
)
def test_a_kill_while_files_are_put_in_place_leaves_no_data_beside_another_index(
    at: int, found: str, tmp_path: Path
) -> None:
    """The old and the new data have the same size, so that only the index would show which of them is there."""
    old, new = (write_lines(tmp_path / name, [f'{{"text": "{text}"}}']) for name, text in (("o", "1 2"), ("n", "3 4")))
    prefix = str(tmp_path / "out" / "made")
    null = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=100)
    preprocess(PreprocessConfig(input=[str(old)], output_prefix=prefix), null)

    def killed() -> None:
        publish = preprocess_module.publish_datasets
        preprocess_module.publish_datasets = lambda *arguments: (count_calls(), publish(*arguments))
        preprocess(PreprocessConfig(input=[str(new)], output_prefix=prefix), null)

    def count_calls() -> None:
        calls = itertools.count()
        for name in ("link", "replace", "unlink", "fsync"):
            function = getattr(os, name)

            def counted(*arguments: Any, function: Callable[..., Any] = function, **options: Any) -> Any:
                if next(calls) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            setattr(os, name, counted)
            if hasattr(pathlib, "_normal_accessor"):  # Python 3.10's paths keep the functions that os had at first
                setattr(pathlib._normal_accessor, name, counted)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    data = f"{prefix}_text_document"
    if found == "none":
        with pytest.raises(UserError, match=rf"{data}.idx does not exist"):
            check_dataset("data", data, 101)
    else:
        check_dataset("data", data, 101)
        whole = IndexedDataset(data)
        assert whole[0].tolist() == {"old": [1, 2], "new": [3, 4]}[found]
    preprocess(PreprocessConfig(input=[str(new)], output_prefix=prefix), null)  # the same command ends what it began
    whole = IndexedDataset(data)
    assert whole[0].tolist() == [3, 4]


def test_a_kill_while_finished_work_is_removed_does_not_spoil_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--input", write_lines(tmp_path / "texts.jsonl", ['{"text": "1 2"}']), *NUMBERS]
    argv += ["--output-prefix", str(tmp_path / "out" / "made")]

    def killed() -> None:
        def partly(folder: Path, **options: Any) -> None:
            if folder.name == ".made.unfinished":  # its files go one by one, in any order
                (folder / "000000" / "part0_text_document.bin").unlink()
                os.kill(os.getpid(), signal.SIGKILL)

        shutil.rmtree = partly
        run_tool(monkeypatch, *argv)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert run_tool(monkeypatch, *argv) == 0
    assert not list((tmp_path / "out").glob(".*"))


def test_killed_work_goes_on_behind_its_last_finished_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed at record 75 of 100, it has three segments of 20; another input, or another flag, begins anew."""
    source = write_lines(
        tmp_path / "texts.jsonl", [f'{{"text": "{n} {n + 1}"}}' if n % 7 else "bad" for n in range(100)]
    )
    argv = ["--input", source, *NUMBERS, "--skip-malformed", "--resume-interval", "20", "--output-prefix"]
    assert run_tool(monkeypatch, *argv, tmp_path / "whole" / "made") == 0
    capsys.readouterr()

    def killed() -> None:
        add, calls = preprocess_module.DatasetWriter.add, itertools.count()

        def counted(self: Any, document: Any) -> None:
            if next(calls) == 64:  # of those that are documents
                os.kill(os.getpid(), signal.SIGKILL)
            add(self, document)

        preprocess_module.DatasetWriter.add = counted
        run_tool(monkeypatch, *argv, tmp_path / "out" / "made")

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = tmp_path / "out" / ".made.unfinished"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [kept.name]
    for name in ("changed", "damaged"):
        shutil.copytree(kept, tmp_path / name / kept.name)
    assert run_tool(monkeypatch, *argv, tmp_path / "out" / "made") == 0
    said = capsys.readouterr()
    assert "Continuing after 60 documents" in said.out
    assert "15 malformed documents were skipped, the first" in said.err and "line 1:" in said.err
    assert hashes(tmp_path / "out", ["text"]) == hashes(tmp_path / "whole", ["text"])
    assert run_tool(monkeypatch, *argv, tmp_path / "changed" / "made", "--append-eod") == 0
    assert "Going on" not in capsys.readouterr().out
    (tmp_path / "damaged" / kept.name / "000002" / "done.json").write_text("{")
    assert run_tool(monkeypatch, *argv, tmp_path / "damaged" / "made") == 0
    assert "Continuing after 40 documents" in capsys.readouterr().out
    assert hashes(tmp_path / "damaged", ["text"]) == hashes(tmp_path / "whole", ["text"])
    with unfinished_work(tmp_path / "busy" / kept.name, None):
        done = multiprocessing.get_context("fork").Process(
            target=lambda: sys.exit(run_tool(monkeypatch, *argv, tmp_path / "busy" / "made"))
        )
        done.start()
        done.join()
    assert done.exitcode == 2 and not (tmp_path / "busy" / kept.name).exists()


def test_a_file_system_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with unfinished_work(tmp_path / "work", None) as work:
        assert work.folder.is_dir()
    assert f"{tmp_path / 'work'}: its file system has no locks (No locks available)" in caplog.text
