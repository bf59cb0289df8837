"""Merge the indexed datasets of a folder, in the order of their names.

Flags and output are those of Megatron-LM's tool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from megatron_dwm.cli.command import run_command
from megatron_dwm.config.flags import flag, parse, require_given, require_paths


@dataclass(frozen=True)
class MergeConfig:
    """Merging."""

    input: str = flag("", "Folder of the datasets (.bin and .idx).")
    output_prefix: str = flag("", "Path of the output without .bin/.idx.")
    multimodal: bool = flag(
        False, "Datasets of several modalities.", refused="only text is trained on here; leave the flag out"
    )

    def __post_init__(self) -> None:
        require_given(self, "input output_prefix", "give a path")
        require_paths(self, "output_prefix")


def main(argv: Sequence[str] | None = None) -> None:
    """Merge datasets."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config: MergeConfig = parse(argv, {"merge": MergeConfig}, description=__doc__)["merge"]
    from megatron_dwm.corpora.merge import dataset_prefixes, merge_datasets  # seconds of imports

    prefixes = dataset_prefixes(config.input)
    documents, tokens = merge_datasets(prefixes, config.output_prefix)
    print(f"{config.output_prefix}: {documents:,} documents, {tokens:,} tokens of {len(prefixes):,} datasets")


if __name__ == "__main__":
    main()
