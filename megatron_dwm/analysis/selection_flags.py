"""Flags of a selection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from megatron_dwm.config.flags import flag, require_at_least, require_given, require_paths
from megatron_dwm.errors import UserError

_SUFFIXES = tuple(f"{kind}{packed}" for kind in (".jsonl", ".json", ".ndjson") for packed in ("", ".gz", ".zst"))


@dataclass(frozen=True)
class SelectConfig:
    """Selection."""

    input: list[str] = flag(
        None,
        "JSON lines (plain, .gz or .zst) or Parquet, such as score writes: files, folders, glob patterns, or URLs.",
    )
    output: str = flag(
        "",
        "File of JSON lines to write, compressed if its name ends with .gz or .zst; with --output-format indexed the "
        "prefix of a dataset.",
    )
    output_format: Literal["jsonl", "indexed"] = flag(
        "jsonl", "JSON lines, or an indexed dataset (.bin and .idx) of the texts, made with the tokenizer's flags."
    )
    append_eod: bool = flag(False, "With --output-format indexed: append the end-of-document token to each document.")
    workers: int = flag(1, "Number of processes, or of concurrent tasks of a SLURM job.")
    split_bytes: int = flag(
        1000000000, "Larger files of plain JSON lines are divided into several tasks; any other file is one task."
    )
    duplicates: Literal["keep", "exact", "near"] = flag(
        "keep",
        "Duplicates to remove before the selection: none, all but one of the rows with equal texts, or with nearly "
        "equal texts (MinHash).",
    )
    method: Literal["random", "score", "perplexity", "dsir", "source-mix"] = flag(
        "score",
        "Which rows are kept: random ones, the highest scores, the lowest perplexities, those most similar to "
        "--target (dsir), or random ones of each source (source-mix), whose shares are those of --quota, or else those "
        "that score would keep.",
    )
    score_key: str | None = flag(
        None, "Key (column) of the number to rank by. Default: perplexity with that method, otherwise score."
    )
    target: list[str] | None = flag(None, "With --method dsir: files of the target texts, as for --input.")
    documents: int | None = flag(None, "Budget: number of documents.")
    tokens: int | None = flag(None, "Budget: number of tokens; needs --token-key or --tokenizer.")
    fraction: float | None = flag(None, "Budget: fraction of the documents.")
    token_key: str | None = flag(None, "Key (column) of a document's number of tokens.")
    tokenizer: str | None = flag(
        None, "Hugging Face folder whose tokenizer counts the tokens of a text, without special tokens."
    )
    json_key: str = flag(
        "text", "Key (column) of the text, for --tokenizer, --method dsir, --duplicates and --output-format indexed."
    )
    temperature: float | None = flag(
        None,
        "Draw rows with probabilities in proportion to exp(score / X) instead of taking the highest (Gumbel top-k).",
    )
    seed: int = flag(1234, "Seed of random draws.")
    quota: list[str] | None = flag(
        None, "SOURCE=SHARE: shares of the budget; sources that are not named compete for what is left."
    )
    source_key: str | None = flag(
        None, "Key (column) of a row's source. Default: each input file is a source, named by its path."
    )

    def __post_init__(self) -> None:
        require_given(self, "input output", "give a path")
        require_paths(self, "output", allow_urls=self.output_format != "indexed")
        require_at_least(self, 1, "workers split_bytes")
        if self.output_format == "indexed":
            if self.output.endswith((*_SUFFIXES, ".bin", ".idx")):
                raise UserError(f"--output {self.output}: names a file; give the prefix of a dataset")
        elif self.append_eod:
            raise UserError("--append-eod is for --output-format indexed; leave it out")
        elif not self.output.endswith(_SUFFIXES):
            raise UserError(
                f"--output {self.output}: the output is JSON lines; give a name that ends with .jsonl, .jsonl.gz or "
                ".jsonl.zst"
            )
        if sum(value is not None for value in (self.documents, self.tokens, self.fraction)) != 1:
            raise UserError("the budget is missing or given twice; give one of --documents, --tokens and --fraction")
        require_at_least(self, 1, "documents tokens")
        require_at_least(self, 0, "seed")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise UserError(f"--fraction {self.fraction} is not between 0 and 1; give a number above 0 and at most 1")
        ways = sum(value is not None for value in (self.token_key, self.tokenizer))
        if ways != (self.tokens is not None):
            raise UserError(
                "--tokens needs either --token-key or --tokenizer, and only --tokens uses them; correct the flags"
            )
        if self.score_key is not None and self.ranking_key is None:
            raise UserError(f"--score-key {self.score_key}: --method {self.method} needs none; leave one of them out")
        if bool(self.target) != (self.method == "dsir"):
            raise UserError("--method dsir and --target need each other; give both or neither")
        if self.temperature is not None:
            if not 0 < self.temperature < float("inf"):
                raise UserError(f"--temperature {self.temperature} is not above 0; give a positive number")
            if self.ranking_key is None and self.method != "dsir":
                raise UserError("--temperature: nothing is ranked with this --method; leave one of them out")
        _parse_quotas(self.quota or [])

    @property
    def quotas(self) -> dict[str, Fraction]:
        """Shares of the budget by source."""
        return _parse_quotas(self.quota or [])

    @property
    def ranking_key(self) -> str | None:
        """Key of the number that rows are ranked by; None if they are not ranked by a field."""
        if self.method in ("random", "dsir") or (self.method == "source-mix" and self.quota):
            return None
        return self.score_key or ("perplexity" if self.method == "perplexity" else "score")

    @property
    def unit(self) -> str:
        """The unit of the budget."""
        return "tokens" if self.tokens is not None else "documents"

    @property
    def budget(self) -> str:
        """The budget's flag and value, for messages."""
        name = next(name for name in ("documents", "tokens", "fraction") if getattr(self, name) is not None)
        return f"--{name} {getattr(self, name)}"


def _parse_quotas(words: Sequence[str]) -> dict[str, Fraction]:
    """Return shares by source from words such as ``web=0.5``.

    Raises:
        UserError: they are not valid shares.
    """
    shares: dict[str, Fraction] = {}
    for word in words:
        source, equals, share = word.rpartition("=")
        try:
            shares[source] = Fraction(str(float(share)))  # exact: 0.1 is a tenth
        except ValueError:
            equals = ""
        if not equals or shares[source] <= 0:
            raise UserError(f"--quota {word}: not SOURCE=SHARE; give, for example, web=0.5")
    if len(shares) != len(words) or sum(shares.values()) > 1:
        raise UserError(f"--quota {' '.join(words)}: a source is named twice, or the sum is above 1; correct it")
    return shares
