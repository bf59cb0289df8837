"""Computes the content of a run's page from its folder: records, texts, external scores, documents over time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_dwm.analysis.external_scores import ExternalScores
from megatron_dwm.analysis.preference import WeightedSamples, described_samples, extremes, weighted_samples
from megatron_dwm.analysis.records import RunRecords
from megatron_dwm.analysis.report.content import PROPERTIES, Example, Report
from megatron_dwm.analysis.report.documents import (
    REFERENCE_SAMPLES,
    TrackedDocument,
    WeightHistory,
    exports,
    weights_over_time,
)
from megatron_dwm.analysis.samples import open_samples, text_properties
from megatron_dwm.atomic_write import atomic_write_text
from megatron_dwm.errors import UserError

if TYPE_CHECKING:
    from megatron_dwm.analysis.samples import RunSamples

MAX_TEXT_LENGTH = 800
"""Characters of a sample that the page shows."""
Examples = dict[int, tuple[list[Example], list[Example]]]
"""The samples with the highest and with the lowest weights of each stage."""


@dataclass(frozen=True)
class Settings:
    """Settings of the description of a run."""

    samples: int
    """Number of samples of each stage."""
    examples: int
    """Number of samples of each stage with the highest, and with the lowest, weight."""
    documents: int
    """Number of documents of each kind whose weight is shown over time."""
    scores: ExternalScores | None
    texts_output: Path | None
    """File for the samples' texts, for external scoring."""


def build_report(name: str, folder: Path, run: RunRecords, settings: Settings, benefit: Any | None) -> Report:
    """Return the content of a run's page; what cannot be read is left out, with a note.

    Args:
        name: name of the run, for the title.
        folder: the run's --save folder.
        run: its records.
        settings: how much is described.
        benefit: what :func:`~megatron_dwm.analysis.report.content.read_benefit` returns, if there is such a file.

    Raises:
        UserError: the texts cannot be written, or external scores are of no sample that is described.
    """
    report = Report(
        name, run, described_samples(run.updates, settings.samples), weighted_samples(run.updates), benefit=benefit
    )
    report = replace(report, notes=_missing(run, report.samples))
    if len(report.samples):
        if settings.scores is not None:
            report = _with_scores(report, settings.scores)
        try:
            with open_samples(folder) as run_samples:
                report = _with_texts(report, run_samples, settings)
                report = _with_history(report, folder, run_samples, settings.documents)
                texts = _texts(report.samples, run_samples) if settings.texts_output is not None else ""
        except (UserError, OSError) as error:
            if settings.texts_output is not None:
                raise UserError(f"--texts-output {settings.texts_output}: {error}") from None
            return replace(report, notes=[*report.notes, f"The samples' texts cannot be read: {error}"])
        if settings.texts_output is not None:
            _write_texts(settings.texts_output, texts)
    return report


def _missing(run: RunRecords, samples: WeightedSamples) -> list[str]:
    """Return a sentence for everything that is missing in the records."""
    if not any("weight_by_source" in step for step in run.steps):
        return ["No step of this run was weighted."]
    if not run.updates:
        return ["No outer update was made in this run, so weights of single samples are not recorded."]
    return [] if "loss" in samples.properties else ["The samples' losses are not recorded by this run."]


def _with_scores(report: Report, scores: ExternalScores) -> Report:
    """Return the report with the external scores of its samples.

    Raises:
        UserError: a name is taken, or no sample that is described has a score.
    """
    columns = scores.columns(report.samples.index)
    notes = []
    for name, column in columns.items():
        if name in PROPERTIES:
            raise UserError(f"--scores {scores.places[name]}: {name!r} is a property of the report; give another name")
        known = int((~np.isnan(column)).sum())
        if known == 0:
            raise UserError(
                f"--scores {scores.places[name]}: {name!r} is given for none of the report's samples; score those that "
                "--texts-output writes"
            )
        if known < len(column):
            notes.append(f"{name!r} is known for {known:,} of the {len(column):,} samples that are described.")
    samples = replace(report.samples, properties=report.samples.properties | columns)
    return replace(report, samples=samples, external=scores.places, notes=report.notes + notes)


