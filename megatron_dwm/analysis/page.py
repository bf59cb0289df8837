"""What a run's weighter prefers, as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from megatron_dwm.analysis import plots
from megatron_dwm.analysis.preference import (
    Correlations,
    Quarter,
    SourceFigures,
    WeightedSamples,
    correlations,
    quarters,
    stage_sources,
)
from megatron_dwm.analysis.records import RunRecords
from megatron_dwm.errors import UserError, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "preference.html"


class Property(NamedTuple):
    """A number that describes a sample: its name on the page, the digits that are shown, what it is."""

    label: str
    digits: int
    meaning: str


PROPERTIES = {
    "alignment": Property(
        "alignment",
        2,
        "inner product of the sample's gradient with the target set's (after the optimizer's preconditioner), less the "
        "batch's mean and divided by its standard deviation: what the weighter learns to predict",
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


@dataclass(frozen=True)
class Example:
    """A sample as the page shows it."""

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
    sources: dict[int, dict[str, SourceFigures]]
    """By stage and source."""
    examples: dict[int, tuple[list[Example], list[Example]]] = field(default_factory=dict)
    """Highest and lowest weights by stage."""
    benefit: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    """What is missing, and why."""

    @property
    def described(self) -> dict[str, np.ndarray]:
        """Values of the properties that are known, in the page's order; none without samples."""
        known = {"alignment": self.samples.alignment, **self.samples.properties}
        return {name: known[name] for name in PROPERTIES if name in known and len(self.samples)}

    @property
    def correlations(self) -> dict[str, dict[int, Correlations]]:
        """Correlations of the weight with each property, by stage."""
        return {name: correlations(self.samples, values) for name, values in self.described.items()}

    def quarters(self, stage: int) -> dict[str, list[Quarter]]:
        """Return the mean weight over the quarters of each property."""
        mask = self.samples.stage == stage
        return {name: quarters(values[mask], self.samples.weight[mask]) for name, values in self.described.items()}


def make_report(
    name: str, run: RunRecords, samples: WeightedSamples, all_samples: WeightedSamples, **rest: Any
) -> Report:
    """Make the report of a run.

    Args:
        name: of the run, for the title.
        run: its records.
        samples: the samples to describe.
        all_samples: those of all outer updates.
        rest: the other fields of :class:`Report`.
    """
    return Report(name, run, samples, stage_sources(run.steps, all_samples), **rest)


def draw(report: Report) -> dict[str, Callable[[], Figure]]:
    """Return a function that draws each of the page's figures, by the name of its file."""
    drawn: dict[str, Callable[[], Figure]] = {"losses": partial(plots.losses_figure, report.run)}
    if any("effective_sample_size" in step for step in report.run.steps):
        drawn["weights"] = partial(plots.weights_figure, report.run)
    if report.run.sources:
        drawn["sources"] = partial(plots.sources_figure, report.run)
    if len(report.samples):
        found, columns = report.correlations, report.described
        labels = {name: PROPERTIES[name].label for name in columns}
        drawn["correlations"] = partial(
            plots.correlations_figure, {labels[name]: by_stage for name, by_stage in found.items()}
        )
        drawn["quarters"] = partial(
            plots.quarters_figure, report.samples, {labels[name]: values for name, values in columns.items()}
        )
    return drawn


def write_page(report: Report, folder: Path) -> Path:
    """Write the page and a PNG of each of its figures into ``folder``; return the page's path.

    Raises:
        UserError: they cannot be written.
    """
    images = {}
    files = {}
    for name, drawing in draw(report).items():
        variants = {}
        for theme in ("light", "dark"):
            with plots.theme(theme):
                variants[theme] = plots.png(drawing())
        files[f"{name}.png"] = variants["light"]
        images[name] = {theme: _data_uri(content) for theme, content in variants.items()}
    # Names and texts from data may hold half of a surrogate pair, which no file can.
    files[PAGE] = render(report, images).encode("utf-8", "replace")
    plots.write_files(folder, files)
    return folder / PAGE


def render(report: Report, images: Mapping[str, Mapping[str, str]]) -> str:
    """Return the page; names and texts from data are escaped.

    Args:
        report: its content.
        images: data URIs of the figures by name and theme.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("megatron_dwm.analysis", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(signed=_signed, tint=tint, mean=np.mean, deviation=partial(np.std, ddof=1))
    return environment.get_template("preference.html.j2").render(
        report=report,
        images=images,
        properties=PROPERTIES,
        correlations=report.correlations,
        facts=key_facts(report),
    )


class Fact(NamedTuple):
    """A figure at the top of the page."""

    title: str
    value: str
    explanation: str


def key_facts(report: Report) -> list[Fact]:
    """Return the most important figures, those of the last stage whose batches were weighted."""
    facts = []
    weighted = [stage for stage in report.sources if stage > 0]
    if weighted:
        last = weighted[-1]
        by_weight = sorted(
            (found.weight, name) for name, found in report.sources[last].items() if found.weight is not None
        )
        for title, (weight, name) in (("counts most", by_weight[-1]), ("counts least", by_weight[0])):
            first = report.sources[weighted[0]][name].weight
            before = f", {first:.2f} in stage {weighted[0]}" if first is not None and weighted[0] != last else ""
            facts.append(Fact(title, name, f"mean weight {weight:.2f} in stage {last}{before}"))
    sizes = [step["effective_sample_size"] for step in report.run.steps if "effective_sample_size" in step]
    if sizes:
        tail = sizes[-max(1, len(sizes) // 4) :]
        value = f"{100 * np.mean(tail):.0f} %"
        facts.append(Fact("effective sample size", value, "of the batch, in the last quarter of the weighted steps"))
    if len(report.samples):
        last = report.samples.stages[-1]
        rhos = {name: by_stage[last].in_batch for name, by_stage in report.correlations.items()}
        known = [(rho, name) for name, rho in rhos.items() if rho is not None and name != "alignment"]
        if known:
            rho, name = max(known, key=lambda pair: abs(pair[0]))
            label = PROPERTIES[name].label
            facts.append(
                Fact("goes most with", label, f"rank correlation {_signed(rho)} with the weight in stage {last}")
            )
        if rhos["alignment"] is not None:
            facts.append(Fact("agrees with alignment", _signed(rhos["alignment"]), f"rank correlation in stage {last}"))
    return facts


def tint(value: float | None, middle: float = 1.0, span: float = 1.0) -> str:
    """Return the background of a table's cell: blue above ``middle``, red below it, deepest ``span`` away."""
    if value is None:
        return ""
    distance = max(-1.0, min(1.0, (value - middle) / span))
    color = "var(--more)" if distance > 0 else "var(--less)"
    return f"background:color-mix(in srgb, {color} {abs(distance) * 60:.0f}%, transparent)"


def read_benefit(path: Path) -> dict[str, Any]:
    """Read the comparison that ``benchmarks/benefit.py --json`` writes.

    Raises:
        UserError: it is not there, or is something else.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
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


def _signed(value: float | None) -> str:
    """Return a number with a sign and two digits; ``n/a`` of None."""
    return "n/a" if value is None or np.isnan(value) else f"{round(value, 2) + 0.0:+.2f}".replace("-", "\N{MINUS SIGN}")


def _data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
