"""Selection of documents within a budget: two passes over the files, with a table of three numbers per row in between.

The first pass writes the table to an unnamed file next to the output; the second pass copies the rows that are kept.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_dwm import __version__
from megatron_dwm.analysis.duplicates import duplicates
from megatron_dwm.analysis.selection_flags import SelectConfig
from megatron_dwm.analysis.selection_table import progressing_records, texts_of, write_table
from megatron_dwm.analysis.top_rows import ROW, Group, Table, TopRows, add_gumbel, blocks, costs_by_source, draw_keys
from megatron_dwm.atomic_write import atomic_files
from megatron_dwm.checksums import checksum
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.corpora.readers import input_files
from megatron_dwm.errors import UserError, shortened


def select_files(config: SelectConfig, tokenizer_config: TokenizerConfig | None) -> dict[str, Any]:
    """Write the rows that are kept, in the input's order, and ``OUTPUT.manifest.json`` beside them.

    Args:
        config: what is kept.
        tokenizer_config: of the dataset; None if JSON lines are written.

    Returns:
        the manifest.

    Raises:
        UserError: bad input, a budget that the input cannot fill, or an output that cannot be written.
    """
    paths, output = input_files(config.input or []), Path(config.output)
    stamps = _stamps(paths, output)
    try:
        with atomic_files(output.parent) as folder:
            # Not in the folder for temporary files, which may lie in memory.
            with tempfile.TemporaryFile(dir=folder) as file:
                sources = write_table(config, paths, file)
                table: Table = np.memmap(file, ROW, mode="r+")
                dropped = _drop_duplicates(config, paths, table, len(sources), folder)
                top = _choose(config, sources, table)
                manifest = _count(config, sources, top, table)
                if config.duplicates != "keep":
                    manifest["duplicates_dropped"] = dropped
                written = _write(config, tokenizer_config, paths, top, folder)
            manifest["inputs"] = [{"path": path, **vars(checksum(Path(path)))} for path in paths]
            sums = {path.name: vars(checksum(path)) for path in written}
            manifest["output"] = {"path": str(output), "bytes": sum(path.stat().st_size for path in written)}
            manifest["output"] |= {"files": sums} if len(written) > 1 else sums[output.name]
            if _stamps(paths, output) != stamps:
                raise UserError("--input: a file was changed while it was read; run the command again")
            text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
            (folder / f"{output.name}.manifest.json").write_text(text)
    except OSError as error:
        raise UserError(
            f"--output {output}: cannot be written ({shortened(error)}); check the path and the space"
        ) from None
    return manifest


def _drop_duplicates(config: SelectConfig, paths: Sequence[str], table: Table, sources: int, folder: Path) -> int:
    """Move duplicates to a separate source, number ``sources``, without a budget; return their number."""
    if config.duplicates == "keep":
        return 0
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        is_duplicate = duplicates(config.duplicates, texts_of(paths, config.json_key, "duplicates"), Path(scratch))
        dropped = 0
        for block in blocks(table):
            marked = np.fromiter(itertools.islice(is_duplicate, len(block)), np.bool_, len(block))
            block["source"][marked] = sources
            dropped += int(marked.sum())
    return dropped


def _write(
    config: SelectConfig, tokenizer_config: TokenizerConfig | None, paths: Sequence[str], top: TopRows, folder: Path
) -> list[Path]:
    """Write the rows that are kept to a folder; return the files."""
    name = Path(config.output).name
    if tokenizer_config is None:
        _copy(paths, top, folder / name)
        return [folder / name]
    from megatron_dwm.corpora.preprocess import PreprocessConfig, preprocess  # which needs Megatron

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        rows = Path(scratch) / "rows.jsonl"
        _copy(paths, top, rows)
        settings = PreprocessConfig(
            input=[str(rows)],
            json_keys=[config.json_key],
            append_eod=config.append_eod,
            output_prefix=str(folder / name),
            workers=config.workers,
        )
        preprocess(settings, tokenizer_config)
    return [folder / f"{name}_{config.json_key}_document{suffix}" for suffix in (".bin", ".idx")]


def _stamps(paths: Sequence[str], output: Path) -> list[tuple[int, int]]:
    """Return the size and the time of the last change of each file.

    Raises:
        UserError: a file cannot be read twice, or is the output.
    """
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"--input {path}: is not a regular file, and has to be read twice; give a regular file")
        if output.exists() and os.path.samefile(path, output):
            raise UserError(f"--output {output}: is an input too; give another name")
    return [(status.st_size, status.st_mtime_ns) for status in map(os.stat, paths)]


def _choose(config: SelectConfig, sources: list[str], table: Table) -> TopRows:
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
            flag_name = next(name for name in ("documents", "tokens", "fraction") if getattr(config, name) is not None)
            raise UserError(
                f"--{flag_name} {getattr(config, flag_name)}: asks for {group.budget:,} {config.unit} of {group.name}, "
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
        raise UserError(f"the budget is too small for any of {int(held[:, 0].sum()):,} documents; give a greater one")

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


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """Open a file for writing, compressed according to its name, with reproducible bytes."""
    with path.open("wb") as file:
        if path.suffix != ".gz":
            yield file
            return
        with gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as compressed:
            yield compressed


def _copy(paths: Sequence[str], top: TopRows, output: Path) -> None:
    """Write the rows that are kept; lines stay as they are.

    Raises:
        UserError: a row of a table cannot be written as JSON.
    """
    is_kept = itertools.chain.from_iterable(top.masks())
    with _open(output) as file:
        for record in progressing_records(paths, "writing"):
            if not next(is_kept, False):
                continue
            line = record.content
            if not isinstance(line, str):
                try:
                    line = json.dumps(line, ensure_ascii=False, allow_nan=False)
                except (TypeError, ValueError) as error:
                    raise UserError(
                        f"--input {record.place}: cannot be written as JSON ({shortened(error)}); leave that column out"
                    ) from None
            file.write(line.removesuffix("\n").encode() + b"\n")
