"""Run a function on several forked gloo workers, so that only the parent spends time on imports."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.managers import SyncManager
from typing import Any, TypeVar

import megatron.core  # noqa: F401  imported here so that workers inherit it
import torch
import torch.distributed as dist

from megatron_dwm.runtime.device import select_device
from tests.turns import turn

Result = TypeVar("Result")


class WorkerTraceback(Exception):
    """The traceback of the worker that failed first; the cause of what :func:`run_distributed` raises."""


def run_distributed(fn: Callable[..., Result], world_size: int, *args: Any) -> list[Result]:
    """Call ``fn(*args)`` in ``world_size`` forked processes that share a gloo process group.

    Args:
        fn: any callable, closures included; what it returns must pickle.

    Returns:
        what each rank returned, by rank.

    Raises:
        Exception: the error of the worker that failed first, with its traceback as the cause. The other
            workers are ended.
    """
    with turn(world_size):
        return _run(fn, world_size, args)


def _run(fn: Callable[..., Result], world_size: int, args: tuple[Any, ...]) -> list[Result]:
    context = multiprocessing.get_context("fork")
    # The workers inherit the bound socket, so nobody can take its port before rank 0 listens on it.
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    workers, pipes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(sender, rank, world_size, listener, fn, args), daemon=True)
        worker.start()
        sender.close()  # the worker's copy stays; when the worker dies the receiver sees the end of the pipe
        workers.append(worker)
        pipes.append(receiver)
    try:
        return _collect(pipes, workers)
    finally:
        listener.close()
        for worker in workers:
            worker.kill()
            worker.join()


def _collect(pipes: list[Connection], workers: list[Any]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        failures = []
        for pipe in wait(waiting):
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                finished, payload = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                workers[rank].join()
                raise RuntimeError(f"rank {rank} died with exit code {workers[rank].exitcode}") from None
            if finished:
                results[rank] = payload
            else:
                failures.append((payload["time"], rank, payload))
        if failures:
            _, rank, failure = min(failures, key=lambda item: item[:2])
            raise failure["error"] from WorkerTraceback(f"on rank {rank}:\n{failure['traceback']}")
    return [results[rank] for rank in range(len(pipes))]


def _work(
    sender: Connection,
    rank: int,
    world_size: int,
    listener: socket.socket,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    # Plain pickle: multiprocessing's would send tensors as handles to memory that ends with this process.
    try:
        message = pickle.dumps((True, _call(rank, world_size, listener, fn, args)))
    except BaseException as error:
        message = _failure(error)
    sender.send_bytes(message)
    sys.stdout.flush()
    # Stay until the parent ends this process: the other ranks may still need its connections.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()


def _call(rank: int, world_size: int, listener: socket.socket, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    port = listener.getsockname()[1]
    become_rank(rank, world_size, port)
    select_device(rank)
    store = dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=rank == 0,
        wait_for_workers=False,
        master_listen_fd=listener.detach() if rank == 0 else None,
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=5))
    return fn(*args)


@functools.cache
def checkpoint_manager() -> SyncManager:
    """Return the process in which megatron-core keeps a rank's list of written files.

    megatron-core starts one at each rank's first checkpoint, and that process imports torch to hold the first entry;
    this one is a fork, and serves all runs.
    """
    return multiprocessing.get_context("fork").Manager()


def become_rank(rank: int, world_size: int, port: int) -> None:
    """Give this process the environment that torchrun gives a rank, one thread, and the usual handling of signals.

    Tests in the background ignore SIGINT, and under nohup SIGHUP.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)


def _failure(error: BaseException) -> bytes:
    report = {"time": time.monotonic(), "traceback": traceback.format_exc(), "error": error}
    try:
        message = pickle.dumps((False, report))
        pickle.loads(message)
    except Exception:
        report["error"] = RuntimeError(f"{type(error).__name__}: {error}")
        message = pickle.dumps((False, report))
    return message
