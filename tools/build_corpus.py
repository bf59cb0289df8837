"""Make a small corpus of several sources from the standard library of this Python, without a download."""

from __future__ import annotations

from pathlib import Path

from megatron_dwm.arguments import parse
from megatron_dwm.data.corpus import CorpusConfig, build_corpus, table, write_corpus
from megatron_dwm.errors import run_cli


def main() -> None:
    config = parse(None, {"corpus": CorpusConfig}, description=__doc__)["corpus"]
    corpus = build_corpus(config)
    write_corpus(corpus, Path(config.output))
    print(table(corpus))


if __name__ == "__main__":
    run_cli(main)
