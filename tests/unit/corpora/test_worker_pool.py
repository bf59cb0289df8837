"""Workers give results in order, and the death of one is an error and not a wait without end."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from megatron_dwm.corpora.worker_pool import WorkerDiedError, WorkerPool


def chunks(number: int, size: int = 3) -> Iterator[list[int]]:
    items = iter(range(number))
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def square(item: int) -> int:
    return item * item


def double(item: bytes) -> bytes:
    return item + item


def same(item: int) -> int:
    return item


Workers: TypeAlias = Callable[[], list[multiprocessing.process.BaseProcess]]


@pytest.fixture
def workers() -> Workers:
    """Lists the pool's processes: those that were not there before, for other tests leave servers running."""
    before = set(multiprocessing.active_children())
    return lambda: [process for process in multiprocessing.active_children() if process not in before]


@pytest.mark.parametrize("number_of_workers", [1, 2, 5])
@pytest.mark.parametrize("number", [0, 1, 7, 1000])
def test_results_come_in_the_order_of_the_items(number_of_workers: int, number: int) -> None:
    with WorkerPool(square, number_of_workers) as pool:
        assert list(pool.map(chunks(number))) == [item * item for item in range(number)]


def test_large_chunks_and_results_do_not_block_each_other() -> None:
    """Each is many times what a pipe holds."""
    with WorkerPool(double, 2) as pool:
        results = list(pool.map([[bytes([number])] * 3 + [bytes(2**20)] for number in range(40)]))
    assert len(results) == 160 and len(results[-1]) == 2**21


def test_work_is_not_read_far_ahead_of_the_results() -> None:
    read = 0

    def counted() -> Iterator[list[int]]:
        nonlocal read
        for chunk in chunks(10_000, size=1):
            read += 1
            yield chunk

    with WorkerPool(same, 2) as pool:
        results = pool.map(counted())
        for number in range(500):
            next(results)
            assert read <= number + 2 * 8 + 1


def die(how: Callable[[], None], at: int) -> Callable[[int], int]:
    """A function that ends its process at one item."""

    def function(item: int) -> int:
        if item == at:
            how()
        return item

    return function


@pytest.mark.parametrize("at", [0, 5, 299])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "killed by SIGTERM"),
        (lambda: os._exit(3), "exit code 3"),
    ],
)
def test_a_worker_that_ends_is_an_error(how: Callable[[], None], message: str, at: int, workers: Workers) -> None:
    with WorkerPool(die(how, at), 3) as pool, pytest.raises(WorkerDiedError, match=message):
        list(pool.map(chunks(300)))
    assert workers() == []


@pytest.mark.parametrize("moment", ["before", "within", "after"])
@pytest.mark.parametrize("name", [signal.SIGKILL, signal.SIGSTOP])
def test_workers_that_are_killed_or_stopped_from_outside_do_not_hang_the_parent(
    name: signal.Signals, moment: str, workers: Workers
) -> None:
    """At any moment, the end of the work included; one that is stopped is waited for only while it owes results."""
    done = [item for chunk in chunks(300) for item in chunk]
    with WorkerPool(same, 3) as pool:
        processes = workers()

        def strike() -> None:
            for process in processes[:2]:
                assert process.pid is not None
                os.kill(process.pid, name)
            time.sleep(0.05)  # until it has happened

        if moment == "before" and name == signal.SIGKILL:
            strike()
            with pytest.raises(WorkerDiedError, match="killed by SIGKILL"):
                list(pool.map(chunks(300)))
        elif moment == "within" and name == signal.SIGKILL:
            results = pool.map(chunks(300))
            next(results)
            strike()
            with pytest.raises(WorkerDiedError, match="killed by SIGKILL"):
                list(results)
        else:
            assert list(pool.map(chunks(300))) == done
            strike()
    assert workers() == []


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path, workers: Workers) -> None:
    def parent() -> None:
        with WorkerPool(same, 3) as pool:
            pids = [process.pid for process in workers()]
            (tmp_path / "writing").write_text(" ".join(map(str, pids)))
            os.rename(tmp_path / "writing", tmp_path / "pids")
            for _ in pool.map(itertools.repeat([1])):
                time.sleep(0.01)

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    while not (tmp_path / "pids").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3
    while any(is_running(pid) for pid in pids):
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether there is such a process; one that has ended and that nobody has waited for is not running."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
