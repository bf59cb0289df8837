"""Evaluation of the model in training on tasks, in the layout of the training run.

The first rank runs lm-evaluation-harness; when it requests likelihoods, all ranks compute them.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from lm_eval.api.model import TemplateLM

from megatron_dwm.analysis.local_tasks import LOCAL_TASKS, read_passages
from megatron_dwm.analysis.task_evaluation import TaskEvaluator, require_context
from megatron_dwm.config.tasks import TasksConfig
from megatron_dwm.errors import UserError, renamed_flags
from megatron_dwm.model.continuations import Continuation, Likelihood, continuation_likelihoods
from megatron_dwm.model.engine import PipelineEngine

_SEED = 1234
"""Seed of the choice of items and examples: the default of ``megatron-dwm evaluate``."""
_FLAGS = {"--tasks": "--eval-tasks", "--task-text": "--eval-tasks-text", "--num-fewshot": "--eval-tasks-num-fewshot"}
"""The flags of ``megatron-dwm evaluate``, and their names in a run."""
_MAX_MICROBATCHES = 64
"""Maximum number of a replica's microbatches in one run through the pipeline."""


class InLoopTaskEvaluator:
    """The tasks of a run."""

    def __init__(
        self, flags: TasksConfig, engine: PipelineEngine, tokenizer: Any, vocab_size: int, micro_batch_size: int
    ) -> None:
        """
        Args:
            tokenizer: the Hugging Face tokenizer that gives the ids that the model is trained on.
            vocab_size: tokens that the run's tokenizer has.

        Raises:
            UserError: on the first rank, if a task is unknown, its data are not there, or it needs generated text.
        """
        self._engine, self._micro_batch_size, self._vocab_size = engine, micro_batch_size, vocab_size
        # All of a long task at once would fill the memory, and could not be interrupted.
        self._max_continuations = _MAX_MICROBATCHES * micro_batch_size * engine.parallel_state.dp_size
        self._before_batch: Callable[[], None] = lambda: None
        self._evaluator = None
        if dist.get_rank() == 0:
            self._model = _RunningModel(self.likelihoods, tokenizer, engine.seq_length)
            self._evaluator = _evaluator(flags, tokenizer, engine.seq_length)

    def evaluate(self, before_batch: Callable[[], None]) -> list[dict[str, Any]]:
        """Return a record for each task and number of examples, on every rank; every rank calls it.

        The parameters must be up to date.

        Args:
            before_batch: called on every rank before each batch; may raise to interrupt the evaluation.
        """
        self._before_batch = before_batch
        if self._evaluator is None:
            while (request := self._broadcast(_Request())).records is None:
                self._compute(request.continuations)
            return request.records or []
        # The harness draws progress bars, which no flag of it turns off.
        with _restored_random_states(), redirect_stderr(io.StringIO()):
            results = self._evaluator.evaluate_model(self._model, is_training=True)
        records = [
            {
                "kind": "tasks",
                "task": result.task,
                "num_fewshot": result.num_fewshot,
                "samples": result.samples,
                "metrics": {name: value.as_json() for name, value in result.metrics.items()},
            }
            for result in results
        ]
        self._broadcast(_Request(records=records))
        return records

    def likelihoods(self, continuations: list[Continuation]) -> list[Likelihood]:
        """Return the likelihoods of continuations; the other ranks wait in :meth:`evaluate` to help."""
        self._broadcast(_Request(continuations))
        return self._compute(continuations)

    def _compute(self, continuations: Sequence[Continuation]) -> list[Likelihood]:
        found: list[Likelihood] = []
        for first in range(0, len(continuations), self._max_continuations):
            self._before_batch()
            part = continuations[first : first + self._max_continuations]
            found += continuation_likelihoods(self._engine, part, self._micro_batch_size, self._vocab_size)
        return found

    def _broadcast(self, request: _Request) -> _Request:
        """Broadcast the first rank's request, and return it."""
        box = [request]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]


class _Request(NamedTuple):
    """A request of the first rank to all ranks: to compute likelihoods, or to finish with the results."""

    continuations: Sequence[Continuation] = ()
    records: list[dict[str, Any]] | None = None


class _RunningModel(TemplateLM):  # type: ignore[misc]
    """The model in training, with the interface of the harness."""

    def __init__(
        self, likelihoods: Callable[[list[Continuation]], list[Likelihood]], tokenizer: Any, max_length: int
    ) -> None:
        super().__init__()
        self.likelihoods, self.tokenizer, self.max_length = likelihoods, tokenizer, max_length

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids: list[int] = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        require_context(requests, f"--seq-length {self.max_length}", self.max_length)
        asked = [Continuation([*context, *following], len(following)) for _, context, following in requests]
        return [(found.log_likelihood, found.is_greedy) for found in self.likelihoods(asked)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError  # refused at the start

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError  # refused at the start


def _evaluator(flags: TasksConfig, tokenizer: Any, seq_length: int) -> TaskEvaluator:
    names = flags.eval_tasks or []
    with renamed_flags(_FLAGS):
        has_local_tasks = any(name in LOCAL_TASKS for name in names)
        evaluator = TaskEvaluator(
            names,
            read_passages(flags.eval_tasks_text or [], []) if has_local_tasks else None,
            num_fewshot=flags.eval_tasks_num_fewshot,
            limit=flags.eval_tasks_limit or None,
            batch_size=1,
            seed=_SEED,
        )
        with _restored_random_states():
            for task, kind in evaluator.kinds().items():
                if kind not in ("loglikelihood", "multiple_choice"):
                    raise UserError(
                        f"--tasks {task}: needs {kind}, and a model in training gives likelihoods of answers only; "
                        "leave it to megatron-dwm evaluate"
                    )
            # Without computing anything, so that a question that cannot be asked ends the run before it starts.
            evaluator.evaluate_model(_RunningModel(_no_likelihoods, tokenizer, seq_length), is_training=True)
    return evaluator


def _no_likelihoods(continuations: list[Continuation]) -> list[Likelihood]:
    return [Likelihood(0.0, is_greedy=False)] * len(continuations)


@contextmanager
def _restored_random_states() -> Iterator[None]:
    """Restore Python's and numpy's random streams afterwards, because the harness seeds them."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
