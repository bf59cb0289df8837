"""Evaluation of language models on tasks by lm-evaluation-harness, by likelihood as well as accuracy.

For a small model accuracy is coarse: it changes only when an answer overtakes another. The harness's results are
kept; from its samples two more metrics are computed, which change with every step:

* the negative log-likelihood of the right answer after the question, in nats per answer;
* for a choice, the negative logarithm of the right answer's probability among the answers; log 4 is chance among four.
"""

from __future__ import annotations

import io
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_dwm.analysis.local_tasks import FEWSHOT_ITEMS, LOCAL_TASKS, Passages, local_task, require_local_names
from megatron_dwm.analysis.scoring_model import load_model, require_all_weights
from megatron_dwm.errors import UserError, shortened
from megatron_dwm.model.attributes import temporary_attributes


@dataclass(frozen=True)
class MetricEstimate:
    """A mean over the items of a task, and its standard error."""

    mean: float
    stderr: float

    @classmethod
    def of(cls, values: Sequence[float]) -> MetricEstimate:
        """Return the mean of values and its standard error; NaN if there is one value."""
        mean = sum(values) / len(values)
        if len(values) < 2:
            return cls(mean, math.nan)
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        return cls(mean, math.sqrt(variance / len(values)))

    def as_json(self) -> dict[str, float | None]:
        """Return both numbers for JSON, with null where one is not finite."""
        values = {"mean": self.mean, "stderr": self.stderr}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if math.isnan(self.stderr) else f" ± {self.stderr:.3f}")


@dataclass(frozen=True)
class TaskResult:
    """Result of a model on a task."""

    task: str
    num_fewshot: int
    samples: int
    metrics: dict[str, MetricEstimate]
    """The harness's metrics, and ``answer_nll`` and ``choice_nll`` where the task has them."""
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    """``answer_nll`` and ``choice_nll`` of each item, by its number in the task."""
    choices: int | None = None
    """Number of answers to choose from, if it is the same for all items."""

    def chance(self, metric: str) -> float | None:
        """Return the mean of a metric for a model that knows nothing; None if there is none."""
        if self.choices is None or metric not in ("acc", "choice_nll"):
            return None
        return 1 / self.choices if metric == "acc" else math.log(self.choices)


class TaskEvaluator:
    """Tasks that models are evaluated on, one model after the other."""

    def __init__(
        self,
        tasks: Sequence[str],
        passages: Passages | None,
        *,
        num_fewshot: Sequence[int],
        limit: int | None,
        batch_size: int,
        seed: int,
        task_path: Sequence[str] = (),
    ) -> None:
        """
        Args:
            tasks: names of local tasks, and of tasks of the harness, whose data are on the Hugging Face Hub.
            passages: the text that local tasks are made from; None if there are none of them.
            num_fewshot: numbers of examples before each question, each evaluated.
            limit: maximum number of items of each task; None for all.
            batch_size: sequences evaluated together.
            seed: seed for choosing the items, wrong answers and examples.
            task_path: folders with the user's own tasks of the harness.

        Raises:
            UserError: there is no such task, or a local task has too few items or examples.
        """
        from lm_eval.tasks import TaskManager

        names = list(dict.fromkeys(tasks))
        require_local_names(names)
        local, others = [], [name for name in names if name not in LOCAL_TASKS]
        if passages is not None:
            local = [local_task(name, passages, limit, seed) for name in names if name in LOCAL_TASKS]
        if local and max(num_fewshot) > FEWSHOT_ITEMS:
            raise UserError(f"--num-fewshot {max(num_fewshot)}: local tasks have {FEWSHOT_ITEMS} examples; give fewer")

        folders = list(task_path) or None
        self.manager = TaskManager(include_path=folders, include_defaults=False)
        if not all(self.manager.match_tasks([name]) for name in others):
            # Reading the harness's thousands of tasks takes seconds: only where one of them is asked for.
            self.manager = TaskManager(include_path=folders)
        for name in others:
            if not self.manager.match_tasks([name]):
                raise UserError(
                    f"--tasks {name}: lm-evaluation-harness has no such task; `lm_eval ls tasks` lists its tasks"
                )
        known = self.manager.match_tasks(others) if others else []
        self.local, self.others = local, sorted(known)
        self.num_fewshot, self.limit, self.batch_size, self.seed = num_fewshot, limit, batch_size, seed

    def evaluate(self, folder: Path, *, exported_from: Path | None = None) -> list[TaskResult]:
        """Evaluate the model in a Hugging Face folder.

        Args:
            folder: the model and its tokenizer.
            exported_from: the checkpoint of which it is the export. This program trains without the tokenizer's special
                tokens; the tokenizer of another model adds its own by default.

        Raises:
            UserError: it cannot be loaded, or a task's data cannot.
        """
        return self.evaluate_model(self._model(folder, exported_from))

    def evaluate_model(self, model: Any, *, is_training: bool = False) -> list[TaskResult]:
        """Evaluate a model in the harness's form.

        Args:
            is_training: whether the model is in training: torch's random streams stay as they are, and no processes are
                started, so that metrics whose standard error has no formula have none.

        Raises:
            UserError: a task's data cannot be loaded.
        """
        return [result for count in self.num_fewshot for result in self._results(model, count, is_training)]

    def kinds(self) -> dict[str, str]:
        """Return the output type of each task, in the harness's terms, after its data are loaded.

        Raises:
            UserError: a task's data cannot be loaded.
        """
        with quiet_harness(), self._refused_data():
            tasks = self.manager.load([*self.local, *self.others])["tasks"]
        return {name: str(task.OUTPUT_TYPE) for name, task in tasks.items()}

    def _model(self, folder: Path, exported_from: Path | None) -> Any:
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM

        class Model(HFLM):  # type: ignore[misc]
            """The harness's model, which would end with an assertion where an answer has no room."""

            def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
                require_context(requests, f"--checkpoints {exported_from or folder}", self.max_length)
                return super()._loglikelihood_tokens(requests, *args, **kwargs)

        model, tokenizer, missing = load_model(AutoModelForCausalLM, folder, "--checkpoints", "a language model")
        require_all_weights(f"--checkpoints {folder}", missing)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with quiet_harness():
            return Model(
                model.eval().to(device),
                tokenizer=tokenizer,
                batch_size=self.batch_size,
                add_bos_token=None if exported_from is None else False,
            )

    @contextmanager
    def _refused_data(self) -> Iterator[None]:
        """Turn errors of loading the data of the harness's tasks, inside the context, into a UserError."""
        try:
            yield
        except (OSError, ConnectionError, ValueError, RuntimeError) as error:
            if not self.others:
                raise
            raise UserError(
                f"--tasks {' '.join(self.others)}: cannot be evaluated here ({shortened(error)}); their data come "
                "from the Hugging Face Hub, which needs a network; the local- tasks do not"
            ) from error

    def _results(self, model: Any, num_fewshot: int, is_training: bool) -> Iterator[TaskResult]:
        from lm_eval import evaluator, simple_evaluate

        kept = {"torch_random_seed": None} if is_training else {}
        with (
            quiet_harness(),
            # It would call git, which complains outside a repository.
            temporary_attributes(evaluator, {"get_git_commit_hash": lambda: None}),
            nullcontext() if is_training else self._refused_data(),
        ):
            found: Any = simple_evaluate(  # None only on other ranks of several
                model,
                tasks=[*self.local, *self.others],
                num_fewshot=num_fewshot,
                limit=self.limit,
                bootstrap_iters=0 if is_training else 1000,  # of metrics whose standard error has no formula
                task_manager=self.manager,
                fewshot_random_seed=self.seed,
                **kept,
            )
        for task, samples in sorted(found["samples"].items()):
            yield _task_result(task, num_fewshot, found["results"][task], samples)


