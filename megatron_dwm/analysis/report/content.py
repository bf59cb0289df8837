"""The content of the page of one run: numbers, samples and texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_dwm.analysis.preference import (
    Correlations,
    QuartileGroup,
    SourceAlignments,
    SourceFigures,
    WeightedSamples,
    correlations,
    quartile_groups,
    source_alignments,
    stage_sources,
)
from megatron_dwm.analysis.records import RunRecords
from megatron_dwm.analysis.report.documents import WeightHistory
from megatron_dwm.errors import UserError, shortened
from megatron_dwm.special_files import read_text


class Property(NamedTuple):
    """A numeric property of samples: its name on the page, its number of digits, its description."""

    label: str
    digits: int
    meaning: str


PROPERTIES = {
    "alignment": Property(
        "alignment",
        2,
        "inner product of the sample's gradient with the target set's (after the optimizer's preconditioner), minus "
        "the batch's mean and divided by its standard deviation: what the weighter learns to predict",
    ),
    "loss": Property("loss", 2, "mean loss of the sample's tokens at that training step, in nats per token"),
    "length": Property("length", 0, "tokens of text in the sample, without padding and ends of documents"),
    "documents": Property("documents", 0, "documents, or parts of one, that are packed into the sample"),
    "characters": Property("characters per token", 2, "characters of the decoded text for each of its tokens"),
    "distinct-1": Property("distinct-1", 3, "diversity: different tokens as a fraction of all tokens of the sample"),
    "distinct-2": Property(
        "distinct-2", 3, "diversity: different pairs of neighboring tokens as a fraction of all pairs"
    ),
    "similarity-1": Property(
        "target similarity (words)",
        3,
        "cosine of the sample's TF-IDF vector of tokens with the mean vector of the target set",
    ),
    "similarity-2": Property(
        "target similarity (order)",
        3,
        "the same with pairs of neighboring tokens, which depend on the order of words too",
    ),
}
"""Those that are taken from the records and the texts; files of external scores add others."""


@dataclass(frozen=True)
class Example:
    """A sample on the page."""

    source: str
    iteration: int
    index: int
    weight: float
    alignment: float
    loss: float | None
    text: str


@dataclass(frozen=True)
class Report:
    """The content of the page."""

    name: str
    run: RunRecords
    samples: WeightedSamples
    """The samples that are described: of all outer updates, or of some that are evenly spaced."""
    all_samples: WeightedSamples
    """The samples of all outer updates."""
    examples: dict[int, tuple[list[Example], list[Example]]] = field(default_factory=dict)
    """Highest and lowest weights by stage."""
    history: WeightHistory | None = None
    external: Mapping[str, str] = field(default_factory=dict)
    """Names of external scores, with the file that each is from."""
    benefit: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    """Reports what is missing, and why."""

    @cached_property
    def sources(self) -> dict[int, dict[str, SourceFigures]]:
        """Figures by stage and source."""
        return stage_sources(self.run.steps, self.all_samples)

    @cached_property
    def alignments(self) -> SourceAlignments:
        """Alignments of the sources, update by update."""
        return source_alignments(self.all_samples, self.run.sources)

    @cached_property
    def properties(self) -> dict[str, Property]:
        """All properties by name, in the page's order."""
        rated = {name: Property(name, 3, f"external score, from {place}") for name, place in self.external.items()}
        return PROPERTIES | rated

    @cached_property
    def described(self) -> dict[str, np.ndarray]:
        """Values of the properties that are known, in the page's order; none without samples."""
        known = {"alignment": self.samples.alignment, **self.samples.properties}
        return {name: known[name] for name in self.properties if name in known and len(self.samples)}

    @cached_property
    def correlations(self) -> dict[str, dict[int, Correlations]]:
        """Correlations of the weight with each property, by stage."""
        return {name: correlations(self.samples, values) for name, values in self.described.items()}

    @cached_property
    def updates_by_stage(self) -> dict[int, int]:
        """How many outer updates each stage has whose samples are described."""
        stages = self.samples.stages
        return {s: len(np.unique(self.samples.iteration[self.samples.stage == s])) for s in stages}

    def quartile_groups(self, stage: int) -> dict[str, list[QuartileGroup]]:
        """Return the samples of a stage divided at the quartiles of each property."""
        mask = self.samples.stage == stage
        weights = self.samples.weight[mask]
        return {name: quartile_groups(values[mask], weights) for name, values in self.described.items()}


def read_benefit(path: Path) -> dict[str, Any]:
    """Read the comparison that ``benchmarks/benefit.py --json`` writes.

    Raises:
        UserError: it does not exist, or is something else.
    """
    try:
        found: dict[str, Any] = json.loads(read_text(path))
        for arm in found["arms"].values():
            losses, seconds = [float(x) for x in arm["test_loss"]], [float(x) for x in arm["seconds"]]
            if not losses or not seconds:
                raise ValueError("an arm without a run")
            float(arm["tokens"])
        for name in ("gap_closed", "token_ratio", "time_ratio"):
            if found.setdefault(name, None) is not None:
                float(found[name])
    except OSError as error:
        raise UserError(f"--benefit {path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = shortened(f"{type(error).__name__}: {error}")
        raise UserError(f"--benefit {path}: not what benefit.py --json writes ({reason}); give its file") from None
    return found
