"""Flags of the evaluation on tasks during training."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dwm.config.flags import flag, require_at_least
from megatron_dwm.errors import UserError


@dataclass(frozen=True)
class TasksConfig:
    """Tasks."""

    eval_tasks_interval: int | None = flag(
        None, "Iterations between evaluations of the model on --eval-tasks; the last iteration has one too."
    )
    eval_tasks: list[str] | None = flag(
        None, "Tasks, as megatron-dwm evaluate takes them with --tasks; they must not need generated text."
    )
    eval_tasks_text: list[str] | None = flag(
        None,
        "Held-out text that the local tasks are made of: plain text (.txt, .md, .rst), JSON lines or Parquet. Default: "
        "the held-out prose of the built-in corpus.",
    )
    eval_tasks_num_fewshot: list[int] = flag([0], "Numbers of examples before each question; each is evaluated.")
    eval_tasks_limit: int = flag(200, "Most items of each task; 0 for all.")

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
