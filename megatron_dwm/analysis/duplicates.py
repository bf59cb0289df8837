"""Duplicates among texts, found by datatrove's steps: equal texts, and near ones by MinHash.

The steps work on chunks of rows and on files in a folder, so that their memory does not grow with the corpus, except
for the clusters of near duplicates: a list of the rows that have one.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

Kind = Literal["exact", "near"]
_CHUNK = 1 << 18  # rows whose signatures are sorted together
_MAX_CHUNKS = 10_000  # per task; files are named by task and chunk


class SignatureWriter(PipelineStep):  # type: ignore[misc]
    """Writes the signatures of a task's texts; equal (or nearly equal) texts have equal signatures."""

    type, name = "duplicates", "signatures"

    def __init__(self, kind: Kind, folder: str) -> None:
        """
        Args:
            kind: equal texts, or near duplicates, which share about 7 in 10 of their sequences of 5 words.
            folder: folder for the steps' files, which take some tens or hundreds of bytes per text.
        """
        super().__init__()
        self.kind, self.folder = kind, folder

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        """Write the signatures of each chunk."""
        for chunk in itertools.count():
            documents = list(itertools.islice(data, _CHUNK))
            if not documents and chunk:
                return
            step = (
                ExactDedupSignature(f"{self.folder}/signatures", _exact())
                if self.kind == "exact"
                else MinhashDedupSignature(f"{self.folder}/signatures", _near(), language=_Words())
            )
            step.run(iter(documents), rank=rank * _MAX_CHUNKS + chunk)


class QuietStep(PipelineStep):  # type: ignore[misc]
    """Runs a step without its progress bars."""

    type, name = "duplicates", "silent"

    def __init__(self, step: PipelineStep) -> None:
        super().__init__()
        self.step = step

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Run the step."""
        with contextlib.redirect_stderr(io.StringIO()):
            self.step.run(data, rank, world_size)


def find_steps(kind: Kind, folder: str) -> list[tuple[PipelineStep, int]]:
    """Return the steps that compare all signatures, and how many tasks each has."""
    signatures, pairs, found = (f"{folder}/{name}" for name in ("signatures", "pairs", "found"))
    steps = (
        [(ExactFindDedups(signatures, found, _exact()), 1)]
        if kind == "exact"
        else [
            (MinhashDedupBuckets(signatures, pairs, config=_near()), _near().num_buckets),
            (MinhashDedupCluster(pairs, found, config=_near()), 1),
        ]
    )
    return [(QuietStep(step), tasks) for step, tasks in steps]


def duplicates_of_task(kind: Kind, folder: str, rank: int, rows: int) -> npt.NDArray[np.bool_]:
    """Return for each row of a task whether to remove it: one of equal texts, or of near duplicates, is kept."""
    is_duplicate = np.ones(rows, np.bool_)
    for chunk, start in enumerate(range(0, rows, _CHUNK)):
        numbers = (Document(text=str(n), id=str(n)) for n in range(start, min(start + _CHUNK, rows)))
        step = (
            ExactDedupFilter(f"{folder}/found", _exact()) if kind == "exact" else MinhashDedupFilter(f"{folder}/found")
        )
        with contextlib.redirect_stderr(io.StringIO()):
            kept = [int(document.id) for document in step.run(numbers, rank=rank * _MAX_CHUNKS + chunk)]
        is_duplicate[kept] = False
    return is_duplicate


def _exact() -> ExactDedupConfig:
    return ExactDedupConfig(content_getter=lambda document: document.text, hash_config=HashConfig(hash_fc="sha1"))


def _near() -> MinhashConfig:
    return MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))


class _Words(WordTokenizer):  # type: ignore[misc]
    """Splits at spaces: the steps have removed punctuation, and tokenizers for languages need more packages."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]
