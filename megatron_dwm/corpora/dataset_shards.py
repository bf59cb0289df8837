"""Tokenizing as a step of a datatrove pipeline: each task writes its documents as a shard of an indexed dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megatron_dwm.atomic_write import sync
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.corpora.dataset_writer import DatasetWriter, dataset_prefix, publish_datasets
from megatron_dwm.corpora.encoder import Encoder, Malformed
from megatron_dwm.data.index_file import IndexFile
from megatron_dwm.errors import UserError


class DatasetShardWriter(PipelineStep):  # type: ignore[misc]
    """Step that tokenizes a task's records, as :class:`~megatron_dwm.corpora.pipelines.RecordReader` yields them."""

    type, name = "writer", "dataset shards"

    def __init__(
        self,
        folder: str,
        keys: Sequence[str],
        tokenizer: TokenizerConfig,
        *,
        append_eod: bool,
        skip_malformed: bool = False,
        remedy: str = "correct it or give --skip-malformed",
    ) -> None:
        """
        Args:
            folder: folder on this machine, or one that all nodes share.
            keys: keys of a document's texts; each becomes a dataset.
            append_eod: whether the end-of-document token follows each document.
            skip_malformed: whether invalid records are left out and counted.
            remedy: what the error of an invalid record advises.
        """
        super().__init__()
        self.folder, self.keys, self.tokenizer = Path(folder), list(keys), tokenizer
        self.append_eod, self.skip_malformed, self.remedy = append_eod, skip_malformed, remedy

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        """Write the shard.

        Raises:
            UserError: the tokenizer cannot be read, or a record is invalid and not skipped.
        """
        encoder = Encoder(self.keys, self.tokenizer, append_eod=self.append_eod)
        self.folder.mkdir(parents=True, exist_ok=True)
        writer, prefix = None, self.folder / f"{rank:05d}"
        skipped, first_skipped = 0, ""
        for document in data:
            result = encoder(document.metadata["record"])
            if isinstance(result, Malformed):
                if not self.skip_malformed:
                    raise UserError(f"--input {result}; {self.remedy}")
                first_skipped = first_skipped or str(result)
                skipped += 1
                continue
            writer = writer or DatasetWriter(self.keys, encoder.dtype, prefix)
            writer.add(result)
            self.stat_update("documents")
        if skipped:
            text = f"{skipped} malformed documents were skipped, the first: {first_skipped}"
            prefix.with_suffix(".skipped").write_text(text, encoding="utf-8", errors="surrogateescape")
        if writer is not None:
            writer.finish()
            for key in self.keys:
                for suffix in (".bin", ".idx"):
                    sync(Path(dataset_prefix(prefix, key) + suffix))


def publish_shards(folder: Path, keys: Sequence[str], tasks: int, prefix: Path) -> None:
    """Combine the shards of all tasks into one dataset, which replaces an old one.

    Raises:
        UserError: there are no documents.
    """
    shards = [folder / f"{rank:05d}" for rank in range(tasks)]
    parts = [shard for shard in shards if Path(dataset_prefix(shard, keys[0]) + ".idx").is_file()]
    if not parts:
        raise UserError("--input: no documents; give other files")
    dtype: Any = IndexFile.open(dataset_prefix(parts[0], keys[0])).dtype.type
    publish_datasets(keys, dtype, parts, prefix)
