"""The evaluations of a run: at their intervals during training, and once more at its end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from megatron_dwm.config.data import DataConfig
from megatron_dwm.config.tasks import TasksConfig
from megatron_dwm.model.engine import PipelineEngine
from megatron_dwm.runtime.log_line import event_line
from megatron_dwm.training.dataloaders import Dataloaders
from megatron_dwm.training.evaluation import Evaluation, evaluate
from megatron_dwm.training.reporter import Reporter
from megatron_dwm.training.stop_request import EvaluationInterruptedError, StopRequest
from megatron_dwm.training.train_state import EVALUATIONS, TrainState

logger = logging.getLogger(__name__)

TaskEvaluation = Callable[[Callable[[], None]], list[dict[str, Any]]]
"""Evaluates the model on tasks, on all ranks, and calls its argument before each batch; returns a record per task."""


class Evaluator:
    """Evaluates on the validation and test sets and on tasks; a signal interrupts it, so that the run can save.

    Evaluations that are due stay in the training state until they are made, so that a resumed run makes them first.
    """

    def __init__(
        self,
        data: DataConfig,
        tasks: TasksConfig,
        engine: PipelineEngine,
        dataloaders: Dataloaders,
        reporter: Reporter,
        train_state: TrainState,
        stop_request: StopRequest,
        evaluate_tasks: TaskEvaluation | None = None,
    ) -> None:
        self.data, self.tasks, self.engine = data, tasks, engine
        self.dataloaders, self.reporter, self.train_state = dataloaders, reporter, train_state
        self.stop_request, self.evaluate_tasks = stop_request, evaluate_tasks

    @property
    def has_more_to_do(self) -> bool:
        """Whether a run that has trained to its end would evaluate if it were started again."""
        has_final = self.dataloaders.valid is not None or self.dataloaders.test is not None
        return has_final or bool(self.train_state.evaluations_due)

    def schedule(self) -> None:
        """Determine the evaluations after this iteration."""
        iteration = self.train_state.iteration
        of_tasks = self.tasks.eval_tasks_interval
        is_last = iteration == self.reporter.run.train_iters
        due = (
            self._is_validated(iteration) and self.dataloaders.valid is not None,
            self.evaluate_tasks and of_tasks is not None and (iteration % of_tasks == 0 or is_last),
        )
        self.train_state.evaluations_due = tuple(name for name, is_due in zip(EVALUATIONS, due, strict=True) if is_due)

    def run_due(self) -> bool:
        """Make the evaluations that are due, including one in which the previous run was interrupted.

        Returns:
            whether all were made; False if a signal interrupted them.
        """
        train_state, iteration = self.train_state, self.train_state.iteration
        try:
            while train_state.evaluations_due:
                if train_state.evaluations_due[0] == "validation":
                    self._evaluate("valid", f"iteration {iteration}")
                else:
                    self._evaluate_tasks()
                train_state.evaluations_due = train_state.evaluations_due[1:]
        except EvaluationInterruptedError as error:
            due = " and ".join(train_state.evaluations_due)
            logger.info(f" > {error} interrupts {due} of iteration {iteration}, which is made when the run continues")
        return not train_state.evaluations_due

    def finish(self) -> str | None:
        """Evaluate on both sets after training; return the reason if a signal interrupts it."""
        iteration = self.train_state.iteration
        skipped = "skipping training (--skip-train is on) ..."
        logger.info(event_line("after training is done") if self.reporter.run.is_trained else skipped)
        self._announce_second_evaluation()
        try:
            self._evaluate("valid", f"iteration {iteration} on validation set", after_training=True)
            self._evaluate("test", f"iteration {iteration} on test set", after_training=True)
        except EvaluationInterruptedError as error:
            logger.info(event_line(reason := f"exiting program after receiving {error}."))
            return reason
        return None

    def _evaluate(self, split: str, prefix: str, *, after_training: bool = False) -> None:
        """Evaluate on ``valid`` or ``test``, if there is such data.

        Args:
            prefix: the point of the run, for the log.
            after_training: whether this is the evaluation after the last iteration, which logs each batch.

        Raises:
            EvaluationInterruptedError: on every rank, if one of them receives a signal.
        """
        data = self.dataloaders.valid if split == "valid" else self.dataloaders.test
        if data is None:
            return
        reads_whole_sets = split == "valid" and self.data.full_validation
        with self.reporter.paused(), self.engine.full_parameters():
            results = {
                name: evaluate(
                    self.engine,
                    data.loader,
                    batches,
                    self.dataloaders.eval_partition.micro_batch_size,
                    log_progress=after_training,
                    dtype=torch.float64 if reads_whole_sets else torch.float32,
                    before_batch=self.stop_request.interrupt_if_signaled,
                )
                for name, batches in data.batches.items()
            }
            if split == "valid" and not reads_whole_sets:  # each set has a separate position, which is the same for all
                self.train_state.consumed_valid_samples += data.samples // len(data.batches)
            loss = Evaluation.of_all(list(results.values())).loss
            by_source = {name: result.loss for name, result in results.items()}
            is_by_source = split == "valid" and self.data.multiple_validation_sets
            by_source = by_source if is_by_source else {}
            self.reporter.evaluation(self.train_state, split, loss, prefix, by_source, after_training=after_training)

    def _evaluate_tasks(self) -> None:
        if self.evaluate_tasks is not None:
            with self.reporter.paused(), self.engine.full_parameters():
                records = self.evaluate_tasks(self.stop_request.interrupt_if_signaled)
                self.reporter.tasks(self.train_state.iteration, records)

    def _is_validated(self, iteration: int) -> bool:
        return self.data.evaluations(iteration - 1, iteration) > 0

    def _announce_second_evaluation(self) -> None:
        """Log why the last iteration has two validation losses, as in Megatron-LM, if it has."""
        data = self.data
        was_evaluated = self._is_validated(self.train_state.iteration) and self.reporter.run.is_trained
        if was_evaluated and self.dataloaders.valid is not None and not data.full_validation:
            samples = data.eval_iters * self.dataloaders.eval_partition.global_samples
            logger.info(f" > the final validation loss uses the next {samples} samples, after those of the loss above")
