"""Ranks that do not come, or fall silent while a run starts, are named by those that wait, in one line."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_dwm.cli.launch import Process, _timeout, run_program
from megatron_dwm.runtime import peer_watch, rendezvous, startup_sync
from megatron_dwm.runtime.rendezvous import free_port
from tests.distributed.harness import become_rank

pytestmark = pytest.mark.waiting

FORK = multiprocessing.get_context("fork")
SECONDS = 6
"""That ranks are waited for, in place of minutes; more than a busy machine keeps a process waiting."""
MINUTES = "0.1"

Program = Callable[[Process], None]


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_dwm.cli.launch._timeout", lambda argv: timedelta(seconds=SECONDS))
    for module in (startup_sync, peer_watch):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(peer_watch, "LINGER_SECONDS", 0.8)
    monkeypatch.setattr(rendezvous, "LINGER_SECONDS", 2.0)


def start(
    folder: Path,
    ranks: list[int],
    world_size: int,
    program: Program,
    *,
    port: int | None = None,
    stopped: int | None = None,
) -> list[tuple[int | None, str]]:
    """Run these ranks; return of each its exit code and what it has printed.

    Args:
        stopped: the rank whose end is not waited for.
    """
    port = port or free_port()

    def work(rank: int) -> None:
        file = os.open(folder / f"{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        become_rank(rank, world_size, port)
        run_program(program, [])

    processes = [FORK.Process(target=work, args=(rank,)) for rank in ranks]
    for process in processes:
        process.start()
    for rank, process in zip(ranks, processes, strict=True):
        if rank != stopped:
            process.join(10 * SECONDS)
    found = [
        (process.exitcode, (folder / f"{rank}").read_text()) for rank, process in zip(ranks, processes, strict=True)
    ]
    for process in processes:
        process.kill()
        process.join()
    return found


def never(process: Process) -> None:
    raise AssertionError("the ranks have not all met")


def test_ranks_that_do_not_come_are_named_by_the_first(tmp_path: Path):
    first, second = start(tmp_path, [0, 2], 4, never)
    assert first == (2, f"error: ranks 1, 3 of 4 {first[1].partition(' of 4 ')[2]}")
    assert "did not join at MASTER_ADDR=127.0.0.1" in first[1] and first[1].count("\n") == 1
    assert second == (2, "")


def test_a_first_rank_that_does_not_come_is_named(tmp_path: Path):
    ((code, text),) = start(tmp_path, [1], 2, never)
    assert code == 2 and f"rank 0 was not reached for {MINUTES} minutes (Connection refused)" in text
    assert text.startswith("error: MASTER_ADDR=127.0.0.1 MASTER_PORT=") and text.count("\n") == 1


def test_a_first_rank_that_does_not_come_to_a_launchers_store_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    ((code, text),) = start(tmp_path, [1], 2, never, port=store.port)
    assert (code, text) == (
        2,
        "error: rank 0 did not start, or was killed, while the ranks were joining; see its output\n",
    )


def signaled(victim: int, number: signal.Signals) -> Program:
    """Return a program in which one rank gets a signal before the ranks have agreed on anything."""

    def program(process: Process) -> None:
        if process.rank == victim:
            os.kill(os.getpid(), number)
        with process.startup_sync.phase("anything"):
            pass

    return program


@pytest.mark.parametrize(("number", "victim"), [(signal.SIGKILL, 2), (signal.SIGSTOP, 1), (signal.SIGSTOP, 0)])
def test_a_rank_that_falls_silent_before_the_others_have_agreed_is_named(
    number: signal.Signals, victim: int, tmp_path: Path
):
    stopped = victim if number == signal.SIGSTOP else None
    found = start(tmp_path, [0, 1, 2], 3, signaled(victim, number), stopped=stopped)
    assert found[victim] == (-number if number == signal.SIGKILL else None, "")
    others = found[:victim] + found[victim + 1 :]
    assert [code for code, _ in others] == [2, 2]
    text = "".join(text for _, text in others)
    lines = text.splitlines()
    expected = f"error: rank {victim} did not answer for {MINUTES} minutes while the run started"
    assert lines and all(line.startswith(expected) for line in lines) and len(lines) == (2 if victim == 0 else 1), text


def test_a_first_rank_that_is_killed_before_the_others_have_agreed_is_named(tmp_path: Path):
    killed, (code, text) = start(tmp_path, [0, 1], 2, signaled(0, signal.SIGKILL))
    assert killed == (-signal.SIGKILL, "") and code == 2
    assert text.splitlines()[-1].startswith("error: rank 0 ended while the r")  # run started, or ranks were joining


def test_a_run_that_ctrl_c_ends_says_so_in_one_line(tmp_path: Path):
    (first, text), last = start(tmp_path, [0, 1], 2, signaled(1, signal.SIGINT))
    assert (first, text) == (130, "") and last[0] == 130, text + last[1]
    assert last[1].startswith("error: SIGINT (Ctrl-C) has ended the run") and last[1].count("\n") == 1


def test_a_rank_that_has_started_or_ended_is_not_silent(tmp_path: Path):
    """The first rank still works when the others have been done for longer than a silent rank is waited for."""

    def work(process: Process) -> None:
        if process.rank == 1:
            process.startup_sync.end()
        if process.rank != 2:
            time.sleep(SECONDS + 2)

    assert start(tmp_path, [0, 1, 2], 3, work) == [(0, "")] * 3


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        ({"MASTER_PORT": "x"}, ("MASTER_PORT=x", "1 to 65535")),
        ({"MASTER_ADDR": "nowhere.invalid"}, ("MASTER_ADDR=nowhere.invalid", "rank 0 was not reached", "not known")),
        ({"MASTER_ADDR": "nowhere.invalid", "RANK": "0"}, ("MASTER_ADDR=nowhere.invalid: ", "not known")),
        ({"MASTER_ADDR": ""}, ("MASTER_ADDR is empty",)),
    ],
)
def test_a_meeting_point_that_is_none_is_one_line(
    environment: dict[str, str], parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    for name, value in (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "29500"} | environment
    ).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        run_program(never, [])
    text = capfd.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and all(part in text for part in parts), text


def test_a_port_that_is_taken_is_one_line(tmp_path: Path):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ((code, text),) = start(tmp_path, [0], 1, never, port=store.port)
    assert code == 2 and text.count("error: ") == 1 and "address already in use" in text


def test_a_rank_that_is_signaled_while_it_waits_for_others_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    rank = FORK.Process(target=run_program, args=(never, ["--exit-signal-handler"]))
    rank.start()
    while not is_listening(int(environment["MASTER_PORT"])):
        time.sleep(0.05)
    os.kill(rank.pid or 0, signal.SIGTERM)
    rank.join()
    error = capfd.readouterr().err
    assert (rank.exitcode, error.count("\n")) == (75, 1), error
    assert error.startswith("error: SIGTERM received during start-up: there is nothing to save"), error


def is_listening(port: int) -> bool:
    """Whether the store is there, and with it what takes signals."""
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    ("argv", "minutes"),
    [
        ([], 10),
        (["--lr", "1", "--distributed-timeout-minutes", "3"], 3),
        (["--distributed-timeout-minutes=4", "--lr", "1"], 4),
        (["--distributed-timeout-minutes", "x"], 10),
        (["--distributed-timeout-minutes"], 10),
        (["--distributed-timeout-minutes", "0"], 10),
    ],
)
def test_the_time_is_that_of_collectives(argv: list[str], minutes: int):
    assert _timeout(argv) == timedelta(minutes=minutes)
