"""Selection of documents within a budget, as three datatrove jobs: a table, the choice, and a filter.

The tasks of the first job write a table with three numbers per row. One task then decides for each row of the whole
table whether it is kept. The tasks of the last job read the rows again and write those that are kept.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import posixpath
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, time
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter
from pyarrow import CompressedOutputStream, PythonFile

from megatron_dwm import __version__
from megatron_dwm.analysis.duplicates import SignatureWriter, find_steps
from megatron_dwm.analysis.selection_choice import choose
from megatron_dwm.analysis.selection_flags import SelectConfig
from megatron_dwm.analysis.selection_table import NgramCounter, RowTableWriter, TextExtractor
from megatron_dwm.checksums import checksum
from megatron_dwm.config.slurm import SlurmConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.corpora.dataset_shards import DatasetShardWriter, publish_shards
from megatron_dwm.corpora.encoder import Encoder
from megatron_dwm.corpora.parts import Part, file_parts
from megatron_dwm.corpora.pipelines import FilePublisher, FunctionStep, Job, RecordReader
from megatron_dwm.corpora.preprocess import tokenizer_stamp
from megatron_dwm.corpora.readers import MANIFEST_SUFFIX, input_files
from megatron_dwm.corpora.storage import is_url, open_file, size_of, stamp_of
from megatron_dwm.corpora.unfinished_jobs import UnfinishedJobs
from megatron_dwm.errors import UserError, renamed_flags, shortened


def select_files(
    config: SelectConfig, tokenizer_config: TokenizerConfig | None, slurm: SlurmConfig
) -> dict[str, Any] | str:
    """Write the rows that are kept, in the input's order, and ``OUTPUT.manifest.json`` beside them.

    Args:
        config: the selection's flags.
        tokenizer_config: tokenizer of the dataset; None if JSON lines are written.
        slurm: whether and how the tasks are submitted.

    Returns:
        the manifest, or the number of the SLURM job that writes it.

    Raises:
        UserError: bad input, a budget that the input cannot fill, or an output that cannot be written.
    """
    selection = Selection.of(config, tokenizer_config)
    number = selection.work.run("select", selection.jobs(), config.workers, slurm)
    if number is not None:
        return number
    manifest: dict[str, Any] = json.loads(selection.work.folder.read_bytes("manifest.json"))
    selection.work.remove()
    return manifest


@dataclass(frozen=True)
class Selection:
    """A selection, whose unfinished work is kept next to its output."""

    config: SelectConfig
    tokenizer: TokenizerConfig | None
    paths: list[str]
    stamps: list[tuple[int, str]]
    """Size and last change of each file when the work began."""
    parts: list[Part]
    target: list[Part]
    work: UnfinishedJobs

    @classmethod
    def of(cls, config: SelectConfig, tokenizer: TokenizerConfig | None) -> Selection:
        """Return the selection, and claim the folder of its work.

        Raises:
            UserError: a file is missing, cannot be read twice, or is the output.
        """
        if tokenizer is not None:  # a bad one is found before anything is read
            Encoder([config.json_key], tokenizer, append_eod=config.append_eod)
        paths = input_files(config.input)
        stamps = _stamps(paths, config.output)
        parts = file_parts(paths, config.split_bytes)
        work = UnfinishedJobs(config.output, "--output")
        target = file_parts(_target_files(config), config.split_bytes)
        flags = {name: value for name, value in vars(config).items() if name != "workers"}
        depends: dict[str, Any] = {
            "version": __version__,
            "flags": flags,
            "inputs": list(zip(paths, stamps, strict=True)),
        }
        depends |= {"target": list(map(vars, target)), "targets": [stamp_of(part.path) for part in target]}
        depends |= {"tokenizer": tokenizer_stamp(tokenizer) if tokenizer else None}
        work.claim(json.dumps(depends, indent=2, default=str) + "\n")
        return cls(config, tokenizer, paths, stamps, parts, target, work)

    def jobs(self) -> list[Job]:
        """Return the jobs in order, for any executor of datatrove."""
        config, folder, tasks = self.config, self.work.folder, len(self.parts)
        records, job = RecordReader(self.parts), self.work.job
        jobs: list[Job] = []
        if config.method == "dsir":
            wanted = RecordReader(self.target, flag="--target")
            for kind, reader, number in (("ngrams", records, tasks), ("target", wanted, len(self.target))):
                jobs.append(job(kind, [reader, TextExtractor(config.json_key), NgramCounter(folder, kind)], number))
        if config.duplicates != "keep":
            place = folder.path("duplicates")
            steps = [records, TextExtractor(config.json_key), SignatureWriter(config.duplicates, place)]
            jobs.append(job("signatures", steps, tasks))
            for stage, (step, number) in enumerate(find_steps(config.duplicates, place)):
                jobs.append(job(f"duplicates{stage}", [step], number))
        jobs.append(job("numbers", [records, RowTableWriter(config, folder, len(self.target))], tasks))
        jobs.append(job("choice", [FunctionStep(partial(choose, config, folder, self.paths, tasks))]))
        kept = [records, SelectionFilter(self.work)]
        if self.tokenizer is None:
            kept += [
                JsonLineWriter(folder.path("partial"), "${rank}", compression=None),
                FilePublisher(folder, "", "rows"),
            ]
        else:
            shards = folder.path("shards")
            remedy, keys = "correct the row, or give another --json-key", [config.json_key]
            kept.append(DatasetShardWriter(shards, keys, self.tokenizer, append_eod=config.append_eod, remedy=remedy))
        jobs.append(job("rows", kept, tasks))
        return [*jobs, job("output", [FunctionStep(partial(_write, self))])]


class SelectionFilter(BaseFilter):  # type: ignore[misc]
    """Drops the rows that are not kept."""

    name = "kept"

    def __init__(self, work: UnfinishedJobs) -> None:
        super().__init__(batch_size=1024)
        self.work = work
        self._is_kept: Iterator[bool] = iter(())

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents of the rows that are kept."""
        bits = np.frombuffer(self.work.folder.read_bytes(f"kept/{rank:05d}"), np.uint8)
        self._is_kept = iter(np.unpackbits(bits).astype(np.bool_).tolist())
        yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool:
        """Return whether the next row is kept."""
        return next(self._is_kept, False)

    def filter_batch(self, batch: list[Document]) -> list[bool]:
        """Return the same for several rows."""
        return list(map(self.filter, batch))


