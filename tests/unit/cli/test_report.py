"""``report --follow``: runs that start, that never make a step, that are killed, and whose records are damaged."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dwm.cli import report
from megatron_dwm.errors import UserError
from megatron_dwm.training.folder_lock import HEARTBEAT, LEASE_SECONDS

STEP = '{"kind": "train", "iteration": 1, "lm_loss": 2.5}\n'
RUNNING = '{"status": "running"}'


@pytest.fixture
def follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], list[int | None]]:
    """Follow the run in ``tmp_path`` and call the argument in place of each pause.

    Returns, for each page, after how many seconds it loads itself again.
    """
    pages: list[int | None] = []
    monkeypatch.setattr(report, "_write", lambda config, paths, runs, seconds: pages.append(seconds))

    def run(meanwhile: Callable[[], object]) -> list[int | None]:
        monkeypatch.setattr(time, "sleep", lambda _: meanwhile())
        report._follow(report.ReportConfig(run=[str(tmp_path)]), [tmp_path], 7)
        return pages

    return run


def never() -> None:
    raise AssertionError("it waits")


def test_a_run_that_starts_is_waited_for(follow: Callable[..., list[int | None]], tmp_path: Path):
    heartbeat, records = tmp_path / HEARTBEAT, tmp_path / "metrics.jsonl"
    heartbeat.touch()

    def go_on() -> None:
        if not records.exists():
            records.write_text(STEP)
        else:
            heartbeat.unlink()

    assert follow(go_on) == [7, None]


def test_a_run_that_ends_without_a_step_is_named(
    follow: Callable[..., list[int | None]], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    (tmp_path / HEARTBEAT).touch()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"metrics\.jsonl: contains no training step; give a run that has made one"):
        follow((tmp_path / HEARTBEAT).unlink)
    assert caplog.messages == ["waiting for the first training step"]


@pytest.mark.parametrize("status", ["", RUNNING])
def test_a_killed_run_has_ended(status: str, follow: Callable[..., list[int | None]], tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(STEP)
    (tmp_path / "run_status.json").write_text(status)
    (tmp_path / HEARTBEAT).touch()
    long_ago = time.time() - LEASE_SECONDS - 1
    os.utime(tmp_path / HEARTBEAT, (long_ago, long_ago))
    assert follow(never) == [None]


def test_damaged_records_are_not_waited_for(follow: Callable[..., list[int | None]], tmp_path: Path):
    (tmp_path / "run_status.json").write_text(RUNNING)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="line 1: the record lacks 'kind'"):
        follow(never)


def test_a_folder_that_does_not_exist_is_named(follow: Callable[..., list[int | None]], tmp_path: Path):
    tmp_path.rmdir()
    with pytest.raises(UserError, match="no such file; give a run's --save folder"):
        follow(never)
