"""Score documents with an exported weighter: each row comes out as it came in, with its score.

Each row is an object with the text under the key of --json-key, such as {"text": "One document."}.

Needs the weighter's folder and the extra data. The same command, started again, goes on where it was interrupted.
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
from megatron_dwm.config.flags import flag, parse
from megatron_dwm.corpora.readers import input_files
from megatron_dwm.errors import UserError
from megatron_dwm.extras import require_packages


@dataclass(frozen=True)
class ScoreConfig:
    """Scoring."""

    weighter: str = flag("", "Folder of an exported weighter, or of any Hugging Face classifier with one label.")
    input: list[str] | None = flag(
        None, "JSON lines (plain, .gz or .zst) or Parquet: files, folders, or glob patterns; one task a file."
    )
    output: str = flag("", "Folder to write; the rows are in its folder data, one file for each input file.")
    output_format: Literal["jsonl", "parquet"] = flag("jsonl", "Format of the output.")
    json_key: str = flag("text", "Key (column) of the text.")
    score_key: str = flag("score", "Key (column) of the score.")
    window: int | None = flag(None, "Tokens scored at once; if not set, the weighter's length in training.")
    rule: Literal["mean", "max", "first"] = flag(
        "mean", "Score of a document of several windows: their mean by tokens, the highest, or the first's."
    )
    batch_tokens: int = flag(16384, "Tokens of a batch, padding included.")
    workers: int = flag(1, "Number of processes; on a machine with GPUs they share them.")
    skip_malformed: bool = flag(False, "Leave out and count rows that are no document instead of stopping at one.")

    def __post_init__(self) -> None:
        for name in ("weighter", "input", "output"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing; give a path")
        for name, number in (
            ("--window", self.window),
            ("--batch-tokens", self.batch_tokens),
            ("--workers", self.workers),
        ):
            if number is not None and number < 1:
                raise UserError(f"{name} {number} is less than 1; give a positive number")


def main(argv: Sequence[str] | None = None) -> None:
    """Score documents."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config: ScoreConfig = parse(argv, {"score": ScoreConfig}, description=__doc__)["score"]
    require_packages("score", "datatrove", "orjson", "pyarrow")
    import torch

    from megatron_dwm.analysis.scoring import ScoreSettings, ScoringModel, score_files

    limit_progress_bars()
    paths = input_files(config.input or [])
    # Before anything is written, and once rather than in each process.
    ScoringModel(config.weighter, config.window, config.batch_tokens, torch.device("cpu"))
    start = time.perf_counter()
    done = score_files(
        paths,
        Path(config.output),
        ScoreSettings(config.weighter, config.window, config.rule, config.batch_tokens, config.score_key),
        text_key=config.json_key,
        output_format=config.output_format,
        workers=config.workers,
        skip_malformed=config.skip_malformed,
        show_progress=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - start
    print(
        f"{config.output}/data: scored {done['documents']:,} documents of {len(paths):,} files, skipped "
        f"{done['skipped']:,} rows, {done['documents'] / seconds:,.1f} docs/s, "
        f"{done['bytes'] / seconds / 1e6:.2f} MB/s"
    )


if __name__ == "__main__":
    main()