def _with_texts(report: Report, run_samples: RunSamples, settings: Settings) -> Report:
    """Return the report with the properties of the samples' texts, and those that are shown."""
    samples = report.samples
    found = text_properties(samples.index, samples.source, run_samples)
    samples = replace(samples, properties=samples.properties | found)

    def example(row: int) -> Example:
        return Example(
            source=str(samples.source[row]),
            iteration=int(samples.iteration[row]),
            index=int(samples.index[row]),
            weight=float(samples.weight[row]),
            alignment=float(samples.alignment[row]),
            loss=float(samples.properties["loss"][row]) if "loss" in samples.properties else None,
            text=_shown(run_samples, int(samples.index[row])),
        )

    by_stage: Examples = {}
    for stage in samples.stages:
        rows = (samples.stage == stage).nonzero()[0]
        highest, lowest = extremes(samples.select(rows), settings.examples)
        by_stage[stage] = [example(row) for row in rows[highest]], [example(row) for row in rows[lowest]]
    return replace(report, samples=samples, examples=by_stage)


def _with_history(report: Report, folder: Path, run_samples: RunSamples, number: int) -> Report:
    """Return the report with the weights of documents over the run's exports, if there are several."""
    folders = exports(folder)
    if len(folders) < 2 or number == 0:
        return report
    candidates = {example.index for both in report.examples.values() for side in both for example in side}
    # Others are drawn at random: those that count most and least, and change most, may be among them.
    different = np.unique(report.samples.index)
    reference = np.random.default_rng(0).permutation(different)[:REFERENCE_SAMPLES]
    indices = [*sorted(candidates - set(reference.tolist())), *reference.tolist()]
    tokens = torch.from_numpy(np.stack([run_samples.sample(index).tokens[:-1] for index in indices])).long()
    try:
        iterations, weights = weights_over_time(folders, tokens, len(reference), run_samples.sample_format)
    except UserError as error:
        return replace(report, notes=[*report.notes, f"Documents are not followed over time: {error}"])
    sources = dict(zip(report.samples.index.tolist(), report.samples.source.tolist(), strict=True))

    def document(row: int) -> TrackedDocument:
        index = indices[row]
        return TrackedDocument(sources[index], index, _shown(run_samples, index), weights[row].tolist())

    history = WeightHistory(iterations, [document(row) for row in _notable_rows(weights, number)], len(reference))
    return replace(report, history=history)


def _notable_rows(weights: np.ndarray, number: int) -> list[int]:
    """Return the rows of weights [n, e] with the highest and lowest last values, and those that change most."""
    last = np.argsort(weights[:, -1], kind="stable")
    change = np.argsort(-np.abs(np.log(weights[:, -1] / weights[:, 0])), kind="stable")
    chosen: list[int] = []
    for order in (last[::-1], last, change):
        chosen += [int(row) for row in order if row not in chosen][:number]
    return chosen


def _shown(run_samples: RunSamples, index: int) -> str:
    """Return the text of a sample, cut if it is long."""
    text = run_samples.text(run_samples.sample(index))
    return text if len(text) <= MAX_TEXT_LENGTH else text[:MAX_TEXT_LENGTH] + " …"


def _texts(samples: WeightedSamples, run_samples: RunSamples) -> str:
    """Return the described samples as JSON lines, each once."""

    def rows() -> Iterator[dict[str, Any]]:
        sources = dict(zip(samples.index.tolist(), samples.source.tolist(), strict=True))
        for index, source in sorted(sources.items()):
            yield {"index": index, "source": source, "text": run_samples.text(run_samples.sample(index))}

    return "".join(json.dumps(row) + "\n" for row in rows())


def _write_texts(path: Path, texts: str) -> None:
    """Write the texts.

    Raises:
        UserError: they cannot be written.
    """
    try:
        atomic_write_text(path, texts)
    except OSError as error:
        raise UserError(f"--texts-output {path}: cannot be written ({error.strerror}); give another path") from None
