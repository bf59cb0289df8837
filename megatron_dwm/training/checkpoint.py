"""Writing of checkpoints, in megatron-core's format ``torch_dist`` or in Megatron-LM's older format, ``torch``.

A checkpoint's folder (``checkpoint_folders.py``) holds what ``checkpoint_contents.py`` names, the weighting's state in
``dwm_state.pt`` and the checksums of all files. It is written under a temporary name and renamed when complete, so an
interrupted save loses nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.atomic_write import atomic_files, delete_folder, publish_folder, remove
from megatron_dwm.config.checkpoint import TRACKER, CheckpointConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.errors import UserError, write_failure_reason
from megatron_dwm.model.optimizer_parts import optimizer_parts
from megatron_dwm.model.protocols import Optimizer
from megatron_dwm.runtime.compat import sharded_save_options
from megatron_dwm.runtime.device import current_device
from megatron_dwm.runtime.logging import timestamp
from megatron_dwm.runtime.process_groups import ParallelState
from megatron_dwm.safe_unpickling import short_reason
from megatron_dwm.training.checkpoint_checksums import write_checksums, write_rank_checksums
from megatron_dwm.training.checkpoint_contents import (
    PerParameter,
    common_state,
    comparable,
    data_parallel_group,
    sharded_state,
    sharding_metadata,
)
from megatron_dwm.training.checkpoint_folders import (
    DWM_STATE,
    checkpoints_in,
    delete_retired,
    iteration_folder,
    iteration_of,
    non_persistent_folder,
    retired_mark,
    tracked,
)
from megatron_dwm.training.optimizer import allocate_state
from megatron_dwm.training.progress_log import ProgressLog
from megatron_dwm.training.save_folder import SaveFolder
from megatron_dwm.training.torch_format import write_torch_state
from megatron_dwm.training.train_state import TrainComponents, TrainState
from megatron_dwm.weighting.policy import PER_PARAMETER

logger = logging.getLogger(__name__)

KEPT_NON_PERSISTENT = 2
"""The one that is being written, and the one before it, which a run that is killed meanwhile continues from."""


class CheckpointWriter:
    """Writes checkpoints; with ``--async-save`` in the background.

    Every method is collective.
    """

    def __init__(
        self,
        flags: CheckpointConfig,
        parallel: ParallelConfig,
        arguments: Mapping[str, Any],
        components: TrainComponents,
        parallel_state: ParallelState,
        save_folder: SaveFolder | None = None,
        progress: ProgressLog | None = None,
    ) -> None:
        """
        Args:
            arguments: the arguments of the run, which checkpoints hold.
            save_folder: the locked folder, on the first rank; it is released when the writer is closed.
            progress: the log in which checkpoints are noted.
        """
        self.flags, self.parallel, self.arguments = flags, parallel, arguments
        self.components, self.parallel_state = components, parallel_state
        self._save_folder, self._progress = save_folder, progress or ProgressLog(None)
        self._queue: Any = None
        self._pending: tuple[Path, Path, int]
        """Folder, temporary folder and iteration of the checkpoint that the queue writes."""
        self._strategy: Any = None
        """The save strategy, reused for later checkpoints with ``--ckpt-assume-constant-structure``."""
        self._saved_names: set[str] = set()
        """Names of the weighting's per-parameter tensors in the last checkpoint."""
        # A failure in a writing process is raised here, and reported in one line.
        logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async").setLevel(logging.CRITICAL)
        if flags.async_save:
            from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

            # A process with a CUDA context must not be forked, so on a GPU megatron-core's worker writes.
            self._queue = AsyncCallsQueue(persistent=torch.cuda.is_available())

    def save(self, train_state: TrainState, dwm_state: dict[str, Any], *, persistent: bool = True) -> None:
        """Write a checkpoint, or start to write it; skip it if the model's parameters are not finite.

        Args:
            dwm_state: the weighting's state; none is written if it is empty.
            persistent: whether to keep it according to ``--save-retain-interval``; of the others only the
                newest two are kept.

        Raises:
            UserError: the folder cannot be written.
        """
        self.finish()  # one at a time
        flags, iteration = self.flags, train_state.iteration
        save = flags.save or "."
        root = Path(save) if persistent else non_persistent_folder(flags, save)
        if not _are_all_finite(param.detach() for chunk in self.components.chunks for param in chunk.parameters()):
            logger.warning(f"no checkpoint of iteration {iteration} is written: the parameters are not finite")
            return
        if not _are_all_finite(_optimizer_state(self.components.optimizer)):
            logger.warning(
                f"the checkpoint of iteration {iteration}: the optimizer's state is not finite, so parameters stay as "
                "they are; continue from an earlier one, with a lower --lr or with --clip-grad"
            )
        temporary = root / f".{iteration_folder(root, iteration).name}.partial"
        logger.info(
            f"[{timestamp()}] saving checkpoint at iteration {iteration:7d} to {root} in {flags.ckpt_format} format"
        )
        with self._reported_failure(root, temporary, iteration):
            if self.parallel_state.is_first_rank:
                if not persistent:
                    _drop_all_but_newest(root)
                remove(temporary)
                temporary.mkdir(parents=True)
            dist.barrier()
            per_parameter = dwm_state.get(PER_PARAMETER, {})
            common = common_state(self.arguments, self.components, train_state)
            if flags.ckpt_format == "torch":
                allocate_state(self.components.optimizer)
                write_torch_state(
                    temporary, flags, self.parallel, common, self.components, self.parallel_state, per_parameter
                )
                self._write_dwm_state(temporary, dwm_state)
                dist.barrier()
                self._publish(root, temporary, iteration)
                dist.barrier()
            else:
                request = self._request(temporary, common, per_parameter)
                # After megatron-core, which treats existing files as leftovers.
                self._write_dwm_state(temporary, dwm_state)
                request.add_finalize_fn(partial(self._publish, root, temporary, iteration))
                if self._queue is None:
                    request.execute_sync()
                    dist.barrier()
                else:
                    self._pending = (root, temporary, iteration)
                    self._queue.schedule_async_request(request)
            if persistent:
                self._progress.saved(train_state, is_async=self._queue is not None)
        if self._queue is not None:
            logger.info(f"  [{timestamp()}] scheduled an async checkpoint save at iteration {iteration:7d} to {root}")

    def _write_dwm_state(self, temporary: Path, dwm_state: dict[str, Any]) -> None:
        if dwm_state and self.parallel_state.is_first_rank:
            kept = {key: value for key, value in dwm_state.items() if key != PER_PARAMETER}
            torch.save(kept, temporary / DWM_STATE)

    def poll(self) -> None:
        """Publish a checkpoint that has been written in the background, if there is one."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait until the last checkpoint is complete."""
        self._finalize(blocking=True)

    def abandon(self) -> None:
        """Remove what has been written of a checkpoint when the run fails; does not communicate."""
        if self.parallel_state.is_first_rank and self._queue is not None and self._queue.get_num_unfinalized_calls():
            _, temporary, _ = self._pending
            with contextlib.suppress(OSError):  # the run's error is the one to report
                delete_folder(temporary)  # renamed first, so that no writing process creates files in it any more

    def close(self) -> None:
        """Finish, end the background worker, and release the folder."""
        self.finish()
        if self._queue is not None:
            self._queue.close()
        if self._save_folder is not None:
            self._save_folder.close()

    def _finalize(self, *, blocking: bool) -> None:
        if self._queue is not None and self._queue.get_num_unfinalized_calls():
            with self._reported_failure(*self._pending):
                self._queue.maybe_finalize_async_calls(blocking=blocking)

    def _request(self, temporary: Path, common: Mapping[str, Any], per_parameter: PerParameter) -> Any:
        """Prepare to write all shards, and write what is not sharded."""
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
        from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

        flags, metadata = self.flags, sharding_metadata(self.parallel, self.flags)
        allocate_state(self.components.optimizer)  # in fp16 it may not have made its first step yet
        state = sharded_state(
            common,
            self.components,
            self.parallel_state,
            metadata,
            is_loading=False,
            with_optimizer=not flags.no_save_optim,
            with_rng=not flags.no_save_rng,
            per_parameter=per_parameter,
        )
        if self._saved_names != set(per_parameter):
            self._strategy, self._saved_names = None, set(per_parameter)
        strategy, is_constant = self._strategy, flags.ckpt_assume_constant_structure
        if strategy is None:
            strategy = get_default_save_sharded_strategy("torch_dist")
            strategy.use_cached_ckpt_structure = is_constant
            if flags.ckpt_fully_parallel_save:
                strategy = FullyParallelSaveStrategyWrapper(strategy, data_parallel_group(), is_constant)
            self._strategy = strategy if is_constant else None
        request = dist_checkpointing.save(
            state,
            str(temporary),
            strategy,
            async_sharded_save=True,
            preprocess_common_before_consistancy_check=comparable,
            content_metadata={key: value for key, value in metadata.items() if key != "dp_cp_group"},
            **sharded_save_options(),
        )
        if request.async_fn is not None and flags.checkpoint_checksums:
            request = request._replace(async_fn=partial(_write_with_checksums, request.async_fn, temporary))
        return request

    def _publish(self, root: Path, temporary: Path, iteration: int) -> None:
        """Rename the complete checkpoint to its final name and make it the latest; called on the first rank."""
        if not self.parallel_state.is_first_rank:
            return
        if self.flags.checkpoint_checksums:
            write_checksums(temporary)
        final = iteration_folder(root, iteration)
        previous = tracked(root)
        retained = self.flags.save_retain_interval
        is_persistent = root == Path(self.flags.save or ".")
        retired = previous if is_persistent and _is_unretained(previous, final, retained) else None
        # The tracker is written before the checkpoint gets its name: a disk that is full only now would leave a first
        # checkpoint that no run loads.
        with atomic_files(root, should_clear=False) as scratch:
            (scratch / TRACKER).write_text(str(iteration), encoding="utf-8")
            publish_folder(temporary, final)
            if retired is not None:  # the mark outlives a kill between the next two steps
                retired_mark(retired).touch()
        logger.info(
            f"  [{timestamp()}] successfully saved checkpoint from iteration {iteration:7d} to {root} "
            f"{self.parallel_state.tp_pp_label}"
        )
        if is_persistent and self._queue is not None:
            self._progress.finished_async(iteration)
        if retired is not None:
            delete_retired(root)
            number = iteration_of(retired)
            self._progress.deleted(number)
            logger.info(f"  [{timestamp()}] successfully deleted checkpoint from iteration {number:7d} at {root}")

    @contextlib.contextmanager
    def _reported_failure(self, root: Path, temporary: Path, iteration: int) -> Iterator[None]:
        """Turn failures of writing into a UserError, and remove half-written files.

        Raises:
            UserError: the block failed.
        """
        from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

        try:
            yield
            return
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            cause = causes[0] if causes else error
            reason = (isinstance(cause, Exception) and write_failure_reason(cause)) or short_reason(cause)
            if error.args[0] == "write":  # all ranks raise it, and only the first knows the reason
                reasons = [reason]
                dist.broadcast_object_list(reasons, src=0)
                reason = reasons[0]
        except OSError as error:
            reason = error.strerror or str(error)
        except RuntimeError as error:
            unwritten = write_failure_reason(error)
            if unwritten is None:
                raise
            reason = unwritten
        if self.parallel_state.is_first_rank:
            remove(temporary)
        other = self.flags.non_persistent_global_ckpt_dir
        flag = "--save" if other is None or root != Path(other) else "--non-persistent-global-ckpt-dir"
        latest = tracked(root)
        remedy = f"the last whole checkpoint is {latest.name}" if latest is not None else "no checkpoint is there yet"
        raise UserError(
            f"{flag} {root}: the checkpoint of iteration {iteration} cannot be written ({reason}); make room or give "
            f"another folder, {remedy}"
        )


