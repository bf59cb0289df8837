"""Compare checkpoints on tasks with lm-evaluation-harness: accuracies and likelihoods, with standard errors.

    megatron-dwm evaluate CHECKPOINT ... --tasks TASK ... --output FOLDER

A CHECKPOINT is a run's --save folder (its latest checkpoint), an iter_XXXXXXX folder in it, or a Hugging Face folder.
Tasks are local-cloze, local-continuation, local-title and local-definition, which are made from local text, or
any of the harness's, whose data come from the Hugging Face Hub.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from megatron_dwm.analysis.local_tasks import LOCAL_TASKS, read_passages, require_local_names
from megatron_dwm.atomic_write import atomic_files
from megatron_dwm.cli.command import limit_progress_bars, run_command
from megatron_dwm.cli.export_hf import ExportConfig, export
from megatron_dwm.cli.run_argument import with_first_flag
from megatron_dwm.cli.saved_run import checkpoint_folder
from megatron_dwm.config.checkpoint import TRACKER
from megatron_dwm.config.flags import flag, parse, require_at_least, require_given, require_paths
from megatron_dwm.errors import UserError, renamed_flags, reported_write_failure
from megatron_dwm.extras import require_packages
from megatron_dwm.training.checkpoint_folders import is_iteration
from megatron_dwm.training.save_folder import check_writable

FLAGS_OF_EXPORT = {"--load": "--checkpoints"}
"""This command's names of flags, by those of ``export-hf``, for error messages."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation."""

    checkpoints: list[str] = flag(
        None, "Checkpoints to compare; the first is the reference. May also be given first and without the flag."
    )
    tasks: list[str] = flag(None, f"Tasks: {', '.join(LOCAL_TASKS)}, or names of lm-evaluation-harness's tasks.")
    num_fewshot: list[int] = flag(
        [0, 2], "Numbers of few-shot examples before each question; each number is evaluated."
    )
    task_text: list[str] | None = flag(
        None,
        "Held-out text that the local tasks are made from: plain text (.txt, .md, .rst), JSON lines or Parquet. "
        "Default: the held-out prose of the built-in corpus.",
    )
    task_packages: list[str] | None = flag(
        None, "Installed documentation that the local tasks are made from: debian:NAME or pypi:NAME."
    )
    task_path: list[str] | None = flag(
        None, "Folders with tasks of your own, as YAML files of lm-evaluation-harness; --tasks gives their names."
    )
    limit: int | None = flag(200, "Maximum number of items of each task; 0 for all.")
    batch_size: int = flag(16, "Sequences evaluated together.")
    seed: int = flag(1234, "Seed of the choice of items, wrong answers and examples.")
    output: str = flag("evaluation", "Folder for evaluation.json and evaluation.png.")

    def __post_init__(self) -> None:
        require_given(self, "checkpoints tasks", "give at least one")
        require_paths(self, "output")
        require_at_least(self, 1, "batch_size")
        require_at_least(self, 0, "limit")
        if not self.num_fewshot or min(self.num_fewshot) < 0:
            raise UserError(f"--num-fewshot {' '.join(map(str, self.num_fewshot))}: give numbers of at least 0")
        require_local_names(self.tasks)
        if (self.task_text or self.task_packages) and not self.has_local_tasks:
            raise UserError("--task-text and --task-packages are for local tasks; leave them out")
        for folder in self.task_path or []:
            if not Path(folder).is_dir():
                raise UserError(f"--task-path {folder}: no such folder; give the folder of a task's YAML file")

    @property
    def has_local_tasks(self) -> bool:
        """Whether one of the tasks is made from local text."""
        return any(task in LOCAL_TASKS for task in self.tasks)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate checkpoints."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    words = with_first_flag(argv, "--checkpoints")
    config: EvaluateConfig = parse(words, {"evaluate": EvaluateConfig}, description=__doc__)["evaluate"]
    require_packages("evaluate", "lm_eval", "accelerate", "matplotlib")
    from megatron_dwm.analysis.evaluation_report import CheckpointResults, as_json, figure, name_of, table
    from megatron_dwm.analysis.plots import png
    from megatron_dwm.analysis.task_evaluation import TaskEvaluator

    limit_progress_bars()
    folders = [named_folder(name) for name in config.checkpoints]
    passages = read_passages(config.task_text or [], config.task_packages or []) if config.has_local_tasks else None
    evaluator = TaskEvaluator(
        config.tasks,
        passages,
        num_fewshot=config.num_fewshot,
        limit=config.limit or None,
        batch_size=config.batch_size,
        seed=config.seed,
        task_path=config.task_path or [],
    )
    output = Path(config.output)
    check_writable({"--output": output})  # before the evaluation, which may take hours
    found: list[CheckpointResults] = []
    settings = asdict(config) | {"text": passages.name if passages else None}
    for folder in folders:
        run, iteration = name_of(folder)
        with tempfile.TemporaryDirectory() as temporary:
            model = hf_folder(folder, temporary)
            results = evaluator.evaluate(model, exported_from=None if model == folder else folder)
        found.append(CheckpointResults(str(folder), run, iteration, results))
        with reported_write_failure("--output", config.output), atomic_files(output) as staging:
            (staging / "evaluation.json").write_text(json.dumps(as_json(found, settings), indent=1, allow_nan=False))
            (staging / "evaluation.png").write_bytes(png(figure(found)))
    print(table(found))
    print(f"{output}: evaluation.json and evaluation.png")


def named_folder(name: str) -> Path:
    """Return the folder of the checkpoint that the user names; for a run, its latest checkpoint.

    Raises:
        UserError: there is none.
    """
    path = Path(name)
    if (path / "config.json").is_file() or (path.name.startswith("iter_") and path.is_dir()):
        return path
    if not (path / TRACKER).is_file():
        raise UserError(
            f"--checkpoints {name}: no config.json of Hugging Face and no {TRACKER} there; give a run's --save folder, "
            "an iter_ folder in it, or a Hugging Face folder"
        )
    with renamed_flags(FLAGS_OF_EXPORT):
        return checkpoint_folder(name, None)


def hf_folder(folder: Path, temporary: str) -> Path:
    """Return a checkpoint's language model as a Hugging Face folder: itself, or its export in a temporary folder.

    Raises:
        UserError: the checkpoint is damaged, or Hugging Face has no such model.
    """
    if (folder / "config.json").is_file():
        return folder
    exported = Path(temporary) / "model"
    step = folder.name.removeprefix("iter_")
    if not is_iteration(step):
        raise UserError(f"--checkpoints {folder}: no iteration in its name; give an iter_ folder")
    with renamed_flags(FLAGS_OF_EXPORT):
        export(ExportConfig(load=str(folder.parent), ckpt_step=int(step), output=str(exported)), {})
    return exported


if __name__ == "__main__":
    main()