class JsonLineWriter(DiskWriter):  # type: ignore[misc]
    """Writes rows as lines of JSON; rows that were read as lines are not changed."""

    name = "lines"

    def __init__(self, folder: str, filename: str, compression: str | None) -> None:
        super().__init__(folder, filename, compression, adapter=_line, mode="wb")

    def _write(self, document: bytes, file_handler: IO[bytes], _filename: str) -> None:
        file_handler.write(document)


def _line(writer: Any, document: Document) -> bytes:
    """Return a row's line.

    Raises:
        UserError: a row of a table cannot be written as JSON.
    """
    line = document.metadata["record"].content
    if not isinstance(line, str):
        try:
            line = json.dumps(line, ensure_ascii=False, allow_nan=False, default=_as_text)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"--input {document.id}: cannot be written as JSON ({shortened(error)}); leave that column out"
            ) from None
    return bytes(line.removesuffix("\n").encode()) + b"\n"


def _as_text(value: Any) -> str:
    """Return a date or time in ISO 8601, as the scores' writer does.

    Raises:
        TypeError: it is something else that JSON does not have.
    """
    if isinstance(value, date | time):
        return value.isoformat()
    raise TypeError(f"a value of type {type(value).__name__}")


def _target_files(config: SelectConfig) -> list[str]:
    """Return the files of --target.

    Raises:
        UserError: one is missing.
    """
    with renamed_flags({"--input": "--target"}):
        return input_files(config.target or [])


def _stamps(paths: Sequence[str], output: str) -> list[tuple[int, str]]:
    """Return the size and the last change of each file.

    Raises:
        UserError: a file cannot be read twice, or is the output.
    """
    for path in paths:
        if not is_url(path) and not os.path.isfile(path):
            raise UserError(f"--input {path}: is not a regular file, and has to be read twice; give a regular file")
        if path == output or (os.path.exists(output) and os.path.exists(path) and os.path.samefile(path, output)):
            raise UserError(f"--output {output}: is an input too; give another name")
    return list(map(stamp_of, paths))


class _Hashed:
    """A file whose bytes are counted and hashed as they are written."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Do nothing: pyarrow closes what it writes to, which is closed elsewhere."""

    def sums(self) -> dict[str, Any]:
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


def _write(selection: Selection) -> None:
    """Write the output from the rows that all tasks have kept, and the manifest.

    Raises:
        UserError: an input has changed meanwhile.
    """
    config, work = selection.config, selection.work
    manifest = json.loads(work.folder.read_bytes("choice.json"))
    name = posixpath.basename(config.output)
    if selection.tokenizer is None:
        sums = {name: _joined(selection)}
    else:
        prefix = Path(config.output)
        publish_shards(Path(work.folder.path("shards")), [config.json_key], len(selection.parts), prefix)
        files = [Path(f"{prefix}_{config.json_key}_document{suffix}") for suffix in (".bin", ".idx")]
        sums = {path.name: vars(checksum(path)) for path in files}
    manifest["inputs"] = [
        {"path": path, **({"bytes": size_of(path)} if is_url(path) else vars(checksum(Path(path))))}
        for path in selection.paths
    ]
    manifest["output"] = {"path": config.output, "bytes": sum(entry["bytes"] for entry in sums.values())}
    manifest["output"] |= {"files": sums} if len(sums) > 1 else sums[name]
    if _stamps(selection.paths, config.output) != selection.stamps:
        raise UserError("--input: a file was changed while it was read; run the command again")
    text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
    work.folder.write("manifest.json", text)
    if selection.tokenizer is None:
        work.publish("joined", name)
    work.folder.write("published.json", text)
    work.publish("published.json", f"{name}{MANIFEST_SUFFIX}")


def _joined(selection: Selection) -> dict[str, Any]:
    """Concatenate the rows of all tasks, compressed according to the output's name; return size and checksum."""
    folder, output = selection.work.folder, selection.config.output
    with folder.open("joined") as file:
        hashed = _Hashed(file)
        compressed: Any = None
        if output.endswith(".gz"):
            compressed = gzip.GzipFile("", "wb", 6, hashed, 0)  # this always gives the same bytes
        elif output.endswith(".zst"):
            compressed = CompressedOutputStream(PythonFile(hashed, "w"), "zstd")
        for rank in range(len(selection.parts)):
            if folder.exists(f"rows/{rank:05d}"):  # none if no row of the part is kept
                with open_file(folder.path(f"rows/{rank:05d}")) as rows:
                    shutil.copyfileobj(rows, compressed or hashed, 1 << 20)
        if compressed is not None:
            compressed.close()
    return hashed.sums()
