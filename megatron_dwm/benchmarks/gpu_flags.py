"""The flags of the runs of ``benchmarks/gpu.sh``, at full size and tiny."""

from __future__ import annotations

import shlex
from typing import Literal

Size = Literal["full", "tiny"]

_ARCHITECTURE = (
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 "
)
_COSTS = (
    _ARCHITECTURE + "--bf16 --lr 3e-4 --lr-warmup-iters 10 --mock-data --tokenizer-type NullTokenizer "
    "--eval-iters 0 --log-interval 100000 --dwm-num-stages 1 "
)
COSTS: dict[str, dict[Size, str]] = {
    "costs-125m": {
        "full": _COSTS + "--num-layers 12 --hidden-size 768 --num-attention-heads 12 --ffn-hidden-size 2048 "
        "--seq-length 1024 --max-position-embeddings 1024 --micro-batch-size 32 --global-batch-size 128 "
        "--vocab-size 31999 --num-workers 4 --train-iters 400",
        "tiny": _COSTS + "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 "
        "--max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 4 --vocab-size 99 --num-workers 0 "
        "--dwm-ngram-buckets 64 --train-iters 60",
    },
    "costs-1b": {
        "full": _COSTS + "--num-layers 16 --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 5632 "
        "--seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 4 --global-batch-size 32 "
        "--vocab-size 31999 --num-workers 4 --train-iters 400",
        "tiny": _COSTS + "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 16 "
        "--max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 4 --vocab-size 99 --num-workers 0 "
        "--dwm-ngram-buckets 64 --train-iters 60",
    },
}
"""Flags of the runs whose cost is measured by ``benchmarks/overhead.py`` and planned by ``--plan``.

Their batches are what one of 4 and one of 16 GPUs reads of GPT-3's batches of 0.5 and 1 million tokens (Brown et al.,
2020, table 2.1). With smaller microbatches the small model is limited by the host that launches its kernels.
"""
TURNS: dict[str, dict[Size, str]] = {
    "costs-125m": {"full": "--steps 2 --repeats 5", "tiny": "--steps 1 --repeats 2"},
    "costs-1b": {"full": "--steps 2 --repeats 4", "tiny": "--steps 1 --repeats 2"},
}
"""Flags of ``benchmarks/overhead.py`` itself."""
PRECISION: dict[Size, str] = {
    "full": _ARCHITECTURE + "--bf16 --num-layers 12 --hidden-size 768 --num-attention-heads 12 --ffn-hidden-size 2048 "
    "--seq-length 256 --max-position-embeddings 256 --micro-batch-size 32 --global-batch-size 64 --lr 6e-4 "
    "--lr-warmup-iters 20 --train-iters 200 --eval-iters 0 --log-interval 20 --num-workers 0 --dwm-num-stages 1 "
    "--steps 150 --batches 4",
    "tiny": _ARCHITECTURE + "--bf16 --num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 "
    "--max-position-embeddings 16 --micro-batch-size 4 --global-batch-size 8 --lr 3e-3 --train-iters 20 --eval-iters 0 "
    "--num-workers 0 --init-method-std 0.1 --dwm-num-stages 1 --dwm-ngram-buckets 64 "
    "--steps 6 --batches 2",
}
"""Flags of ``benchmark precision``, without its data."""
BENEFIT: dict[Size, str] = {
    "full": "--arms uniform bilevel oracle --seeds 3 --iterations 240 --jobs 9 --bf16 --num-layers 12 "
    "--hidden-size 960 --num-attention-heads 15 --init-method-std 0.02 --lr 6e-4 --eval-interval 20 --eval-iters 8",
    "tiny": "--arms uniform bilevel --seeds 1 --iterations 12 --jobs 2 --bf16 --hidden-size 16 --ffn-hidden-size 32 "
    "--num-attention-heads 2 "
    "--seq-length 16 --max-position-embeddings 16 --global-batch-size 16 --micro-batch-size 8 --lr-warmup-iters 2 "
    "--eval-interval 6 --eval-iters 1 --dwm-update-interval 4 --dwm-target-batch-size 16",
}
"""Flags of ``benchmarks/benefit.py``: a model of 133 million parameters on a mixture whose headroom is known.

The run is as short as the text: 2 million tokens, of which the oracle repeats its 0.8 million 2.5 times. In 7.9 million
tokens of a larger vocabulary a model of this size learned the texts by heart (docs/lab-notes.md).
"""
VOCAB_SIZE = 400
"""Pieces of the tokenizer of the texts; with few, the texts have many tokens."""


def words(flags: str) -> list[str]:
    """Return flags as arguments."""
    return shlex.split(flags)
