"""The process that writers of checkpoints leave their results in outlives signals to stop, and not its rank."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from multiprocessing.connection import Connection

import psutil
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_dwm.runtime.stop_signals import STOP_SIGNALS
from megatron_dwm.training.write_results import start_results_process


def rank(sender: Connection) -> None:
    filesystem_async._results_queue = None
    start_results_process()
    queue = filesystem_async._results_queue
    start_results_process()
    (process,) = psutil.Process().children()
    for number in STOP_SIGNALS:
        os.kill(process.pid, number)
    queue.put("written")
    sender.send((process.pid, queue.get(), queue is filesystem_async._results_queue))
    time.sleep(60)


def test_it_outlives_signals_to_stop_and_not_its_rank():
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=rank, args=(sender,))
    worker.start()
    pid, result, is_the_only_one = receiver.recv()
    assert result == "written" and is_the_only_one
    results_process = psutil.Process(pid)
    worker.kill()
    worker.join()
    with contextlib.suppress(psutil.NoSuchProcess):
        results_process.wait(timeout=10)
    assert not results_process.is_running()