def _are_all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether all tensors, on all ranks, are finite."""
    bad = torch.zeros((), device=current_device())
    for tensor in tensors:
        bad += (~torch.isfinite(tensor)).any().to(bad.device)
    dist.all_reduce(bad)
    return not bool(bad)


def _optimizer_state(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    """Yield this rank's tensors of the optimizer's state, such as Adam's moments."""
    for part in optimizer_parts(optimizer):
        for state in part.optimizer.state.values() if part.optimizer is not None else ():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _write_with_checksums(write: Callable[..., None], folder: Path, rank: int, buckets: Any, results: Any) -> None:
    """Write one rank's files, possibly in a separate process, and their checksums next to them."""
    write(rank, buckets, results)
    with contextlib.suppress(OSError):  # a failed write is reported through the results
        write_rank_checksums(folder, rank, [Path(bucket[0]) for bucket in buckets])


def _is_unretained(previous: Path | None, current: Path, retain_interval: int | None) -> bool:
    """Return whether the checkpoint before this one is not retained."""
    if retain_interval is None or previous is None or previous == current or previous.is_symlink():
        return False
    return iteration_of(previous) % retain_interval != 0  # 0, a release, is kept


def _drop_all_but_newest(root: Path) -> None:
    for folder in checkpoints_in(root)[: -(KEPT_NON_PERSISTENT - 1)]:
        delete_folder(folder)
