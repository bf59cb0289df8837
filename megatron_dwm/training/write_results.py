"""The process that collects the results of a rank's checkpoint writers.

megatron-core starts one at a rank's first save. It imports torch again, is killed by the signals that ask a run to
save and stop, after which saving is impossible, and outlives a rank that is killed. This one does none of these.
"""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.managers import SyncManager

import torch

from megatron_dwm.runtime.child_processes import end_with_parent
from megatron_dwm.runtime.stop_signals import STOP_SIGNALS


def start_results_process() -> None:
    """Start the process, unless this rank has one; called before the model is built, while a fork is cheap."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        # A process with a CUDA context must not be forked.
        context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
        manager = SyncManager(ctx=context)
        manager.start(initializer=_serve_until_rank_exits)
        filesystem_async._results_queue = manager.Queue()


def _serve_until_rank_exits() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    rank = multiprocessing.parent_process()
    if rank is not None and rank.pid is not None:
        end_with_parent(rank.pid)
