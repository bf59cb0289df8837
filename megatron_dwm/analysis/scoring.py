"""Scoring of documents with an exported weighter: the steps of a datatrove pipeline.

Needs the weighter's folder and transformers, nothing of Megatron. A task reads one file and writes one file beside the
finished ones, where it is renamed to when it is complete: what was interrupted is done again from its start.

Shape legend: b windows of a batch, s tokens of the longest of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import orjson
import torch
from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers.base import BaseDiskReader
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.pipeline.writers.parquet import ParquetWriter
from loguru import logger
from pyarrow import ArrowException

from megatron_dwm.atomic_write import atomic_write_text, sync
from megatron_dwm.corpora.readers import Reader
from megatron_dwm.errors import UserError, shortened
from megatron_dwm.weighting.export_manifest import MANIFEST, verify_export

Rule = Literal["mean", "max", "first"]
_BUFFER = 4096  # documents that are sorted by length at a time


class Rows(BaseDiskReader):  # type: ignore[misc]
    """Reads the documents of one file, and stops at what is none.

    datatrove's own readers leave out malformed lines, empty documents and the end of a damaged file with a warning.
    """

    name = "rows"

    def __init__(self, paths: Sequence[str], text_key: str, *, skip_malformed: bool, show_progress: bool) -> None:
        super().__init__("/", text_key=text_key, doc_progress=show_progress, add_file_path=False)
        self.paths, self.skip_malformed = list(paths), skip_malformed

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents of file number ``rank``."""
        yield from self.read_files_shard([self.paths[rank]])

    def read_file(self, filepath: str) -> Iterator[Document]:
        """Yield the documents of a file.

        Raises:
            UserError: it cannot be read, or a row is no document and they are not skipped.
        """
        for record in Reader([filepath], None):
            try:
                row = (
                    json.loads(record.content, parse_constant=_refuse)
                    if isinstance(record.content, str)
                    else record.content
                )
                text = row[self.text_key]
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(f"no text under {self.text_key!r}")
                text.encode()
            except (ValueError, RecursionError, KeyError, TypeError) as error:
                if self.skip_malformed:
                    self.stat_update("skipped")
                    continue
                reason = f"no key {error}" if isinstance(error, KeyError) else shortened(error)
                raise UserError(
                    f"--input {record.place}: no document ({reason}); correct it, or give --skip-malformed"
                ) from None
            yield Document(text=text, id=record.place, metadata={"row": row})


def _refuse(word: str) -> None:
    """Refuse what Python reads as a number and JSON has not."""
    raise ValueError(f"{word} is not JSON")


