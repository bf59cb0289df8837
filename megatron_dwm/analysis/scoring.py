"""Scoring of documents with an exported weighter, or by a language model: the steps of a datatrove pipeline.

Needs the model's folder and transformers, but not Megatron. A task reads one part of the input and writes one file
under a temporary name, which is renamed when it is complete; an interrupted task starts again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import orjson
import torch
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.pipeline.writers.parquet import ParquetWriter
from pyarrow import ArrowException, RecordBatch, unify_schemas

from megatron_dwm.analysis.score_inputs import RowReader
from megatron_dwm.analysis.scoring_model import PerplexityModel, Rule, ScoringModel
from megatron_dwm.corpora.parts import Part
from megatron_dwm.corpora.pipelines import FilePublisher, refused_output
from megatron_dwm.corpora.readers import table_schema
from megatron_dwm.corpora.storage import OutputFolder
from megatron_dwm.corpora.unfinished import file_stamps, files_below
from megatron_dwm.data.tokenizer_folder import load_tokenizer_folder
from megatron_dwm.errors import UserError, shortened

_BUFFER = 4096  # documents that are sorted by length at a time


@dataclass(frozen=True)
class ScoreSettings:
    """Settings that determine the scores of a job."""

    model: str
    """Folder of the model."""
    is_language_model: bool
    window: int | None
    rule: Rule
    batch_tokens: int | None
    score_key: str
    dataset_tokenizer: str | None = None
    """Folder of the tokenizer that indexed datasets were made with; None if it is the model's."""

    def load(self, device: torch.device) -> ScoringModel:
        """Load the model.

        Raises:
            UserError: the folder holds none.
        """
        model_class = PerplexityModel if self.is_language_model else ScoringModel
        return model_class(self.model, self.window, self.batch_tokens, device)


class ScoringStep(PipelineStep):  # type: ignore[misc]
    """Adds a score to each document; a buffer of documents is scored at a time, in batches of similar length."""

    type, name = "weighter", "scores"

    def __init__(self, settings: ScoreSettings, text_key: str) -> None:
        super().__init__()
        self.settings, self.text_key = settings, text_key

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents in their order.

        Raises:
            UserError: a document has no tokens, or has a field of the score's name.
        """
        settings, gpus = self.settings, torch.cuda.device_count()
        device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
        scorer = settings.load(device)
        tokens_of = DocumentTokens(scorer, settings.dataset_tokenizer, self.text_key)
        while documents := list(islice(data, _BUFFER)):
            tokens = tokens_of(documents)
            for document, ids in zip(documents, tokens, strict=True):
                if not ids:
                    raise UserError(f"--input {document.id}: its text has no tokens; remove it")
                if settings.score_key in document.metadata["row"]:
                    raise UserError(f"--input {document.id}: has {settings.score_key!r} already; give --score-key")
            for document, score in zip(documents, scorer.score(tokens, settings.rule), strict=True):
                document.metadata["row"][settings.score_key] = score
                self.stat_update("bytes", value=len(document.text.encode()))
                yield document


class DocumentTokens:
    """The token ids of documents: of their texts, or as an indexed dataset has them."""

    def __init__(self, scorer: ScoringModel, dataset_tokenizer: str | None, text_key: str) -> None:
        """
        Args:
            scorer: reads the ids.
            dataset_tokenizer: folder of the tokenizer that datasets were made with; None if it is the scorer's.
            text_key: the key under which the row of a dataset's document gets its text.

        Raises:
            UserError: no tokenizer loads from the folder.
        """
        self._scorer, self._text_key = scorer, text_key
        self._tokenizer, self._is_same = scorer.tokenizer, dataset_tokenizer is None
        if dataset_tokenizer is not None:
            self._tokenizer = load_tokenizer_folder(dataset_tokenizer, "--dataset-tokenizer")

    def __call__(self, documents: Sequence[Document]) -> list[list[int]]:
        """Return the ids of each document, and give those of a dataset their text.

        Raises:
            UserError: a dataset has ids that its tokenizer does not have.
        """
        kept = [self._of_dataset(document) for document in documents]
        others = [document.text for document, ids in zip(documents, kept, strict=True) if ids is None]
        tokenized = iter(self._scorer.tokenize(others)) if others else iter(())
        return [next(tokenized) if ids is None else ids for ids in kept]

    def _of_dataset(self, document: Document) -> list[int] | None:
        """Return a dataset's ids without the end-of-document token, and set the text; None if it must be tokenized."""
        ids: list[int] | None = document.metadata.pop("ids", None)
        if ids is None:
            return None
        if max(ids) >= len(self._tokenizer) or min(ids) < 0:
            raise UserError(
                f"--input {document.id}: has tokens outside the tokenizer's vocabulary; give the one that made the "
                "dataset as --dataset-tokenizer"
            )
        ids = ids[:-1] if ids[-1] == self._tokenizer.eos_token_id else ids
        document.text = self._tokenizer.decode(ids)
        document.metadata["row"][self._text_key] = document.text
        return ids if self._is_same else None


def _row(writer: Any, document: Document) -> dict[str, Any]:
    row: dict[str, Any] = document.metadata["row"]
    return row


