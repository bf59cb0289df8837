"""Tokenizes documents into Megatron's ``.bin``/``.idx``, with the same bytes as Megatron-LM's tool.

One process reads and writes, ``--workers`` processes tokenize; ``preprocess_jobs.py`` has tasks of datatrove instead.
Partitions, which are files in Megatron-LM, only decide the order of the documents here: the documents are dealt out to
the partitions one by one, and the partitions follow each other, unless ``--keep-sequential-samples`` keeps the input's
order. Finished segments of the documents are kept until the datasets are there, so that the same command continues
after an interruption.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from megatron_dwm import __version__
from megatron_dwm.config.flags import (
    MAX_PROCESSES,
    flag,
    require_at_least,
    require_at_most,
    require_given,
    require_paths,
)
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.corpora.dataset_writer import DatasetWriter, dataset_prefix, publish_datasets
from megatron_dwm.corpora.encoder import Encoded, Encoder, Malformed
from megatron_dwm.corpora.readers import Reader, Record, input_files, without_suffixes
from megatron_dwm.corpora.unfinished import Progress, UnfinishedWork, file_stamps, files_below, unfinished_work
from megatron_dwm.corpora.worker_pool import WorkerDiedError, WorkerPool
from megatron_dwm.errors import UserError

logger = logging.getLogger(__name__)

_CHUNK = 32  # documents sent to a worker at a time
# Flags that do not change the documents' tokens; the input files are compared by their stamps.
_WITHOUT_EFFECT = ("workers", "executor", "log_interval", "output_prefix", "input", "split_bytes")


@dataclass(frozen=True)
class PreprocessConfig:
    """Preprocessing."""

    input: list[str] = flag(
        None,
        "JSON lines (plain, .gz or .zst) or Parquet: files, folders, or glob patterns; together they are one input.",
    )
    json_keys: list[str] = flag(["text"], "Keys (columns) to extract from each document; each becomes a dataset.")
    split_sentences: bool = flag(
        False, "Split documents into sentences.", refused="documents are kept whole; leave the flag out"
    )
    keep_newlines: bool = flag(False, "Keep newlines when splitting sentences; otherwise without effect.")
    lang: str = flag("english", "Language of sentence splitting; otherwise without effect.")
    append_eod: bool = flag(False, "Append the end-of-document token to each document.")
    output_prefix: str = flag(None, "Path of the output without _<key>_document.bin/.idx.")
    output_per_file: bool = flag(
        False,
        "Make datasets of each input file instead of all files together: their prefixes are --output-prefix, _ and the "
        "file's name; if --output-prefix ends with a slash, it is a folder, and there is no _.",
    )
    workers: int = flag(1, "Number of processes that tokenize, or of simultaneous tasks.")
    executor: Literal["pool", "datatrove"] = flag(
        "pool",
        "What runs the processes: pool, where one more process reads and writes for all of them, or datatrove, where "
        "each takes parts of the input as tasks; this suits many files and many processes.",
    )
    partitions: int = flag(1, "Distribute the documents over this many partitions, which are concatenated.")
    log_interval: int = flag(1000, "Report progress after this many documents.")
    keep_sequential_samples: bool = flag(False, "Keep the order of the documents, also with several partitions.")
    padded_vocab_size: int | None = flag(
        None, "Size of the model's vocabulary.", refused="it has no effect on the data; leave it out"
    )
    skip_malformed: bool = flag(False, "Skip and count malformed lines instead of stopping.")
    resume_interval: int = flag(
        1000000,
        "Number of documents after which finished work is saved; an interrupted command continues from there.",
    )
    split_bytes: int = flag(
        1000000000,
        "With --executor datatrove or --slurm-partition: larger files of plain JSON lines are divided into several "
        "tasks; any other file is one task.",
    )

    def __post_init__(self) -> None:
        require_given(self, "input output_prefix", "give a path")
        require_paths(self, "output_prefix")
        require_at_least(self, 1, "workers partitions log_interval resume_interval split_bytes")
        if self.workers % self.partitions:
            raise UserError(f"--workers {self.workers} is not a multiple of --partitions {self.partitions}; change one")


def preprocess(config: PreprocessConfig, tokenizer_config: TokenizerConfig) -> list[str]:
    """Write ``<output_prefix>_<key>_document.bin`` and ``.idx`` of each key, in place of old ones.

    Returns:
        the names of the datasets, without suffix.

    Raises:
        UserError: an unreadable input or tokenizer, a malformed record (unless skipped), or no documents.
    """
    require_at_most(config, MAX_PROCESSES, "workers partitions")
    encoder = Encoder(config.json_keys, tokenizer_config, append_eod=config.append_eod)
    paths = input_files(config.input)
    if not config.output_per_file:
        _preprocess(config, tokenizer_config, encoder, paths)
        return [dataset_prefix(Path(config.output_prefix), key) for key in config.json_keys]
    prefix = Path(config.output_prefix)
    names = _names(paths)
    start = f"{prefix}/" if config.output_prefix.endswith("/") else f"{prefix}_"
    outputs = {name: f"{start}{name}" for name in names}
    Reader(paths, config.json_keys)  # a file that cannot be read is found before the first one is worked on
    job = _job(config, tokenizer_config, paths)
    with unfinished_work(prefix.with_name(f".{prefix.name}.files"), job, "files") as work:
        for name, path in list(names.items())[work.progress.records :]:
            of_file = replace(config, input=[path], output_prefix=outputs[name])
            logger.info(f"{path} to {of_file.output_prefix}")
            _preprocess(of_file, tokenizer_config, encoder, [path])
            work.keep(work.next_segment(), Progress(records=work.progress.records + 1))
    return [dataset_prefix(Path(output), key) for output in outputs.values() for key in config.json_keys]


def _names(paths: list[str]) -> dict[str, str]:
    """Return the files by their names without suffixes.

    Raises:
        UserError: two have one name.
    """
    names: dict[str, str] = {}
    for path in paths:
        name = without_suffixes(path)
        if name in names:
            raise UserError(f"--output-per-file: {names[name]} and {path} have the same name; rename one of them")
        names[name] = path
    return names


def _preprocess(
    config: PreprocessConfig, tokenizer_config: TokenizerConfig, encoder: Encoder, paths: list[str]
) -> None:
    """Write the datasets of some files.

    Raises:
        UserError: as :func:`preprocess`.
    """
    reader = Reader(paths, config.json_keys)
    prefix = Path(config.output_prefix)
    try:
        with ExitStack() as stack:
            work = stack.enter_context(
                unfinished_work(prefix.with_name(f".{prefix.name}.unfinished"), _job(config, tokenizer_config, paths))
            )
            records = itertools.islice(reader, work.progress.records, None)
            results: Iterator[Encoded | Malformed]
            if config.workers == 1:
                results = map(encoder, records)
            else:
                results = stack.enter_context(WorkerPool(encoder, config.workers)).map(_chunks(records))
            _write(_reported(results, reader, work.progress.records, config.log_interval), config, encoder.dtype, work)
            parts = [segment / f"part{part}" for part in range(_partitions(config)) for segment in work.segments]
            publish_datasets(config.json_keys, encoder.dtype, parts, prefix)
    except WorkerDiedError as error:
        raise UserError(
            f"--workers {config.workers}: a worker process ended ({error}); give fewer workers or more memory"
        ) from error
    except OSError as error:
        raise UserError(f"--output-prefix {prefix}: cannot be written ({error}); check the path") from error


def _job(config: PreprocessConfig, tokenizer_config: TokenizerConfig, paths: list[str]) -> str | None:
    """Return what the datasets depend on; None if the input can be read only once."""
    inputs = file_stamps(paths)
    if inputs is None:
        return None
    flags = {name: value for name, value in vars(config).items() if name not in _WITHOUT_EFFECT}
    job = {"version": __version__, "flags": flags, "inputs": inputs, "tokenizer": tokenizer_stamp(tokenizer_config)}
    return json.dumps(job, default=str) + "\n"


def tokenizer_stamp(config: TokenizerConfig) -> dict[str, Any]:
    """Return the flags of a tokenizer, and its files with size and last change."""
    named = [path for path in (config.tokenizer_model, config.vocab_file, config.merge_file) if path is not None]
    return {**vars(config), "files": file_stamps(files_below(named))}


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield the records in chunks for the workers."""
    iterator = iter(records)
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        yield chunk