class ScoringModel:
    """A classifier and its tokenizer, as they lie in a folder, on one device."""

    def __init__(self, folder: str, window: int | None, batch_tokens: int, device: torch.device) -> None:
        """
        Args:
            window: most tokens that are scored at once; None takes the length that the weighter was trained with.
            batch_tokens: tokens of a batch, padding included.

        Raises:
            UserError: the folder holds no classifier with one label and a tokenizer that fits it.
        """
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"--weighter {folder}: no config.json there; give the folder of an exported weighter")
        verify_export("--weighter", Path(folder))
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, **options
            )
        except Exception as error:  # transformers and safetensors raise whatever they like
            raise UserError(
                f"--weighter {folder}: cannot be loaded ({shortened(error)}); give the folder of an exported weighter"
            ) from None
        if model.config.num_labels != 1 or report["missing_keys"]:
            raise UserError(f"--weighter {folder}: no trained classifier with one label; give an exported weighter")
        if len(self.tokenizer) > model.config.vocab_size:
            raise UserError(
                f"--weighter {folder}: its tokenizer has {len(self.tokenizer)} tokens and its model only "
                f"{model.config.vocab_size}; put the tokenizer there that it was trained with"
            )
        self.model = model.to(device).eval()
        self.device, self.batch_tokens = device, batch_tokens
        self.window = window or _trained_length(Path(folder), model.config)

    def score(self, documents: Sequence[Sequence[int]], rule: Rule) -> list[float]:
        """Return a score for each document of token ids."""
        windows = [
            (number, list(ids[start : start + self.window]))
            for number, ids in enumerate(documents)
            for start in range(0, len(ids) if rule != "first" else 1, self.window)
        ]
        windows.sort(key=lambda window: len(window[1]))
        found: list[list[tuple[float, int]]] = [[] for _ in documents]
        batch: list[tuple[int, list[int]]] = []
        for window in windows:
            # The next window is the longest so far, and gives the batch its width.
            if batch and (len(batch) + 1) * len(window[1]) > self.batch_tokens:
                self._score_batch(batch, found)
                batch = []
            batch.append(window)
        if batch:
            self._score_batch(batch, found)
        return [_combined(scores, rule) for scores in found]

    def _score_batch(self, batch: list[tuple[int, list[int]]], found: list[list[tuple[float, int]]]) -> None:
        for (number, ids), score in zip(batch, self._forward([ids for _, ids in batch]).tolist(), strict=True):
            found[number].append((score, len(ids)))

    def _forward(self, windows: list[list[int]]) -> torch.Tensor:
        """Return the scores [b] of windows."""
        width = max(map(len, windows))
        pad = self.model.config.pad_token_id
        if pad is None and len(windows) > 1:  # such a classifier takes no batches
            return torch.cat([self._forward([window]) for window in windows])
        tokens = torch.tensor([w + [pad or 0] * (width - len(w)) for w in windows], device=self.device)  # [b, s]
        mask = torch.tensor([[1] * len(w) + [0] * (width - len(w)) for w in windows], device=self.device)
        on_gpu = self.device.type == "cuda"
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
            logits: torch.Tensor = self.model(input_ids=tokens, attention_mask=mask).logits
        return logits.squeeze(-1).float()


def _combined(scores: list[tuple[float, int]], rule: Rule) -> float:
    """Return a document's score; in the mean, windows count by their tokens."""
    if rule == "mean":
        return sum(score * size for score, size in scores) / sum(size for _, size in scores)
    return max(score for score, _ in scores)


def _trained_length(folder: Path, config: Any) -> int:
    manifest = folder / MANIFEST
    if manifest.is_file():
        length = json.loads(manifest.read_text()).get("language_model", {}).get("seq_length")
        if length:
            return int(length)
    return int(getattr(config, "max_position_embeddings", None) or 512)


@dataclass(frozen=True)
class ScoreSettings:
    """What a job's scores depend on."""

    weighter: str
    window: int | None
    rule: Rule
    batch_tokens: int
    score_key: str


class Scores(PipelineStep):  # type: ignore[misc]
    """Adds a score to each document; a buffer of documents is scored at a time, in batches of similar length."""

    type, name = "weighter", "scores"

    def __init__(self, settings: ScoreSettings) -> None:
        super().__init__()
        self.settings = settings

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents in their order.

        Raises:
            UserError: a document has no tokens, or has a field of the score's name.
        """
        settings, gpus = self.settings, torch.cuda.device_count()
        device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
        scorer = ScoringModel(settings.weighter, settings.window, settings.batch_tokens, device)
        while documents := list(islice(data, _BUFFER)):
            tokens = scorer.tokenizer([document.text for document in documents], verbose=False)["input_ids"]
            for document, ids in zip(documents, tokens, strict=True):
                if not ids:
                    raise UserError(f"--input {document.id}: its text has no tokens; remove it")
                if settings.score_key in document.metadata["row"]:
                    raise UserError(f"--input {document.id}: has {settings.score_key!r} already; give --score-key")
            for document, score in zip(documents, scorer.score(tokens, settings.rule), strict=True):
                document.metadata["row"][settings.score_key] = score
                self.stat_update("bytes", value=len(document.text.encode()))
                yield document


def _row(writer: Any, document: Document) -> dict[str, Any]:
    row: dict[str, Any] = document.metadata["row"]
    return row


class _WholeJsonl(JsonlWriter):  # type: ignore[misc]
    """Writes rows as they are; datatrove's own writer gives a field named media a meaning."""

    def _write(self, document: dict[str, Any], file_handler: Any, _filename: str) -> None:
        try:
            line = orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)
        except TypeError as error:
            raise UserError(f"--output-format jsonl: a value cannot be written ({error}); write parquet") from None
        file_handler.write(line)


