"""HTML pages of figures and text, each one file that needs no other file and no network.

The page runs only its own scripts and plotly's: its content security policy names their checksums, so that a script in
a run's data does not run. plotly's library is stored compressed, since it is 4.8 MB; the page unpacks it.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dwm.analysis.records import RunRecords
from megatron_dwm.analysis.report import comparison, figures
from megatron_dwm.analysis.report.content import Report
from megatron_dwm.analysis.report.findings import format_signed, key_facts, warnings
from megatron_dwm.analysis.report.palette import DARK
from megatron_dwm.analysis.uncertainty import MIN_UPDATES
from megatron_dwm.atomic_write import atomic_write_bytes
from megatron_dwm.errors import UserError

PAGE, COMPARISON_PAGE = "preference.html", "comparison.html"


def write_report(report: Report, folder: Path, reload_seconds: int | None = None) -> Path:
    """Write the page of one run into ``folder``; return the page's path.

    Args:
        report: its content.
        folder: the folder to write to.
        reload_seconds: interval at which the page reloads itself, for a run in progress.

    Raises:
        UserError: it cannot be written.
    """
    return _write(folder / PAGE, render_report(report, reload_seconds))


def write_comparison(
    runs: Mapping[str, RunRecords], folder: Path, notes: list[str], reload_seconds: int | None = None
) -> Path:
    """Write the page that compares runs into ``folder``; return the page's path.

    Args:
        runs: the runs by name; the others are compared with the first.
        folder: the folder to write to.
        notes: what is missing, and why.
        reload_seconds: see :func:`write_report`.

    Raises:
        UserError: it cannot be written.
    """
    first = next(iter(runs.values()))
    costs = {name: comparison.cost(run, None if run is first else first) for name, run in runs.items()}
    groups = comparison.figures(runs)
    drawn = {name: drawing for group in groups.values() for name, (_, drawing) in group.items()}
    titles = {kind: {name: title for name, (title, _) in group.items()} for kind, group in groups.items()}
    evaluated = list(dict.fromkeys(name for cost in costs.values() for name in cost.losses))
    page = _render(
        "comparison.html.j2",
        drawn,
        reload_seconds,
        title=f"{len(runs)} runs compared",
        costs=costs,
        titles=titles,
        evaluated=evaluated,
        notes=notes,
    )
    return _write(folder / COMPARISON_PAGE, page)


def _write(path: Path, page: str) -> Path:
    try:
        # Names and texts from data may hold half of a surrogate pair, which UTF-8 cannot encode.
        atomic_write_bytes(path, page.encode("utf-8", "replace"))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--output {path.parent}: cannot be written ({reason}); give another path") from None
    return path


def render_report(report: Report, reload_seconds: int | None = None) -> str:
    """Return the page of one run; names and texts from data are escaped."""
    return _render(
        "preference.html.j2",
        _draw(report),
        reload_seconds,
        title=f"What the weighter prefers: {report.name}",
        report=report,
        properties=report.properties,
        correlations=report.correlations,
        facts=key_facts(report),
        warnings=warnings(report),
    )


def _draw(report: Report) -> dict[str, Any]:
    """Return the figures of a report by name."""
    run = report.run
    drawn = {"losses": figures.losses(run)}
    if run.step_series("effective_sample_size").values:
        drawn["spread"] = figures.weight_spread(run)
        drawn["size"] = figures.effective_sample_size(run)
    if run.sources:
        drawn["weights"] = figures.source_weights(run)
        drawn["fractions"] = figures.source_fractions(run)
    if run.sources and run.updates:
        drawn["alignments"] = figures.source_alignment(run, report.alignments)
    if len(report.samples):
        labels = {name: report.properties[name].label for name in report.described}
        found = {labels[name]: by_stage for name, by_stage in report.correlations.items()}
        drawn["in_batch"] = figures.correlations(found, "in_batch")
        drawn["in_source"] = figures.correlations(found, "in_source")
        enough = [stage for stage, n in report.updates_by_stage.items() if n >= MIN_UPDATES]
        by_stage = {stage: report.quartile_groups(stage) for stage in enough}
        for number, name in enumerate(report.described):
            groups = {stage: of_stage[name] for stage, of_stage in by_stage.items()}
            drawn[f"quarter-{number}"] = figures.quartile_groups(groups, len(report.samples.stages))
    if report.history is not None:
        drawn["documents"] = figures.document_weights(report.history)
    return drawn


def _render(template: str, drawn: Mapping[str, Any], reload_seconds: int | None, **content: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("megatron_dwm.analysis.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(signed=format_signed, tint=tint, mean=np.mean, deviation=partial(np.std, ddof=1))
    data = {
        "figures": {name: drawing.to_plotly_json() for name, drawing in drawn.items()},
        "dark": DARK,
        "reload": reload_seconds,
    }
    script, style = _page_file("page.js"), _page_file("page.css")
    library, checksum = _plotly()
    return environment.get_template(template).render(
        style=style,
        script=script,
        library=library,
        # JSON in HTML: no tag can begin in it.
        data=json.dumps(data, separators=(",", ":"), default=_plain, allow_nan=False).replace("<", "\\u003c"),
        script_checksums=f"{_checksum(script)} {checksum}",
        drawn=list(drawn),
        reload_seconds=reload_seconds,
        enough_updates=MIN_UPDATES,
        **content,
    )


def _plain(value: Any) -> Any:
    """Convert NumPy's arrays and numbers to plain Python for JSON."""
    return value.tolist()


def _page_file(name: str) -> str:
    return files("megatron_dwm.analysis.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _plotly() -> tuple[str, str]:
    """Return plotly's library, compressed and in base64, and its checksum."""
    from plotly.offline import get_plotlyjs

    library: str = get_plotlyjs()
    packed = gzip.compress(library.encode(), compresslevel=9, mtime=0)
    return base64.b64encode(packed).decode(), _checksum(library)


def _checksum(script: str) -> str:
    """Return a script's checksum in the form of a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def tint(value: float | None, middle: float = 1.0, span: float = 1.0) -> str:
    """Return the background of a table's cell: blue above ``middle``, red below it, deepest ``span`` away."""
    if value is None:
        return ""
    distance = max(-1.0, min(1.0, (value - middle) / span))
    color = "var(--more)" if distance > 0 else "var(--less)"
    return f"background:color-mix(in srgb, {color} {abs(distance) * 60:.0f}%, transparent)"
