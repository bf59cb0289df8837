"""Train a SentencePiece tokenizer on JSON lines, for --tokenizer-type SentencePieceTokenizer.

Each line is an object with the text under the key of --json-key, such as {"text": "One document."}.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tqdm import tqdm

from megatron_dwm.atomic_write import atomic_files
from megatron_dwm.cli.command import run_command
from megatron_dwm.config.flags import flag, parse, require_at_least, require_given, require_paths
from megatron_dwm.corpora.readers import Reader, input_files
from megatron_dwm.errors import UserError
from megatron_dwm.json_lines import parse_object
from megatron_dwm.training.save_folder import check_writable


@dataclass(frozen=True)
class TrainTokenizerConfig:
    """Training of a tokenizer."""

    input: list[str] = flag(None, "JSON lines (plain, .gz or .zst) or Parquet: files, folders, or glob patterns.")
    output_prefix: str = flag(None, "Path of the output without .model and .vocab.")
    vocab_size: int = flag(None, "Number of pieces, including 256 byte pieces and 3 control pieces.")
    model_type: Literal["bpe", "unigram"] = flag("bpe", "Kind of the SentencePiece model.")
    json_key: str = flag("text", "Key of the text in each line.")

    def __post_init__(self) -> None:
        require_given(self, "input output_prefix", "give a path")
        require_given(self, "vocab_size", "give the number of pieces")
        require_paths(self, "output_prefix")
        require_at_least(self, 1, "vocab_size")


def main(argv: Sequence[str] | None = None) -> None:
    """Train a tokenizer."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config: TrainTokenizerConfig = parse(argv, {"train": TrainTokenizerConfig}, description=__doc__)["train"]
    prefix = Path(config.output_prefix)
    check_writable({"--output-prefix": prefix.parent if prefix.exists() else prefix})  # before it trains for hours
    # disable=None: a bar on a terminal only.
    texts = list(tqdm(_texts(input_files(config.input), config.json_key), unit=" documents", disable=None))
    model = _train([line for text in texts for line in text.split("\n") if line], config)
    _write(model, prefix)
    pieces = SentencePieceProcessor(model_proto=model)
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(map(len, pieces.encode(texts)))
    print(
        f"{prefix}.model: {config.model_type}, {pieces.get_piece_size()} pieces, "
        f"from {len(texts):,} documents of {size:,} bytes ({size / tokens:.2f} bytes a token)"
    )


def _texts(paths: Sequence[str], key: str) -> Iterator[str]:
    """Yield the documents of the files.

    Raises:
        UserError: a line is not a JSON object with a text under ``key``.
    """
    for record in Reader(paths, [key]):
        try:
            text = (parse_object(record.content) if isinstance(record.content, str) else record.content)[key]
            text.encode()
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(
                f"--input {record.place}: no JSON object with a text under {key!r}; correct it or give another "
                "--json-key"
            ) from None
        yield text


def _train(lines: list[str], config: TrainTokenizerConfig) -> bytes:
    """Return the model, as the bytes of its file.

    The text is not normalized, and unknown characters fall back to bytes, so that decoding restores the text. A BPE of
    the tokenizers library can do exactly the same.

    Raises:
        UserError: there is not enough text for a vocabulary of this size.
    """
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=2**30,  # the maximum; SentencePiece leaves out longer lines
            num_threads=1,  # the order of sums must not depend on the machine
            minloglevel=0 if sys.stderr.isatty() else 2,  # its progress, on a terminal only
        )
    except RuntimeError as error:
        raise UserError(_misfit(config, str(error))) from None
    return model.getvalue()


def _misfit(config: TrainTokenizerConfig, reason: str) -> str:
    """Return the message for a text and a size that SentencePiece refuses with ``reason``."""
    remedy = f"SentencePiece says {reason}"
    if most := re.search(r"<= (\d+)\.", reason):
        remedy = f"the text makes no more than {most[1]} pieces; give at most that, or more text"
    elif least := re.search(r"required_chars\. \d+ vs (\d+)", reason):
        remedy = f"its characters, the bytes and the control pieces alone are {least[1]}; give a larger size"
    elif "sentences_.empty()" in reason:
        remedy = "there is no text; give other files"
    return f"--vocab-size {config.vocab_size} does not fit --input {' '.join(config.input)}: {remedy}"


def _write(model: bytes, prefix: Path) -> None:
    """Write ``prefix`` + ``.model`` and ``.vocab``, the pieces with their scores.

    Raises:
        UserError: the path cannot be written.
    """
    pieces = SentencePieceProcessor(model_proto=model)
    vocabulary = "".join(f"{pieces.id_to_piece(i)}\t{pieces.get_score(i):g}\n" for i in range(pieces.get_piece_size()))
    try:
        with atomic_files(prefix.parent) as scratch:
            (scratch / f"{prefix.name}.model").write_bytes(model)
            (scratch / f"{prefix.name}.vocab").write_text(vocabulary, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"--output-prefix {prefix}: cannot be written ({error}); check the path") from error


if __name__ == "__main__":
    main()