class _WholeParquet(ParquetWriter):  # type: ignore[misc]
    """Writes tables whose rows have the same fields; a field that only some have would be left out otherwise."""

    def _write(self, document: dict[str, Any], file_handler: Any, filename: str) -> None:
        self.columns = getattr(self, "columns", None) or document.keys()
        if document.keys() != self.columns:
            raise UserError("--output-format parquet: the rows have different fields; write jsonl")
        super()._write(document, file_handler, filename)

    def _write_batch(self, filename: str) -> None:
        try:
            super()._write_batch(filename)
        except (ArrowException, ValueError) as error:
            raise UserError(
                f"--output-format parquet: the rows make no table ({shortened(error)}); write jsonl"
            ) from None


class _Published(PipelineStep):  # type: ignore[misc]
    """Moves the file of a task to the finished ones when a writer has closed it."""

    type, name = "writer", "published"

    def __init__(self, partial: Path, finished: Path, suffix: str) -> None:
        super().__init__()
        self.partial, self.finished, self.suffix = partial, finished, suffix

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        yield from data
        name = f"{rank:05d}{self.suffix}"
        if (self.partial / name).exists():  # a file without documents leaves none
            sync(self.partial / name)
            os.replace(self.partial / name, self.finished / name)
            sync(self.finished)


class _QuietExecutor(LocalPipelineExecutor):  # type: ignore[misc]
    """datatrove's executor; what a user must know is raised, and its log of steps is kept from the terminal."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        logger.disable("datatrove")
        return super()._run_for_rank(rank, local_rank, node_rank)


def score_files(
    paths: Sequence[str],
    output: Path,
    settings: ScoreSettings,
    *,
    text_key: str,
    output_format: Literal["jsonl", "parquet"],
    workers: int,
    skip_malformed: bool,
    show_progress: bool,
) -> dict[str, int]:
    """Score files; those that an earlier call has finished stay as they are.

    Returns:
        documents, bytes of their text, and rows that were skipped, of this call.

    Raises:
        UserError: bad input, another job's output, or a file that cannot be written.
    """
    absolute = [str(Path(path).resolve()) for path in paths]
    job = {**vars(settings), "weighter": str(Path(settings.weighter).resolve()), "text_key": text_key}
    job |= {"format": output_format, "skip_malformed": skip_malformed, "inputs": absolute}
    job |= {"sizes": [os.path.getsize(path) for path in absolute]}
    finished, partial, suffix = output / "data", output / "partial", f".{output_format}"
    try:
        _claim(output, job)
        finished.mkdir(exist_ok=True)
        writer_class = _WholeJsonl if output_format == "jsonl" else _WholeParquet
        writer = writer_class(
            str(partial), f"${{rank}}{suffix}", **_WRITER_OPTIONS[output_format], adapter=_row, max_file_size=-1
        )
        executor = _QuietExecutor(
            [
                Rows(absolute, text_key, skip_malformed=skip_malformed, show_progress=show_progress),
                Scores(settings),
                writer,
                _Published(partial, finished, suffix),
            ],
            tasks=len(absolute),
            workers=min(workers, len(absolute)),
            logging_dir=str(output / "logs"),
        )
        logger.disable("datatrove")
        stats = executor.run()
    except OSError as error:
        raise UserError(
            f"--output {output}: cannot be written ({error.strerror or shortened(error)}); mend that and run the "
            "command again, finished files are kept"
        ) from None
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


_WRITER_OPTIONS: dict[str, dict[str, Any]] = {"jsonl": {"compression": None}, "parquet": {"compression": "snappy"}}


def _claim(output: Path, job: dict[str, Any]) -> None:
    """Make the output's folder for this job, or check that it is this job's.

    Raises:
        UserError: it holds something else.
    """
    file = output / "job.json"
    text = json.dumps(job, indent=2) + "\n"
    if file.exists():
        if file.read_text() != text:
            raise UserError(f"--output {output}: is of other input or flags; give another folder, or remove it")
    elif output.exists() and any(output.iterdir()):
        raise UserError(f"--output {output}: is no folder of scores; give another folder")
    else:
        atomic_write_text(file, text)