def _write(results: Iterable[Encoded | Malformed], config: PreprocessConfig, dtype: Any, work: UnfinishedWork) -> None:
    """Write the documents to segments, and in each of them to partitions."""
    parts = _partitions(config)
    progress, segment = work.progress, Path()
    writers: list[DatasetWriter] = []
    for index, result in enumerate(results, start=progress.records):
        if not writers:
            segment = work.next_segment()
            writers = [DatasetWriter(config.json_keys, dtype, segment / f"part{part}") for part in range(parts)]
        if isinstance(result, Malformed):
            if not config.skip_malformed:
                raise UserError(f"--input {result}; correct it or give --skip-malformed")
            first_skipped = progress.first_skipped or str(result)
            progress = replace(progress, skipped=progress.skipped + 1, first_skipped=first_skipped)
        else:
            progress = replace(progress, documents=progress.documents + 1)
            writers[index % parts].add(result)
        progress = replace(progress, records=index + 1)
        if progress.records % config.resume_interval == 0:
            _keep(work, segment, writers, progress)
            writers = []
    if progress.skipped:
        logger.warning(f"{progress.skipped} malformed documents were skipped, the first: {progress.first_skipped}")
    if progress.documents == 0:
        raise UserError(f"--input {' '.join(config.input)}: no documents; give other files")
    if writers:
        _keep(work, segment, writers, progress)


def _partitions(config: PreprocessConfig) -> int:
    return 1 if config.keep_sequential_samples else config.partitions


def _keep(work: UnfinishedWork, segment: Path, writers: list[DatasetWriter], progress: Progress) -> None:
    for writer in writers:
        writer.finish()
    work.keep(segment, progress)


def _reported(
    results: Iterable[Encoded | Malformed], reader: Reader, done: int, log_interval: int
) -> Iterator[Encoded | Malformed]:
    """Yield the results, with a progress bar on a terminal and Megatron-LM's lines elsewhere, with the remaining time.

    Args:
        done: records that an earlier call has written.
    """
    is_terminal = sys.stderr.isatty()
    start, first, size = time.perf_counter(), None, 0
    with tqdm(total=reader.size, unit="B", unit_scale=True, disable=not is_terminal) as bar:
        for count, result in enumerate(results, start=1):
            if first is None:  # the speed must not count what was skipped to continue
                first = bar.initial = bar.n = reader.position if done else 0
            size += result.size if isinstance(result, Encoded) else 0
            if is_terminal:
                bar.update(reader.position - bar.n)
                bar.set_postfix_str(f"{done + count} documents", refresh=False)
            elif count % log_interval == 0:
                elapsed, read = time.perf_counter() - start, reader.position - first
                speed = f"{count / elapsed:.1f} docs/s, {size / elapsed / 2**20:.2f} MB/s"
                left = tqdm.format_interval((reader.size - reader.position) * elapsed / max(read, 1))
                logger.info(f"Processed {done + count} documents ({speed}), {left} left.")
            yield result
