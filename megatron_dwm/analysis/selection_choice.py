"""The choice of the rows that a selection keeps: its budget and quotas, applied to the table of all rows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np

from megatron_dwm import __version__
from megatron_dwm.analysis.duplicates import duplicates_of_task
from megatron_dwm.analysis.selection_flags import SelectConfig
from megatron_dwm.analysis.selection_table import MAX_SOURCES, too_many_sources
from megatron_dwm.analysis.top_rows import ROW, Group, Table, TopRows, add_gumbel, costs_by_source, draw_keys
from megatron_dwm.corpora.storage import OutputFolder, is_url
from megatron_dwm.errors import UserError, shortened


def choose(config: SelectConfig, folder: OutputFolder, paths: Sequence[str], tasks: int) -> None:
    """Decide for each row whether it is kept, and write the first part of the manifest.

    Args:
        config: the selection's flags.
        folder: the folder of the unfinished work, with the table of each task; gets ``choice.json`` and ``kept/``.
        paths: the input, for messages.
        tasks: number of tasks that read the input.

    Raises:
        UserError: the budget cannot be filled.
    """
    names = [json.loads(folder.read_bytes(f"sources/{rank:05d}")) for rank in range(tasks)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(name for found in names for name in found))}
    if not numbers:
        raise UserError(f"--input {' '.join(paths)}: no rows; give other files")
    if len(numbers) > MAX_SOURCES:
        raise too_many_sources(config)
    sources, rows, dropped = list(numbers), [], 0
    # If possible not in the folder for temporary files, which may be in memory.
    with tempfile.TemporaryFile(dir=None if is_url(folder.location) else folder.location) as file:
        for rank in range(tasks):
            part = np.frombuffer(folder.read_bytes(f"numbers/{rank:05d}"), ROW).copy()
            renumbered = np.array([numbers[name] for name in names[rank]], np.int32)
            part["source"] = renumbered[part["source"]] if len(part) else 0
            if config.duplicates != "keep":  # a separate source without a budget
                is_duplicate = duplicates_of_task(config.duplicates, folder.path("duplicates"), rank, len(part))
                part["source"][is_duplicate] = len(sources)
                dropped += int(is_duplicate.sum())
            file.write(part.tobytes())
            rows.append(len(part))
        file.flush()
        table: Table = np.memmap(file, ROW, mode="r+")
        top = _top_rows(config, sources, table)
        manifest = _count(config, sources, top, table)
        if config.duplicates != "keep":
            manifest["duplicates_dropped"] = dropped
        _write_masks(folder, top, rows)
    folder.write("choice.json", json.dumps(manifest, allow_nan=False))


def _write_masks(folder: OutputFolder, top: TopRows, rows: Sequence[int]) -> None:
    """Write for each task which of its rows are kept."""
    masks, found = top.masks(), np.zeros(0, np.bool_)
    for rank, count in enumerate(rows):
        pieces, held = [found], len(found)
        while held < count:
            pieces.append(next(masks))
            held += len(pieces[-1])
        joined = np.concatenate(pieces)
        with folder.open(f"kept/{rank:05d}") as file:
            file.write(np.packbits(joined[:count]).tobytes())
        found = joined[count:]


def _top_rows(config: SelectConfig, sources: list[str], table: Table) -> TopRows:
    """Return the rows that are kept; the table gets the keys that they were ranked by.

    Raises:
        UserError: the budget cannot be filled.
    """
    held = costs_by_source(table, None, len(sources) + 1)[:-1]
    groups = _groups(config, sources, held)
    if config.temperature is not None:
        try:
            add_gumbel(table, config.temperature, config.seed)
        except OverflowError as error:
            raise UserError(f"--temperature {config.temperature}: too small ({error}); give a higher one") from None
    if config.method == "source-mix" and not config.quota:
        kept = costs_by_source(table, TopRows(table, groups).masks(), len(sources))[:, 1]
        groups = [Group(name, np.arange(len(sources) + 1) == n, int(kept[n])) for n, name in enumerate(sources)]
    if config.method in ("random", "source-mix"):
        draw_keys(table, config.seed)
    return TopRows(table, groups)


def _groups(config: SelectConfig, sources: list[str], held: Any) -> list[Group]:
    """Return the sources that compete for each share of the budget.

    Args:
        held: rows and cost of each source, [sources, 2].

    Raises:
        UserError: a share is greater than what its sources hold.
    """
    amount = config.documents or config.tokens or 0
    if config.fraction is not None:
        amount = floor(Fraction(str(config.fraction)) * int(held[:, 0].sum()))
    for name in config.quotas:
        if name not in sources:
            raise UserError(f"--quota {name}: no such source; there are {shortened(', '.join(sources))}")
    groups, share, spent = [], Fraction(0), 0
    # The last one is that of duplicates.
    rest = np.array([*(name not in config.quotas for name in sources), False])
    for name, part in config.quotas.items():
        # Rounded sums rather than summed parts: together the groups get all of the budget.
        share += part
        members = np.array([*(source == name for source in sources), False])
        groups.append(Group(name, members, floor(share * amount) - spent))
        spent += groups[-1].budget
    if share < 1:
        groups.append(Group("other sources" if config.quota else "all sources", rest, amount - spent))
    for group in groups:
        available = int(held[group.members[:-1], 1].sum())
        if available < group.budget:
            raise UserError(
                f"{config.budget}: asks for {group.budget:,} {config.unit} of {group.name}, "
                f"which holds {available:,}; give a smaller budget or other quotas"
            )
    return groups


def _count(config: SelectConfig, sources: list[str], top: TopRows, table: Table) -> dict[str, Any]:
    """Return the counts of kept and dropped rows, the manifest's first part.

    Raises:
        UserError: nothing is kept.
    """
    held = costs_by_source(table, None, len(sources) + 1)[:-1]
    kept = costs_by_source(table, top.masks(), len(sources))
    if not kept[:, 0].any():
        raise UserError(f"{config.budget}: too small for any of {int(held[:, 0].sum()):,} documents; give more")

    def counts(kept: Any, dropped: Any) -> dict[str, int]:
        found = {"documents_kept": int(kept[0]), "documents_dropped": int(dropped[0])}
        if config.tokens is not None:
            found |= {"tokens_kept": int(kept[1]), "tokens_dropped": int(dropped[1])}
        return found

    sign = -1 if config.method == "perplexity" and config.temperature is None else 1
    thresholds = {
        name: None if value is None else sign * value
        for name, value in top.thresholds().items()
        if config.method not in ("random", "source-mix")
    }
    return {
        "version": __version__,
        "method": config.method,
        "flags": dict(vars(config)),
        **counts(kept.sum(axis=0), (held - kept).sum(axis=0)),
        "thresholds": thresholds,
        "sources": {name: counts(kept[n], held[n] - kept[n]) for n, name in enumerate(sources)},
    }