def require_context(requests: Iterable[tuple[Any, Sequence[int], Sequence[int]]], named: str, max_length: int) -> None:
    """Refuse answers that do not fit into a model's context, or have no tokens of their own.

    Args:
        requests: pairs of texts, tokens of the question, and tokens of the answer.
        named: the model, as the error's line begins.
        max_length: the model's context.

    Raises:
        UserError: there is such an answer.
    """
    for (_, answer), _, ids in requests:
        if not 0 < len(ids) <= max_length:
            raise UserError(
                f"{named}: the answer {shortened(answer, 40)!r} has {len(ids)} tokens and the model's context "
                f"{max_length}; leave its task out of --tasks, or give another model"
            )


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Show only errors of the harness and of datasets inside the context; progress bars only on a terminal."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        # No flag of the harness turns its progress bars off.
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _task_result(task: str, num_fewshot: int, results: dict[str, Any], samples: Sequence[dict[str, Any]]) -> TaskResult:
    metrics = {}
    for key, value in results.items():
        name, comma, _ = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, (int, float)):
            stderr = results.get(key.replace(",", "_stderr,", 1))
            estimate = MetricEstimate(float(value), float(stderr) if isinstance(stderr, (int, float)) else math.nan)
            by_item = [sample[name] for sample in samples if isinstance(sample.get(name), (int, float))]
            if math.isnan(estimate.stderr) and len(by_item) == len(samples):
                of_items = MetricEstimate.of([float(number) for number in by_item])
                estimate = of_items if math.isclose(of_items.mean, estimate.mean) else estimate
            metrics[name] = estimate
    values: dict[str, dict[int, float]] = {}
    for sample in samples:
        for name, value in likelihoods(sample).items():
            values.setdefault(name, {})[int(sample["doc_id"])] = value
    metrics |= {name: MetricEstimate.of(list(by_item.values())) for name, by_item in values.items()}
    choices = {len(sample["filtered_resps"]) for sample in samples if "choice_nll" in likelihoods(sample)}
    is_same = len(choices) == 1 and len(values["choice_nll"]) == len(samples)
    return TaskResult(task, num_fewshot, len(samples), metrics, values, choices.pop() if is_same else None)


def likelihoods(sample: dict[str, Any]) -> dict[str, float]:
    """Return ``answer_nll`` and ``choice_nll`` of an item of the harness, as far as it has them."""
    responses = sample["filtered_resps"]
    if not responses or not all(isinstance(response, (tuple, list)) and len(response) == 2 for response in responses):
        return {}  # text that was generated, or the likelihood of a whole document
    logs = [float(log_likelihood) for log_likelihood, _ in responses]
    if len(logs) == 1:
        return {"answer_nll": -logs[0]}
    target = sample["target"]
    if isinstance(target, str) and target.isascii() and target.isdigit():
        target = int(target)
    if not isinstance(target, int) or not 0 <= target < len(logs):
        return {}  # several right answers
    total = math.log(math.fsum(math.exp(log - max(logs)) for log in logs)) + max(logs)
    return {"answer_nll": -logs[target], "choice_nll": total - logs[target]}
