"""What could not be written is one line that names the flag."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader

from megatron_dwm.errors import (
    UserError,
    as_user_error,
    flush_output,
    print_error,
    renamed_flags,
    reported_write_failure,
    write_failure_reason,
)


def write_tokenizer() -> None:
    Tokenizer(WordLevel({"a": 0}, "a")).save("/dev/full")


def write_text() -> None:
    Path("/dev/full").write_text("a")


@pytest.mark.parametrize("write", [write_tokenizer, write_text])
def test_a_full_disk_names_the_flag_and_the_folder(write: Callable[[], None]):
    with (
        pytest.raises(UserError, match=r"^--output out: cannot be written \(.*No space left on device") as raised,
        reported_write_failure("--output", "out"),
        reported_write_failure("--output", "out"),  # as one function of an export calls another
    ):
        write()
    assert (
        str(raised.value).endswith("; make room, or give another folder") and str(raised.value).count("make room") == 1
    )


def test_a_loop_of_links_is_a_users_error(tmp_path: Path):
    (tmp_path / "loop").symlink_to("loop")
    for find in (lambda: (tmp_path / "loop").resolve(strict=True), lambda: (tmp_path / "loop").open()):
        with pytest.raises((OSError, RuntimeError)) as raised:
            find()
        assert str(tmp_path / "loop") in str(as_user_error(raised.value))
        assert isinstance(as_user_error(raised.value), UserError)


@pytest.mark.parametrize(
    ("words", "path", "flag"),
    [
        (["--load", "{tmp}/a", "--save", "{tmp}/a/b"], "a/b/folder", "--save"),
        (["--save={tmp}/a"], "a", "--save"),
        (["--data-path", "0.5", "{tmp}/a", "0.5", "{tmp}/b", "--bf16"], "b.idx", "--data-path"),
        (["--output-prefix", "{tmp}/a"], ".a.unfinished/lock", "--output-prefix"),
    ],
)
def test_what_is_in_the_way_names_the_flag(words: list[str], path: str, flag: str, tmp_path: Path):
    (tmp_path / path).mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as raised:
        (tmp_path / path).open()
    words = [word.format(tmp=tmp_path) for word in words]
    assert str(as_user_error(raised.value, words)) == (
        f"{flag} {tmp_path / path}: Is a directory; check what is there, or give another path"
    )


@pytest.mark.parametrize("words", [["--save", "ab"], ["--save", "{tmp}/a"], ["--save", ""], []])
def test_a_path_that_no_flag_names_is_no_users_error(words: list[str], tmp_path: Path):
    with pytest.raises(FileNotFoundError) as raised:
        (tmp_path / "ab").open()
    assert as_user_error(raised.value, [word.format(tmp=tmp_path) for word in words]) is raised.value


def test_a_link_that_leads_nowhere_is_named_as_one(tmp_path: Path):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError) as raised:
        (tmp_path / "link").open()
    assert ": a link that leads nowhere; " in str(as_user_error(raised.value, ["--save", str(tmp_path)]))


class Killing:
    """A dataset whose reader is killed, as for lack of memory."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_data_loaders_process_that_was_killed_is_a_users_error():
    with pytest.raises(RuntimeError) as raised:
        list(DataLoader(cast(Any, Killing()), num_workers=1))
    error = as_user_error(raised.value)
    assert isinstance(error, UserError)
    assert re.match(r"--num-workers: DataLoader worker \(pid.*\).*; give fewer workers or more memory", str(error))


def test_too_many_open_files_name_the_limit(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # fewer than are open
    try:
        with pytest.raises(OSError, match="Too many open files") as raised:
            (tmp_path / "file").touch()
        found = as_user_error(raised.value, ["--save", str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert str(found).startswith("Too many open files: more than ulimit -n 3 allows; raise it, or give fewer")
    of_gloo = RuntimeError("[enforce fail at socket.cc:24] rv != -1. -1 vs -1. socket: Too many open files")
    assert isinstance(as_user_error(of_gloo), UserError)


def test_other_errors_stay_what_they_are():
    with pytest.raises(FileNotFoundError), reported_write_failure("--output", "out"):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "in")


def test_an_array_that_numpy_has_cut_is_a_failure_to_write(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # as on a full disk
    try:
        with pytest.raises(OSError, match="requested and") as raised:
            np.save(tmp_path / "array.npy", np.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno is None
    assert write_failure_reason(raised.value) == "a file could not be written to its end"


def test_an_error_names_the_flags_that_the_user_has_given():
    with (
        pytest.raises(UserError, match=r"^--scores a.jsonl: is not --input-format x; see --tasks, not --scores$"),
        renamed_flags({"--input": "--scores", "--task": "--other"}),
    ):
        raise UserError("--input a.jsonl: is not --input-format x; see --tasks, not --input")


def test_an_error_that_cannot_be_printed_raises_no_other(monkeypatch: pytest.MonkeyPatch):
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    monkeypatch.setattr(sys, "stderr", stream)
    print_error(UserError("nobody reads this"))
    flush_output()
    with pytest.raises(BrokenPipeError):
        stream.close()