class _WholeJsonl(JsonlWriter):  # type: ignore[misc]
    """Writes rows unchanged; datatrove's writer treats a field named media specially."""

    def _write(self, document: dict[str, Any], file_handler: Any, _filename: str) -> None:
        try:
            line = orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)
            if b"null" in line and not _is_finite(document):
                raise TypeError("a number that is not finite")  # orjson writes null
        except TypeError as error:
            raise UserError(f"--output-format jsonl: a value cannot be written ({error}); write parquet") from None
        file_handler.write(line)


def _is_finite(value: object) -> bool:
    """Return whether all numbers in a value, or in the values that it holds, are finite."""
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or isfinite(value)


class _WholeParquet(ParquetWriter):  # type: ignore[misc]
    """Writes rows of a table with the types of its columns, and other rows with the types of the first ones."""

    def __init__(self, parts: Sequence[Part], score_key: str, **options: Any) -> None:
        super().__init__(**options)
        self.parts, self.score_key = list(parts), score_key

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Write the rows, and yield them.

        Raises:
            UserError: they do not form a table.
        """
        first = list(islice(data, self.batch_size))
        read = table_schema(self.parts[rank].path) if self.parts[rank].kind == "file" else None
        self.is_inferred = read is None
        with _refused_table():
            rows = [document.metadata["row"] for document in first]
            inferred = RecordBatch.from_pylist(rows if read is None else [{self.score_key: 0.0}]).schema
            self.schema = inferred if read is None else unify_schemas([read, inferred])
        yield from super().run(chain(first, data), rank, world_size)

    def _write(self, document: dict[str, Any], file_handler: Any, filename: str) -> None:
        if set(document) != set(self.schema.names):  # a field that only some have would be left out
            raise UserError("--output-format parquet: the rows have different fields; write jsonl")
        super()._write(document, file_handler, filename)

    def _write_batch(self, filename: str) -> None:
        with _refused_table():
            if self.is_inferred and (rows := self._batches[filename]):
                # Fields of objects that the first rows do not have would be left out.
                found = unify_schemas([self.schema, RecordBatch.from_pylist(rows).schema])
                if found != self.schema:
                    raise ValueError(f"{found} after {self.schema}")
            super()._write_batch(filename)


@contextmanager
def _refused_table() -> Iterator[None]:
    """Turn errors of rows whose values have no common types, inside the context, into a UserError."""
    try:
        yield
    except (ArrowException, ValueError, OverflowError) as error:
        raise UserError(
            f"--output-format parquet: the rows do not form a table ({shortened(error)}); write jsonl"
        ) from None


def score_steps(
    parts: Sequence[Part],
    output: str,
    settings: ScoreSettings,
    *,
    text_key: str = "text",
    output_format: Literal["jsonl", "parquet"] = "jsonl",
    skip_malformed: bool = False,
    show_progress: bool = False,
) -> list[PipelineStep]:
    """Return the pipeline that scores parts of files into a folder, for any executor of datatrove, a task for each.

    Its executor has to keep its logs in the folder's ``logs``, which record the finished parts.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    folder = OutputFolder(output)
    job = {**vars(settings), "model": str(Path(settings.model).resolve()), "text_key": text_key}
    job |= {"format": output_format, "skip_malformed": skip_malformed, "parts": list(map(vars, parts))}
    read = dict.fromkeys(path for part in parts for path in _files_of(part))
    folders = [path for path in (settings.model, settings.dataset_tokenizer) if path is not None]
    job |= {"inputs": file_stamps(list(read)), "models": file_stamps(files_below(folders))}
    suffix = f".{output_format}"
    with refused_output(output):
        _claim(folder, job)
    place: dict[str, Any] = {"output_folder": folder.path("partial"), "output_filename": f"${{rank}}{suffix}"}
    place |= {"adapter": _row, "max_file_size": -1}
    writer = (
        _WholeJsonl(compression=None, **place)
        if output_format == "jsonl"
        else _WholeParquet(parts, settings.score_key, **place)
    )
    return [
        RowReader(parts, text_key, skip_malformed=skip_malformed, show_progress=show_progress),
        ScoringStep(replace(settings, model=job["model"]), text_key),
        writer,
        FilePublisher(folder, suffix),
    ]


def _files_of(part: Part) -> list[str]:
    return [f"{part.path}.idx", f"{part.path}.bin"] if part.kind == "dataset" else [part.path]


def score_counts(stats: Any) -> dict[str, int]:
    """Return documents, bytes of their text, and rows that were skipped, of datatrove's statistics of a call."""
    if stats is None:
        return {"documents": 0, "bytes": 0, "skipped": 0}
    by_step = {step.name: step.stats for step in stats.stats}
    read = next(found for name, found in by_step.items() if name.endswith("rows"))
    scored = next(found for name, found in by_step.items() if name.endswith("scores"))
    return {
        "documents": int(scored["bytes"].n),
        "bytes": int(scored["bytes"].total),
        "skipped": int(read["skipped"].total),
    }


def _claim(folder: OutputFolder, job: dict[str, Any]) -> None:
    """Create the output's folder for this job, or check that it belongs to this job.

    Raises:
        UserError: it holds something else.
    """
    text = json.dumps(job, indent=2) + "\n"
    found = folder.read("job.json")
    if found is None and not folder.has_files():
        folder.write("job.json", text)
    elif found is None:
        raise UserError(f"--output {folder.location}: does not hold scores; give another folder")
    elif found != text:
        raise UserError(
            f"--output {folder.location}: was made with other input or flags; give another folder, or remove it"
        )
