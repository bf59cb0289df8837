"""Report what a run's weighter prefers, when and how strongly, or compare several runs: one HTML page.

    megatron-dwm report RUN
    megatron-dwm report RUN RUN ...
    megatron-dwm report RUN --follow 60

RUN is a run's --save folder, or its --metrics-jsonl file. For one run the page shows what its weighter prefers, with
texts; for several it compares losses, weights and costs with those of the first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_dwm.analysis.records import NoRecordsError, RunRecords, read_run, records_file, run_folder
from megatron_dwm.cli.command import limit_progress_bars, run_command
from megatron_dwm.cli.run_argument import with_first_flag
from megatron_dwm.config.flags import flag, flag_name, parse, require_at_least, require_given, require_paths
from megatron_dwm.errors import UserError
from megatron_dwm.extras import require_packages
from megatron_dwm.training.folder_lock import LEASE_SECONDS, heartbeat_age
from megatron_dwm.training.run_status import read_run_status

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReportConfig:
    """Report."""

    run: list[str] = flag(
        [],
        "The --save folders of runs, or their --metrics-jsonl files: one to describe, several to compare. May also be "
        "given first and without the flag.",
    )
    output: str | None = flag(
        None,
        "Folder to write to. Default: preference/ next to the records, or comparison/ next to the first run's records.",
    )
    follow: int | None = flag(
        None, "Interval in seconds at which the page is rewritten if there are new records, until all runs have ended."
    )
    scores: list[str] | None = flag(
        None,
        'External scores of samples, as further properties: files with rows such as {"index": 17, "quality": 3.5}, '
        "as JSON lines (plain, .gz, .zst) or Parquet. The index is the sample's, as in --texts-output.",
    )
    texts_output: str | None = flag(
        None,
        'Also write the samples of the page as JSON lines {"index": N, "source": ..., "text": ...}, to score them.',
    )
    benefit: str | None = flag(
        None, "JSON file of benchmarks/benefit.py --json; by default benefit.json next to the records, if it exists."
    )
    samples: int = flag(4000, "Samples of each stage whose texts are analyzed, from as many outer updates as possible.")
    examples: int = flag(
        4, "Samples of each stage that are shown as text: this many of the highest and of the lowest weight."
    )
    documents: int = flag(
        4,
        "Documents whose weight is shown over the run's exported weighters: this many of the highest weight, of the "
        "lowest weight, and of the largest change; 0 for none.",
    )

    def __post_init__(self) -> None:
        require_given(self, "run", "give a run's --save folder")
        require_paths(self, "output texts_output")
        require_at_least(self, 1, "samples follow")
        require_at_least(self, 0, "examples documents")
        if len(self.run) > 1:
            for name in ("scores", "texts_output", "benefit"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"{flag_name(name)} is for a single run, but {len(self.run)} are compared; leave it out"
                    )


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report of a run, or of several."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config: ReportConfig = parse(with_first_flag(argv), {"report": ReportConfig}, description=__doc__)["report"]
    require_packages("report", "plotly", "jinja2")
    limit_progress_bars()
    paths = [Path(run) for run in config.run]
    if config.follow is None:
        _write(config, paths, [read_run(path) for path in paths], None)
    else:
        _follow(config, paths, config.follow)


def _follow(config: ReportConfig, paths: Sequence[Path], seconds: int) -> None:
    """Write the page whenever there are new records, until all runs have ended.

    Raises:
        UserError: a run has ended without a training step, or as :func:`read_run` and :func:`_write`.
    """
    written: list[tuple[int, int]] | None = None
    while True:
        is_running = any(_is_running(run_folder(path)) for path in paths)
        state = [_state(path) for path in paths]
        if state != written or not is_running:
            written = state
            try:
                runs = [read_run(path) for path in paths]
            except NoRecordsError:
                if not is_running:
                    raise
                logger.info("waiting for the first training step")
            else:
                _write(config, paths, runs, seconds if is_running else None)
        if not is_running:
            print("all runs have ended; this is the last page")
            return
        time.sleep(seconds)


def _is_running(folder: Path) -> bool:
    """Return whether a run writes to its folder; a killed run's heartbeat stops, while its status stays as it was."""
    age = heartbeat_age(folder)
    return read_run_status(folder).get("status") == "running" if age is None else age < LEASE_SECONDS


def _state(path: Path) -> tuple[int, int]:
    """Return a value that changes when a run writes a record."""
    try:
        found = records_file(path).stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _write(config: ReportConfig, paths: Sequence[Path], runs: Sequence[RunRecords], reload_seconds: int | None) -> None:
    """Write the page once, and print its path.

    Raises:
        UserError: scores cannot be read, or the page cannot be written.
    """
    if len(runs) == 1:
        page = _write_report(config, paths[0], runs[0], reload_seconds)
    else:
        page = _write_comparison(config, paths, runs, reload_seconds)
    last = ", ".join(str(run.steps[-1]["iteration"]) for run in runs)
    size = page.stat().st_size / 1e6
    print(f"{page}: up to iteration {last}, {size:.1f} MB", flush=True)


def _write_comparison(
    config: ReportConfig, paths: Sequence[Path], runs: Sequence[RunRecords], reload_seconds: int | None
) -> Path:
    from megatron_dwm.analysis.report.comparison import run_names
    from megatron_dwm.analysis.report.page import write_comparison

    named = dict(zip(run_names(paths), runs, strict=True))
    last = {run.steps[-1]["iteration"] for run in runs}
    notes = ["The runs differ in length: compare their curves at the same iteration, not their ends."]
    folder = Path(config.output) if config.output else run_folder(paths[0]) / "comparison"
    return write_comparison(named, folder, notes if len(last) > 1 else [], reload_seconds)


def _write_report(config: ReportConfig, path: Path, run: RunRecords, reload_seconds: int | None) -> Path:
    from megatron_dwm.analysis.external_scores import read_scores
    from megatron_dwm.analysis.report.build import Settings, build_report
    from megatron_dwm.analysis.report.content import read_benefit
    from megatron_dwm.analysis.report.page import write_report

    folder = run_folder(path)
    benefit_file = Path(config.benefit) if config.benefit else folder / "benefit.json"
    benefit: Any = read_benefit(benefit_file) if config.benefit or benefit_file.is_file() else None
    settings = Settings(
        samples=config.samples,
        examples=config.examples,
        documents=config.documents,
        scores=read_scores(config.scores) if config.scores else None,
        texts_output=Path(config.texts_output).absolute() if config.texts_output else None,
    )
    report = build_report("/".join(path.resolve().parts[-2:]), folder, run, settings, benefit)
    for note in report.notes:
        logger.warning(" ".join(note.split()))
    return write_report(report, Path(config.output) if config.output else folder / "preference", reload_seconds)


if __name__ == "__main__":
    main()
