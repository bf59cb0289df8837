"""Score documents with an exported weighter, or by a language model's perplexity; the score is added to each row.

Each row is an object with the text under the key of --json-key, such as {"text": "One document."}.

Needs the model's folder and the extra data. After an interruption, the same command continues where it stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from megatron_dwm.cli.command import limit_progress_bars, run_command
from megatron_dwm.config.flags import flag, parse, require_at_least
from megatron_dwm.errors import UserError
from megatron_dwm.extras import require_packages


@dataclass(frozen=True)
class ScoreConfig:
    """Scoring."""

    weighter: str | None = flag(
        None, "Folder of an exported weighter, or of any Hugging Face classifier with one label."
    )
    language_model: str | None = flag(
        None, "Folder of a language model, such as one from export-hf: the score is the document's perplexity."
    )
    input: list[str] | None = flag(
        None,
        "JSON lines (plain, .gz or .zst) or Parquet: files, folders, or glob patterns; or indexed datasets, by the "
        "prefix of .bin and .idx.",
    )
    output: str = flag("", "Folder to write; the rows are in its subfolder data, one file for each task.")
    split_bytes: int = flag(
        1000000000,
        "Plain JSON lines and datasets larger than this are split into several tasks; other files are one task each.",
    )
    dataset_tokenizer: str | None = flag(
        None, "Folder of the tokenizer of indexed datasets. Default: the model's tokenizer."
    )
    output_format: Literal["jsonl", "parquet"] = flag("jsonl", "Format of the output.")
    json_key: str = flag("text", "Key (column) of the text.")
    score_key: str | None = flag(
        None, "Key (column) of the score. Default: score, or perplexity with --language-model."
    )
    window: int | None = flag(None, "Tokens scored at once. Default: the model's training length.")
    rule: Literal["mean", "max", "first"] = flag(
        "mean", "Score of a document with several windows: the mean in proportion to tokens, the highest, or the first."
    )
    batch_tokens: int | None = flag(
        None, "Tokens of a batch, including padding. Default: 1024 on a CPU and 16384 on a GPU."
    )
    workers: int = flag(1, "Number of processes, or of simultaneous tasks of a SLURM job; they share a machine's GPUs.")
    skip_malformed: bool = flag(False, "Skip and count rows that are not documents instead of stopping.")
    slurm_partition: str | None = flag(
        None, "Submit the tasks to this SLURM partition as a job array, instead of scoring on this machine."
    )
    slurm_time: str = flag("24:00:00", "Time limit of a SLURM task.")
    slurm_gpus_per_task: int = flag(0, "GPUs of a SLURM task.")
    slurm_memory_gb: int = flag(4, "Memory of a SLURM task, in GB.")
    slurm_options: list[str] | None = flag(None, "Further options of sbatch: account=NAME qos=NAME ...")

    def __post_init__(self) -> None:
        for name in ("input", "output"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing; give a path")
        if (self.weighter is None) == (self.language_model is None):
            raise UserError("--weighter and --language-model exclude each other; give one")
        for name, number in (
            ("--window", self.window),
            ("--batch-tokens", self.batch_tokens),
            ("--split-bytes", self.split_bytes),
            ("--workers", self.workers),
            ("--slurm-memory-gb", self.slurm_memory_gb),
        ):
            if number is not None and number < 1:
                raise UserError(f"{name} {number} is less than 1; give a positive number")
        require_at_least(self, 0, "slurm_gpus_per_task")
        self.sbatch_options()

    def sbatch_options(self) -> dict[str, str]:
        """Return --slurm-options by name.

        Raises:
            UserError: one has no name or no value.
        """
        pairs = [option.partition("=") for option in self.slurm_options or ()]
        for (name, equals, _), option in zip(pairs, self.slurm_options or (), strict=True):
            if not name or not equals:
                raise UserError(f"--slurm-options {option}: give NAME=VALUE, as account=mine")
        return {name.lstrip("-"): value for name, _, value in pairs}


def main(argv: Sequence[str] | None = None) -> None:
    """Score documents."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config: ScoreConfig = parse(argv, {"score": ScoreConfig}, description=__doc__)["score"]
    require_packages("score", "datatrove", "orjson", "pyarrow")
    import torch

    from megatron_dwm.analysis.score_inputs import parts_of
    from megatron_dwm.analysis.scoring import DocumentTokens, ScoreSettings, SlurmJob, run_here, score_steps, submit

    limit_progress_bars()
    parts = parts_of(config.input or [], config.split_bytes)
    settings = ScoreSettings(
        config.weighter or config.language_model or "",
        config.language_model is not None,
        config.window,
        config.rule,
        config.batch_tokens,
        config.score_key or ("perplexity" if config.language_model else "score"),
        config.dataset_tokenizer,
    )
    # Before anything is written, and once rather than in each process.
    DocumentTokens(settings.load(torch.device("cpu")), config.dataset_tokenizer, config.json_key)
    output, tasks = config.output, len(parts)
    steps = score_steps(
        parts,
        output,
        settings,
        text_key=config.json_key,
        output_format=config.output_format,
        skip_malformed=config.skip_malformed,
        show_progress=sys.stderr.isatty() and config.slurm_partition is None,
    )
    if config.slurm_partition is not None:
        slurm = SlurmJob(
            config.slurm_partition,
            config.slurm_time,
            config.slurm_gpus_per_task,
            config.slurm_memory_gb,
            config.sbatch_options(),
        )
        job = submit(steps, output, tasks, config.workers, slurm)
        done = "all tasks are done" if job is None else f"submitted job {job}; its logs are in {output}/logs/slurm_logs"
        print(f"{output}/data: {tasks} tasks, {done}")
        return
    start = time.perf_counter()
    counts = run_here(steps, output, tasks, config.workers)
    seconds = time.perf_counter() - start
    files = len({part.path for part in parts})
    print(
        f"{config.output}/data: scored {counts['documents']:,} documents of {files:,} files, "
        f"skipped {counts['skipped']:,} rows, {counts['documents'] / seconds:,.1f} docs/s, "
        f"{counts['bytes'] / seconds / 1e6:.2f} MB/s"
    )


if __name__ == "__main__":
    main()
