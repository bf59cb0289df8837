"""Report what a run's weighter prefers, when and how strongly: one HTML page, and its figures as PNGs.

    python tools/preference_report.py RUN_DIR

RUN_DIR is the run's --save folder. The samples' texts come from its datasets, so start this from the
folder that the run was started from.
"""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_dwm.analysis.page import Example, make_report, read_benefit, write_page
from megatron_dwm.analysis.preference import WeighedSamples, evenly_spaced_updates, extremes, weighed_samples
from megatron_dwm.analysis.records import RunRecords, read_run
from megatron_dwm.config.flags import flag, parse, require_at_least
from megatron_dwm.errors import UserError, run_cli

LONGEST_TEXT = 800  # characters of a sample that the page shows


@dataclass(frozen=True)
class ReportConfig:
    """Report."""

    run: str | None = flag(
        None, "A run's --save folder, or its --metrics-jsonl file. May also be given without the flag, first."
    )
    output: str | None = flag(None, "Folder to write to; preference/ beside the records if not given.")
    benefit: str | None = flag(
        None, "JSON file of benchmarks/benefit.py --json; benefit.json beside the records if that is there."
    )
    samples: int = flag(4000, "Samples of each stage whose texts are read, in whole outer updates.")
    examples: int = flag(4, "Samples of each stage that are shown as text, of the highest and of the lowest weight.")

    def __post_init__(self) -> None:
        if self.run is None:
            raise UserError("--run is missing; give a run's --save folder")
        require_at_least(self, 1, "samples")
        require_at_least(self, 0, "examples")


Examples = dict[int, tuple[list[Example], list[Example]]]


def described(folder: Path, samples: WeighedSamples, examples: int) -> tuple[WeighedSamples, Examples]:
    """The samples with the properties of their texts, and those of each stage that are shown.

    Raises:
        UserError: the run's data are not to be had.
    """
    from megatron_dwm.analysis.samples import open_samples, text_properties

    with open_samples(folder) as batch_loader:
        found = text_properties(samples.index, samples.source, batch_loader)
        samples = replace(samples, properties=samples.properties | found)

        def shown(row: int) -> Example:
            text = batch_loader.text(batch_loader.sample(int(samples.index[row])))
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
            by_stage[stage] = [shown(row) for row in rows[highest]], [shown(row) for row in rows[lowest]]
    return samples, by_stage


def missing(run: RunRecords, samples: WeighedSamples) -> list[str]:
    """What the records do not hold."""
    if not any("weight_by_source" in step for step in run.steps):
        return ["No step of this run was weighted."]
    if not run.updates:
        return ["No outer update was made in this run, so weights of single samples are not recorded."]
    return [] if "loss" in samples.properties else ["The samples' losses are not recorded by this run."]


def main() -> None:
    warnings.filterwarnings("ignore")  # of the libraries: a single process, no accelerator
    logging.getLogger("megatron").setLevel(logging.ERROR)
    words = sys.argv[1:]
    argv = ["--run", *words] if words and not words[0].startswith("-") else words
    config: ReportConfig = parse(argv, {"report": ReportConfig}, description=__doc__ or "")["report"]
    assert config.run is not None
    path = Path(config.run)
    folder = path if path.is_dir() else path.parent
    run = read_run(path)
    benefit_file = Path(config.benefit) if config.benefit else folder / "benefit.json"
    benefit = read_benefit(benefit_file) if config.benefit or benefit_file.is_file() else None

    chosen = evenly_spaced_updates(run.updates, config.samples)
    samples = weighed_samples(chosen)
    examples: Examples = {}
    notes = missing(run, samples)
    if chosen:
        try:
            samples, examples = described(folder, samples, config.examples)
        except (UserError, OSError) as error:
            notes.append(f"The samples' texts cannot be read: {error}")
    for note in notes:
        print(f"note: {' '.join(note.split())}", file=sys.stderr)
    report = make_report(
        "/".join(path.resolve().parts[-2:]),
        run,
        samples,
        weighed_samples(run.updates),
        examples=examples,
        benefit=benefit,
        notes=notes,
    )
    print(write_page(report, Path(config.output) if config.output else folder / "preference"))


if __name__ == "__main__":
    run_cli(main)
