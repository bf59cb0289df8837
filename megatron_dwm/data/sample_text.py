"""The text of a sample, rebuilt from its tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def sample_text(tokens: npt.NDArray[np.integer[Any]], tokenizer: Any, separator: str) -> str:
    """Return the text of token ids.

    Args:
        tokens: a sample's tokens, with the ends of documents [s].
        tokenizer: megatron-core's tokenizer.
        separator: the text that replaces the end of a document.
    """
    ends = np.flatnonzero(tokens == tokenizer.eod)
    pieces = [piece[piece != tokenizer.eod].tolist() for piece in np.split(tokens, ends)]
    return separator.join(tokenizer.detokenize(ids) if ids else "" for ids in pieces).strip()
