"""Build a corpus of several sources without a download, from installed documentation and Python's standard library."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_dwm.cli.command import run_command
from megatron_dwm.config.flags import parse
from megatron_dwm.corpora.corpus import CorpusConfig, table, write_corpus
from megatron_dwm.extras import require_packages


def main(argv: Sequence[str] | None = None) -> None:
    """Build a corpus."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config: CorpusConfig = parse(argv, {"corpus": CorpusConfig}, description=__doc__)["corpus"]
    if config.documentation:
        require_packages("--documentation", "resiliparse")
        from megatron_dwm.corpora.documentation import documentation_corpus as make_corpus
    else:
        from megatron_dwm.corpora.standard_library import standard_library_corpus as make_corpus
    corpus = make_corpus(config)
    folder = Path(config.output)
    write_corpus(corpus, folder)
    print(table(corpus))
    files = sum(map(len, corpus.values()))
    print(f"{folder}: {files} files of JSON lines, <source>.<part>.jsonl")


if __name__ == "__main__":
    main()
