"""Make a corpus of several sources without a download, from what is installed: documentation, and Python itself."""

from __future__ import annotations

from pathlib import Path

from megatron_dwm.config.flags import parse
from megatron_dwm.corpora.corpus import CorpusConfig, table, write_corpus
from megatron_dwm.corpora.documentation import documentation_corpus
from megatron_dwm.corpora.standard_library import standard_library_corpus
from megatron_dwm.errors import run_cli


def main() -> None:
    config = parse(None, {"corpus": CorpusConfig}, description=__doc__)["corpus"]
    corpus = documentation_corpus(config) if config.documentation else standard_library_corpus(config)
    write_corpus(corpus, Path(config.output))
    print(table(corpus))


if __name__ == "__main__":
    run_cli(main)
