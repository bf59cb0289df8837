"""The flags of small runs, the one form in which tests describe a run: a dictionary of flag and value.

A test takes the groups that it needs and overrides what it is about: ``{**LANGUAGE_MODEL, **TRAINING, "--lr": 0.1}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dwm.config.run import RunConfig, parse_run

Flags = Mapping[str, Any]
"""``True`` is a switch, ``False`` leaves the flag out, a list is several values."""

LLAMA_STYLE: dict[str, Any] = {
    "--position-embedding-type": "rope",
    "--normalization": "RMSNorm",
    "--swiglu": True,
    "--disable-bias-linear": True,
    "--untie-embeddings-and-output-weights": True,
}

# Runs of the commands: two iterations of warm-up, and two stages of four with two outer updates each. Every iteration
# has two microbatches, so that gradients accumulate and pipelines fill; what costs is the number of both.
LANGUAGE_MODEL: dict[str, Any] = {
    "--num-layers": 2,
    "--hidden-size": 32,
    "--num-attention-heads": 4,
    "--seq-length": 32,
    "--max-position-embeddings": 32,
    **LLAMA_STYLE,
}
TRAINING: dict[str, Any] = {
    "--micro-batch-size": 4,
    "--global-batch-size": 8,
    "--train-iters": 10,
    "--lr": 1e-2,
    "--lr-decay-style": "cosine",
    "--lr-warmup-iters": 2,
    "--log-interval": 1,
    "--eval-iters": 1,
    "--num-workers": 0,
    "--hidden-dropout": 0.1,
    "--attention-dropout": 0.1,
}
DATA: dict[str, Any] = {"--mock-data": True, "--tokenizer-type": "NullTokenizer", "--vocab-size": 100}
WEIGHTING: dict[str, Any] = {
    "--dwm-warmup-iters": 2,
    "--dwm-num-stages": 2,
    "--dwm-update-interval": 2,
    "--dwm-init-from": "lm",
    "--dwm-num-layers": 1,
    "--dwm-weighter-steps": 2,
}

# Models that a test builds in its own processes, by ``tests/distributed/built_model.py``.
SEQ_LENGTH = 12
VOCAB_SIZE = 64
NUM_SAMPLES = 8
GPT: dict[str, Any] = {"--num-layers": 2, "--hidden-size": 16, "--num-attention-heads": 4}
LLAMA: dict[str, Any] = {
    **GPT,
    **LLAMA_STYLE,
    "--ffn-hidden-size": 48,
    "--group-query-attention": True,
    "--num-query-groups": 2,
}
OLMO2_NORMS: dict[str, Any] = {
    "--qk-layernorm": True,
    "--dwm-qk-norm-all-heads": True,
    "--dwm-output-norm": True,
}
OLMO2: dict[str, Any] = {**LLAMA, **OLMO2_NORMS}
IN_PROCESS: dict[str, Any] = {
    "--seq-length": SEQ_LENGTH,
    "--max-position-embeddings": SEQ_LENGTH,
    "--init-method-std": 0.3,
    "--micro-batch-size": 2,
    "--global-batch-size": NUM_SAMPLES,
    "--train-iters": 10,
    "--lr": 0.01,
    "--hidden-dropout": 0,
    "--attention-dropout": 0,
    "--make-vocab-size-divisible-by": 32,
    "--mock-data": True,
    "--tokenizer-type": "NullTokenizer",
    "--vocab-size": VOCAB_SIZE - 1,
    "--clip-grad": 0,
}
"""Flags of all of them, without randomness."""


def as_argv(flags: Flags) -> list[str]:
    """Return flags as arguments."""
    argv = []
    for name, value in flags.items():
        if value is True:
            argv.append(name)
        elif value is not False:
            argv += [name, *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return argv


def parse_flags(flags: Flags, processes: int = 1) -> RunConfig:
    """Return the configuration of a run of ``processes`` processes."""
    return parse_run(as_argv(flags), processes)
