"""Duplicates among texts, found by datatrove's own steps: equal texts, and near ones by MinHash.

The steps work on chunks of rows and on files in a folder, so that their memory does not grow with the corpus, but for
the clusters of near duplicates: a list of the rows that have one.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from megatron_dwm.extras import require_packages

Kind = Literal["exact", "near"]
_CHUNK = 1 << 18  # rows whose signatures are sorted together


def duplicates(kind: Kind, texts: Iterable[str], folder: Path) -> Iterator[bool]:
    """Yield for each text whether to remove it: one of equal texts, or of a cluster of near duplicates, is kept.

    Args:
        kind: equal texts, or near duplicates, which share about 7 in 10 of their sequences of 5 words.
        texts: of all rows, in their order; they are read once.
        folder: for the steps' files, which are some tens or hundreds of bytes a text.

    Raises:
        UserError: datatrove is not installed.
    """
    require_packages(f"--duplicates {kind}", "datatrove")
    from loguru import logger

    logger.disable("datatrove")
    steps = (_exact_steps if kind == "exact" else _near_steps)(folder)
    signature, finders, make_filter = steps
    counts: list[int] = []
    remaining = iter(texts)
    while chunk := list(itertools.islice(remaining, _CHUNK)):
        signature.run(map(_document, chunk), rank=len(counts))
        counts.append(len(chunk))
    if not counts:
        return
    (folder / "found").mkdir(parents=True, exist_ok=True)  # where no file is written if there are no duplicates
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of a moment
        for finder, world_size in finders:
            for rank in range(world_size):
                finder.run(None, rank, world_size)
    for rank, count in enumerate(counts):
        numbers = map(_document, map(str, range(count)))
        with contextlib.redirect_stderr(io.StringIO()):
            kept = {int(document.id) for document in make_filter().run(numbers, rank=rank)}
        yield from (number not in kept for number in range(count))


def _document(text: str) -> Any:
    from datatrove.data import Document

    return Document(text=text, id=text)


def _exact_steps(folder: Path) -> tuple[Any, list[tuple[Any, int]], Any]:
    from datatrove.pipeline.dedup.exact_dedup import (
        ExactDedupConfig,
        ExactDedupFilter,
        ExactDedupSignature,
        ExactFindDedups,
    )
    from datatrove.utils.hashing import HashConfig

    config = ExactDedupConfig(content_getter=lambda document: document.text, hash_config=HashConfig(hash_fc="sha1"))
    signatures, found = str(folder / "signatures"), str(folder / "found")
    return (
        ExactDedupSignature(signatures, config),
        [(ExactFindDedups(signatures, found, config), 1)],
        lambda: ExactDedupFilter(found, config),
    )


def _near_steps(folder: Path) -> tuple[Any, list[tuple[Any, int]], Any]:
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):  # type: ignore[misc]
        """Words between spaces: the steps have taken punctuation out by then, and languages' own need more packages."""

        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    config = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))
    signatures, pairs, found = (str(folder / name) for name in ("signatures", "pairs", "found"))
    return (
        MinhashDedupSignature(signatures, config, language=Words()),
        [
            (MinhashDedupBuckets(signatures, pairs, config=config), config.num_buckets),
            (MinhashDedupCluster(pairs, found, config=config), 1),
        ],
        lambda: MinhashDedupFilter(found),
    )
