"""Flags of the evaluation on tasks during training."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dwm.config.flags import flag, require_at_least
from megatron_dwm.errors import UserError


@dataclass(frozen=True)
class TasksConfig:
    """Tasks."""

    eval_tasks_interval: int | None = flag(
        None, "Iterations between evaluations on --eval-tasks; there is also one after the last iteration."
    )
    eval_tasks: list[str] | None = flag(
        None, "Tasks to evaluate, as in megatron-dwm evaluate --tasks; tasks that generate text are refused."
    )
    eval_tasks_text: list[str] | None = flag(
        None,
        "Held-out text that the local tasks are made from: plain text (.txt, .md, .rst), JSON lines or Parquet. "
        "Default: the held-out prose of the built-in corpus.",
    )
    eval_tasks_num_fewshot: list[int] = flag(
        [0], "Numbers of few-shot examples before each question; each number is evaluated."
    )
    eval_tasks_limit: int = flag(200, "Maximum number of items of each task; 0 for all.")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "eval_tasks_interval")
        require_at_least(self, 0, "eval_tasks_limit")
        if (self.eval_tasks is None) != (self.eval_tasks_interval is None):
            given, missing = ("--eval-tasks", "--eval-tasks-interval")[:: 1 if self.eval_tasks else -1]
            raise UserError(f"{given} has no effect without {missing}; add that")
        if self.eval_tasks_text and not any(name.startswith("local-") for name in self.eval_tasks or ()):
            raise UserError("--eval-tasks-text is for local tasks; leave it out, or name one with --eval-tasks")
        if not self.eval_tasks_num_fewshot or min(self.eval_tasks_num_fewshot) < 0:
            words = " ".join(map(str, self.eval_tasks_num_fewshot))
            raise UserError(f"--eval-tasks-num-fewshot {words}: give numbers of at least 0")
