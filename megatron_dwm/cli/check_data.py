"""Verify datasets completely: every entry of the index, and every token against the vocabulary.

Give the tokenizer's flags as for a run; without them tokens are not compared with a vocabulary.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from megatron_dwm.cli.command import run_command
from megatron_dwm.config.flags import build, flag, read, require_given
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.config.unsupported_flags import reason_unsupported
from megatron_dwm.data.blend import parse_blend
from megatron_dwm.data.validation import check_dataset
from megatron_dwm.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckDataConfig:
    """Datasets to verify."""

    data_path: list[str] = flag(
        None, "Dataset prefixes, or weight-prefix pairs as for a run; all of each dataset is read."
    )

    def __post_init__(self) -> None:
        require_given(self, "data_path", "give the prefix of a dataset")


def main(argv: Sequence[str] | None = None) -> None:
    """Verify datasets; the exit code is 2 if one is damaged."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    values = read(argv, [CheckDataConfig, TokenizerConfig], description=__doc__, reason_unsupported=reason_unsupported)
    config = build(CheckDataConfig, values)
    vocab_size = None
    if values.keys() & {field.name for field in dataclasses.fields(TokenizerConfig)}:
        from megatron_dwm.data.tokenizers import build_tokenizer  # seconds of imports, not needed without a vocabulary

        vocab_size = int(build_tokenizer(build(TokenizerConfig, values)).vocab_size)
    prefixes, _ = parse_blend("--data-path", config.data_path)
    faults, documents, tokens = [], 0, 0
    for prefix in prefixes:
        try:
            found = verify(prefix, vocab_size)
        except UserError as error:
            faults.append(error)
        else:
            documents, tokens = documents + found[0], tokens + found[1]
    if len(prefixes) == 1 and faults:
        raise faults[0]
    for fault in faults:
        logger.error(fault)
    if faults:
        raise UserError(f"--data-path: {len(faults)} of {len(prefixes)} datasets have faults; preprocess them again")
    compared = "not compared with a vocabulary (no tokenizer was given)"
    if vocab_size is not None:
        compared = f"each in the vocabulary of {vocab_size:,}"
    named = "1 dataset is" if len(prefixes) == 1 else f"{len(prefixes)} datasets are"
    logger.info(f"{named} whole: {documents:,} documents, {tokens:,} tokens, {compared}")


def verify(prefix: str, vocab_size: int | None) -> tuple[int, int]:
    """Verify one dataset with a progress bar; return its numbers of documents and tokens.

    Raises:
        UserError: a file is missing or damaged, or a token is outside the vocabulary.
    """
    size = sum(os.path.getsize(prefix + suffix) for suffix in (".idx", ".bin") if os.path.isfile(prefix + suffix))
    # Without a terminal there is no bar.
    with tqdm(desc=os.path.basename(prefix), total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        index = check_dataset(f"--data-path {prefix}", prefix, vocab_size, progress=bar.update)
    return index.num_boundaries - 1, os.path.getsize(f"{prefix}.bin") // index.dtype.itemsize


if __name__ == "__main__":
    main()
