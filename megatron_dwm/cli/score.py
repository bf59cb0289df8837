"""Score documents with an exported weighter, or by a language model's perplexity; the score is added to each row.

Each row is an object with the text under the key of --json-key, such as {"text": "One document."}.

Needs the model's folder, and pip install "megatron-dwm[data]". After an interruption, the same command continues where
it stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from megatron_dwm.cli.command import limit_progress_bars, run_command
from megatron_dwm.config.flags import flag, parse, require_at_least, require_given, require_paths
from megatron_dwm.config.slurm import SlurmConfig
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
    input: list[str] = flag(
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
        "mean", "Score of a document with several windows: the mean weighted by tokens, the highest, or the first."
    )
    batch_tokens: int | None = flag(
        None, "Tokens of a batch, including padding. Default: 1024 on a CPU and 16384 on a GPU."
    )
    workers: int = flag(1, "Number of processes, or of simultaneous tasks of a SLURM job; they share a machine's GPUs.")
    skip_malformed: bool = flag(False, "Skip and count rows that are not documents instead of stopping.")

    def __post_init__(self) -> None:
        require_given(self, "input output", "give a path")
        require_paths(self, "output", allow_urls=True)
        if (self.weighter is None) == (self.language_model is None):
            raise UserError("--weighter and --language-model exclude each other; give one")
        require_at_least(self, 1, "window batch_tokens split_bytes workers")


def main(argv: Sequence[str] | None = None) -> None:
    """Score documents."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    configs = parse(argv, {"score": ScoreConfig, "slurm": SlurmConfig}, description=__doc__)
    config: ScoreConfig = configs["score"]
    slurm: SlurmConfig = configs["slurm"]
    require_packages("score", "datatrove", "orjson", "pyarrow")
    import torch

    from megatron_dwm.analysis.score_inputs import parts_of
    from megatron_dwm.analysis.scoring import DocumentTokens, ScoreSettings, score_counts, score_steps
    from megatron_dwm.corpora.pipelines import Job, refuse_queued_job, refused_output, run_here, submit
    from megatron_dwm.corpora.storage import OutputFolder, is_url
    from megatron_dwm.corpora.unfinished import lock_folder

    limit_progress_bars()
    parts = parts_of(config.input, config.split_bytes)
    settings = ScoreSettings(
        config.weighter or config.language_model or "",
        config.language_model is not None,
        config.window,
        config.rule,
        config.batch_tokens,
        config.score_key or ("perplexity" if config.language_model else "score"),
        config.dataset_tokenizer,
    )
    # Checks model and tokenizer before anything is written, and once rather than in each process.
    DocumentTokens(settings.load(torch.device("cpu")), config.dataset_tokenizer, config.json_key)
    output, tasks = config.output, len(parts)
    steps = score_steps(
        parts,
        output,
        settings,
        text_key=config.json_key,
        output_format=config.output_format,
        skip_malformed=config.skip_malformed,
        show_progress=sys.stderr.isatty() and slurm.slurm_partition is None,
    )
    logs = OutputFolder(OutputFolder(output).path("logs"))
    if not is_url(output):
        with refused_output(output):
            lock_folder(Path(logs.location))  # two calls would write to the same files
    refuse_queued_job(logs, "--output", output)
    job = Job(steps, tasks, logs.location)
    if slurm.slurm_partition is not None:
        with refused_output(output):
            number = submit("score", [job], config.workers, slurm, logs)
        submitted = f"submitted job {number}; its logs are in {output}/logs/slurm_logs"
        done = "all tasks are done" if number is None else submitted
        print(f"{output}/data: {tasks} tasks, {done}")
        return
    start = time.perf_counter()
    with refused_output(output):
        counts = score_counts(run_here(job, config.workers))
        if not OutputFolder(output).exists("data"):
            raise UserError(f"--input {' '.join(config.input)}: no documents; give other files")
    seconds = time.perf_counter() - start
    files = len({part.path for part in parts})
    print(
        f"{config.output}/data: scored {counts['documents']:,} documents of {files:,} files, "
        f"skipped {counts['skipped']:,} rows, {counts['documents'] / seconds:,.1f} docs/s, "
        f"{counts['bytes'] / seconds / 1e6:.2f} MB/s"
    )


if __name__ == "__main__":
    main()
