"""Report what a run's weighter prefers, when and how strongly: one HTML page, and its figures as PNGs.

    megatron-dwm report RUN_DIR

RUN_DIR is the run's --save folder. The samples' texts come from its datasets, so start this from the
folder that the run was started from.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dwm.analysis.preference import WeightedSamples, evenly_spaced_updates, extremes, weighted_samples
from megatron_dwm.analysis.records import RunRecords, read_run
from megatron_dwm.cli.command import run_command
from megatron_dwm.cli.run_argument import RunArgument, with_run_flag
from megatron_dwm.config.flags import flag, parse, require_at_least
from megatron_dwm.errors import UserError
from megatron_dwm.extras import require_packages

if TYPE_CHECKING:
    from megatron_dwm.analysis.page import Example

logger = logging.getLogger(__name__)

LONGEST_TEXT = 800
"""Characters of a sample that the page shows."""


@dataclass(frozen=True)
class ReportConfig(RunArgument):
    """Report."""

    output: str | None = flag(None, "Folder to write to; preference/ beside the records if not given.")
    benefit: str | None = flag(
        None, "JSON file of benchmarks/benefit.py --json; benefit.json beside the records if that is there."
    )
    samples: int = flag(4000, "Samples of each stage whose texts are read, in whole outer updates.")
    examples: int = flag(4, "Samples of each stage that are shown as text, of the highest and of the lowest weight.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "samples")
        require_at_least(self, 0, "examples")


Examples = dict[int, tuple[list["Example"], list["Example"]]]
"""Of each stage the samples with the highest and with the lowest weights."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report of a run."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config: ReportConfig = parse(with_run_flag(argv), {"report": ReportConfig}, description=__doc__)["report"]
    require_packages("report", "matplotlib", "jinja2")
    from megatron_dwm.analysis.page import make_report, read_benefit, write_page

    path = Path(config.run)
    folder = path if path.is_dir() else path.parent
    run = read_run(path)
    benefit_file = Path(config.benefit) if config.benefit else folder / "benefit.json"
    benefit = read_benefit(benefit_file) if config.benefit or benefit_file.is_file() else None

    chosen = evenly_spaced_updates(run.updates, config.samples)
    samples = weighted_samples(chosen)
    examples: Examples = {}
    notes = missing(run, samples)
    if chosen:
        try:
            samples, examples = describe(folder, samples, config.examples)
        except (UserError, OSError) as error:
            notes.append(f"The samples' texts cannot be read: {error}")
    for note in notes:
        logger.warning(" ".join(note.split()))
    report = make_report(
        "/".join(path.resolve().parts[-2:]),
        run,
        samples,
        weighted_samples(run.updates),
        examples=examples,
        benefit=benefit,
        notes=notes,
    )
    print(write_page(report, Path(config.output) if config.output else folder / "preference"))


def describe(folder: Path, samples: WeightedSamples, examples: int) -> tuple[WeightedSamples, Examples]:
    """Read the texts of samples.

    Args:
        folder: the run's --save folder.
        samples: the samples to describe.
        examples: how many of the highest weights of a stage are shown, and how many of the lowest.

    Returns:
        the samples with the properties of their texts, and those that are shown.

    Raises:
        UserError: the run's data cannot be read.
    """
    from megatron_dwm.analysis.page import Example
    from megatron_dwm.analysis.samples import open_samples, text_properties

    with open_samples(folder) as run_samples:
        found = text_properties(samples.index, samples.source, run_samples)
        samples = replace(samples, properties=samples.properties | found)

        def example(row: int) -> Example:
            text = run_samples.text(run_samples.sample(int(samples.index[row])))
            return Example(
                source=str(samples.source[row]),
                iteration=int(samples.iteration[row]),
                index=int(samples.index[row]),
                weight=float(samples.weight[row]),
                alignment=float(samples.alignment[row]),
                loss=float(samples.properties["loss"][row]) if "loss" in samples.properties else None,
                text=text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …",
            )

        by_stage: Examples = {}
        for stage in samples.stages:
            rows = (samples.stage == stage).nonzero()[0]
            highest, lowest = extremes(samples.where(rows), examples)
            by_stage[stage] = [example(row) for row in rows[highest]], [example(row) for row in rows[lowest]]
    return samples, by_stage


def missing(run: RunRecords, samples: WeightedSamples) -> list[str]:
    """Return a sentence for each thing that the records do not hold."""
    if not any("weight_by_source" in step for step in run.steps):
        return ["No step of this run was weighted."]
    if not run.updates:
        return ["No outer update was made in this run, so weights of single samples are not recorded."]
    return [] if "loss" in samples.properties else ["The samples' losses are not recorded by this run."]


if __name__ == "__main__":
    main()
