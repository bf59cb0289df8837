"""A pool of processes that apply a function to chunks of work, in order; it notices when one of them dies.

The standard library's pools share one queue, with one lock, between all workers: a worker that is killed while it waits
there leaves the lock taken, and the others, and the parent that waits for them, hang. Here each worker has its own
pipe, whose end is seen as soon as the worker is gone.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_CHUNKS_AHEAD = 8  # chunks in flight for each worker, which bounds the memory
_PATIENCE = 5  # seconds to wait for the exit of a worker after its pipe was closed


class WorkerDiedError(Exception):
    """A worker that ended before its work did; the message says how."""


class WorkerPool(Generic[Item, Result]):
    """Forked processes, within a ``with`` block, that apply one function to the items of chunks."""

    def __init__(self, function: Callable[[Item], Result], workers: int) -> None:
        self._function, self._number = function, workers
        self._processes: list[multiprocessing.context.ForkProcess] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> WorkerPool[Item, Result]:
        context = multiprocessing.get_context("fork")  # the function and what it has loaded are inherited
        for _ in range(self._number):
            pipe, worker_end = context.Pipe()
            self._pipes.append(pipe)
            process = context.Process(target=_work, args=(worker_end, self._pipes, self._function), daemon=True)
            process.start()
            worker_end.close()  # then only the worker holds this end, and its death closes the pipe
            self._processes.append(process)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:  # they hold nothing that is still needed, and may be stopped or stuck
            process.kill()
            process.join()

    def map(self, chunks: Iterable[list[Item]]) -> Iterator[Result]:
        """Yield the results of all items of all chunks, in order.

        Raises:
            WorkerDiedError: a worker ended.
        """
        pending: deque[int] = deque()  # the workers that owe a chunk of results, in the order of the chunks
        for number, chunk in enumerate(chunks):
            worker = number % self._number
            if len(pending) == _CHUNKS_AHEAD * self._number:
                yield from self._receive(pending.popleft())
            try:
                self._pipes[worker].send(chunk)
            except ConnectionError:
                raise self._death_of(worker) from None
            pending.append(worker)
        while pending:
            yield from self._receive(pending.popleft())

    def _receive(self, worker: int) -> list[Result]:
        try:
            results: list[Result] = self._pipes[worker].recv()
        except (EOFError, ConnectionError):
            raise self._death_of(worker) from None
        return results

    def _death_of(self, worker: int) -> WorkerDiedError:
        process = self._processes[worker]
        process.join(_PATIENCE)
        code = process.exitcode
        if code is not None and code < 0:
            return WorkerDiedError(f"killed by {signal.Signals(-code).name}")
        return WorkerDiedError(f"exit code {code}")


def _work(pipe: Connection, parent_ends: list[Connection], function: Callable[[Item], Result]) -> None:
    """Apply ``function`` to what comes through ``pipe`` until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends its workers
    for inherited in parent_ends:  # else this process would keep the pipes open when the parent is gone
        inherited.close()
    # Chunks are taken from the pipe while results wait to be read: else both sides could wait for each other to read.
    chunks: queue.SimpleQueue[list[Item] | None] = queue.SimpleQueue()
    threading.Thread(target=_take_chunks, args=(pipe, chunks), daemon=True).start()
    while (chunk := chunks.get()) is not None:
        results = [function(item) for item in chunk]
        try:
            pipe.send(results)
        except ConnectionError:  # the parent is gone
            return


def _take_chunks(pipe: Connection, chunks: queue.SimpleQueue[list[Item] | None]) -> None:
    try:
        while True:
            chunks.put(pipe.recv())
    except (EOFError, OSError):
        chunks.put(None)
